"""Tiny random models, a tokenizer and a corpus for them, and what must not change on an error.

A factory called twice with the same arguments gives two models with the same weights, so that
statistics made on one hold for the other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unified_edit.editing import load_model
from unified_edit.errors import ModelChangedError, ModelError
from unified_edit.model import Ledger, ledger_of
from unified_edit.statistics import KeyStatistics

END = "<|endoftext|>"
PLACES = ("Rome", "Paris", "Oslo", "Vienna", "Madrid", "Lisbon", "Dublin", "Athens")
THINGS = ("tower", "museum", "river", "harbour", "garden", "palace", "bridge", "market")

#: Tokens that the models have room for.
POSITIONS = 128
LAYERS = 4


def sentences() -> list[str]:
    """About two hundred short sentences, some 2,000 tokens."""
    named = [f"The {thing} is in the city of {place}." for thing in THINGS for place in PLACES]
    born = [
        f"{one} was born in {other}, not far from the {thing}."
        for one, other in itertools.pairwise(PLACES)
        for thing in THINGS
    ]
    old = [f"I walked from the old {a} to the {b} and back." for a in THINGS for b in THINGS]
    return named + born + old


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    return sentences()


def byte_level_tokenizer(texts: list[str], vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's splitting rule; its end-of-text token is number 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.pad_token = END
    return tokenizer


Factory = Callable[..., PreTrainedModel]


def _settled(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Biases that are not zero, since zero ones hide where they are forgotten."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


class InFloat64(TorchFunctionMode):
    """Inside, nothing that is float64 is made float32 on the way.

    Norms, softmax and attention scores are float32 in the code of most families, whatever the type
    of the weights. That is right for them, and hides from a comparison all that is below 1e-6.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            if given.get("dtype") is torch.float32:
                given["dtype"] = torch.float64
        return func(*args, **given)


@contextmanager
def own_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@pytest.fixture(scope="session")
def make_gpt2(tiny_tokenizer: PreTrainedTokenizerFast) -> Factory:
    """make_gpt2(seed=0, dtype=torch.float32, **fields of GPT2Config): width 24, d_k 48."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
        size: dict[str, Any] = {"vocab_size": len(tiny_tokenizer), "n_positions": POSITIONS}
        size |= {"n_embd": 24, "n_layer": LAYERS, "n_head": 2, "n_inner": 48}
        size |= {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
        with own_seed(seed):
            return _settled(GPT2LMHeadModel(GPT2Config(**{**size, **fields})), dtype)

    return make


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_gpt2: Factory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_texts: list[str],
) -> Path:
    """A folder with a saved model, and C0 of its layers 0 and 1 as stats.safetensors."""
    folder = tmp_path_factory.mktemp("runs")
    make_gpt2().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    model, tokenizer = load_model(str(folder / "model"))
    made = KeyStatistics.collect(model, tokenizer, tiny_texts, (0, 1))
    made.save(folder / "stats.safetensors")
    return folder


@pytest.fixture(scope="session")
def make_gptj(tiny_tokenizer: PreTrainedTokenizerFast) -> Factory:
    """make_gptj(seed=0, dtype=torch.float32, **fields of GPTJConfig): width 24, d_k 56."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
        size: dict[str, Any] = {"vocab_size": len(tiny_tokenizer), "n_positions": POSITIONS}
        size |= {"n_embd": 24, "n_layer": LAYERS, "n_head": 2, "n_inner": 56, "rotary_dim": 4}
        size |= {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
        size |= {"tie_word_embeddings": False}
        with own_seed(seed):
            return _settled(GPTJForCausalLM(GPTJConfig(**{**size, **fields})), dtype)

    return make


@pytest.fixture
def tiny(make_gpt2: Factory) -> PreTrainedModel:
    """A tiny GPT-2 whose flags, hooks and gradients are not all at their defaults."""
    return unusual(make_gpt2())


def unusual(model: PreTrainedModel) -> PreTrainedModel:
    """Flags, hooks, a replaced forward and a gradient that somebody may have left on a model."""
    blocks = model.base_model.h
    model.train()
    blocks[0].eval()
    blocks[1].mlp.training = False
    blocks[2].ln_1.weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(False)
    blocks[1].register_forward_hook(lambda _module, _args, _output: None)
    blocks[0].mlp.register_forward_pre_hook(lambda _module, _args: None)
    own = blocks[0].forward
    blocks[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[method-assign]
    blocks[1].ln_1.bias.grad = torch.ones_like(blocks[1].ln_1.bias)
    return model


@pytest.fixture(scope="session")
def statistics_of(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_texts: list[str]
) -> Callable[[PreTrainedModel], KeyStatistics]:
    """statistics_of(model): C0 of all its layers from the small corpus, shrunk."""

    def collect(model: PreTrainedModel) -> KeyStatistics:
        return KeyStatistics.collect(
            model, tiny_tokenizer, tiny_texts, range(LAYERS), shrinkage=1e-2
        )

    return collect


@pytest.fixture(scope="session")
def tiny_statistics(make_gpt2: Factory, statistics_of: Callable[..., Any]) -> KeyStatistics:
    """C0 of every layer of `tiny`."""
    return statistics_of(make_gpt2())


def _bytes(tensor: Tensor | None) -> object:
    """A tensor as something that compares equal only bit for bit (NaN equals the same NaN)."""
    if tensor is None or tensor.is_meta:
        return tensor is not None
    plain = tensor.detach().cpu().contiguous().flatten()
    data = plain.view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), str(tensor.device), data


def _ledger(model: nn.Module) -> Ledger | None:
    """The ledger of a model; None for one that cannot be edited and so has none."""
    try:
        return ledger_of(model)  # type: ignore[arg-type]
    except ModelError:
        return None


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about `model` and the process that a refused or failed edit must leave alone."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ledger = _ledger(model)
    state: dict[str, object] = {
        "weights": {name: _bytes(value) for name, value in parameters.items()},
        "weight objects": {name: id(value) for name, value in parameters.items()},
        "gradients": {name: _bytes(value.grad) for name, value in parameters.items()},
        "requires_grad": {name: value.requires_grad for name, value in parameters.items()},
        "buffers": {name: _bytes(value) for name, value in model.named_buffers()},
        "training": {name: module.training for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "forward": {name: vars(module).get("forward") for name, module in modules.items()},
        "hooks": {
            (name, kind): list(vars(module).get(kind, {}).items())
            for name, module in modules.items()
            for kind in hooks
        },
        "active edits": [edit.id for edit in ledger.active] if ledger else [],
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "python random state": random.getstate(),
        "numpy random state": np.random.get_state()[1].tobytes(),  # type: ignore[union-attr]
    }
    if ledger is not None:  # its hashes are those of the weights, so that undo still works
        try:
            ledger.verify()
            state["ledger"] = "fits"
        except ModelChangedError as problem:
            state["ledger"] = str(problem)
    else:
        state["ledger"] = "fits"
    return state


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    """Fail, naming what changed, unless the snapshot of `model` is still `before`."""
    after = snapshot(model)
    changed = [name for name, value in before.items() if after[name] != value]
    assert not changed, f"changed: {', '.join(changed)}"
