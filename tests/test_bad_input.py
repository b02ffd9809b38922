"""Bad input and failures: a clear error (what, where, what to do) and an unchanged model.

`refused` asserts the exact class of the error, that its message holds the essential words, and
that nothing about the model or the process has changed (`fixtures_tiny.snapshot`).
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import (
    END,
    LAYERS,
    PLACES,
    POSITIONS,
    assert_unchanged,
    byte_level_tokenizer,
    snapshot,
    unusual,
)
from tokenizers import Tokenizer, models, processors, trainers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import unified_edit.editing.editor as editor_module
import unified_edit.editing.values as values_module
import unified_edit.model.tensor_files as files_module
import unified_edit.statistics.key_statistics as statistics_module
from unified_edit.editing.editor import Editor, edit, optimise_values
from unified_edit.editing.edits import FORMAT as EDIT_FORMAT
from unified_edit.editing.edits import Edit
from unified_edit.editing.keys import compute_keys
from unified_edit.editing.methods import EMMET, MEMIT, METHODS, ROME, Contexts, Method
from unified_edit.errors import (
    ContradictionError,
    EditError,
    EditFileError,
    FactError,
    FactFileError,
    InfeasibleError,
    MethodError,
    ModelChangedError,
    ModelError,
    SharedSubjectError,
    StatisticsError,
    StatisticsFileError,
    TokenizationError,
    UnifiedEditError,
)
from unified_edit.facts.facts import Fact, Record
from unified_edit.facts.readers import read_facts
from unified_edit.model.anatomy import anatomy, check_finite
from unified_edit.model.ledger import ledger_of
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.statistics.key_statistics import KeyStatistics

SHORT: dict[str, Any] = {"steps": 4, "contexts": Contexts(starts=("The",), lengths=(4,))}
ONE = EMMET.replace(layers=(1,), **SHORT)
SPREAD = MEMIT.replace(layers=(0, 1, 2), ridge=1.0, **SHORT)
IN_TURN = ROME.replace(layers=(1,), steps=4, contexts=Contexts(starts=("",), lengths=(4,)))
EVERY = pytest.mark.parametrize("method", [ONE, SPREAD, IN_TURN], ids=lambda method: method.name)

TOWER = Fact("{} is in the city of", "The tower", "Rome", "Paris")
VIENNA = Fact("{} was born in", "Vienna", "Madrid", "Oslo")
OSLO = Fact("I walked from {} to the", "Oslo", "harbour", "river")
FACTS = [TOWER, VIENNA, OSLO]


def essential(text: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


@contextmanager
def refused(model: nn.Module, kind: type[BaseException], *words: str) -> Iterator[None]:
    """The block must raise exactly `kind` with all `words`, and leave `model` as it is."""
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind, f"{caught.type.__name__}: {caught.value}"
    essential(str(caught.value), words)
    assert_unchanged(model, before)


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt where a test must be sure that it was its own."""


def raising(error: BaseException, at: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, whose call number `at` (from 1) raises `error` instead."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(*args, **kwargs)

    return called


# --- facts ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("Rome is in", "Paris", "Oslo"), ["does not occur in the prompt", "'Paris'", "{}"]),
        (("Rome is not Rome, it is", "Rome", "x"), ["occurs 2 times", "'Rome'", "Write {}"]),
        (("{} and {} are", "Rome", "x"), ["more than one {}", "'Rome'", "Keep one"]),
        (("{} is in", "Rome", ""), ["target_new is empty", "'Rome'", "at least one"]),
        (("{} is in", "Rome", " \n"), ["target_new is empty", "at least one visible"]),
        (("{} is in", "", "Oslo"), ["subject is empty", "'{} is in'"]),
        (("", "Rome", "Oslo"), ["prompt is empty", "'Rome'"]),
        (("{} is in", "Rome", None), ["target_new must be a string", "NoneType", "as text"]),
        (("{} is in", "Rome", "Oslo", "Oslo"), ["equals target_true", "'Oslo'", "another target"]),
    ],
)
def test_a_malformed_fact(fields: tuple[Any, ...], words: list[str]) -> None:
    with pytest.raises(FactError) as caught:
        Fact(*fields)
    assert caught.type is FactError
    essential(str(caught.value), tuple(words))


@EVERY
@pytest.mark.parametrize("given", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_facts(tiny, tiny_tokenizer, tiny_statistics, method, given) -> None:
    with refused(tiny, FactError, "no facts", "at least one"):
        edit(tiny, tiny_tokenizer, given, method, statistics=tiny_statistics)


def test_no_facts_for_values(tiny, tiny_tokenizer) -> None:
    with refused(tiny, FactError, "no facts", "at least one"):
        optimise_values(tiny, tiny_tokenizer, [], ONE)


@EVERY
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("The tower is in Rome", ["list of Fact", "str", "[Fact(...)]"]),
        (None, ["list of Fact", "NoneType", "[Fact(...)]"]),
        (5, ["list of Fact", "int"]),
        (Record(TOWER), ["list of Fact", "Record", "record.fact"]),
        ([TOWER, "x"], ["list of Fact", "item 1", "str", "Fact(...)"]),
        ([{"prompt": "{} is", "subject": "a", "target_new": "b"}], ["item 0", "dict"]),
        ([TOWER, None], ["item 1", "NoneType"]),
        ([Record(TOWER)], ["item 0", "Record", "record.fact"]),
        ([[TOWER]], ["item 0", "list"]),
    ],
    ids=["text", "none", "number", "record", "item", "dict", "item none", "records", "nested"],
)
def test_things_that_are_no_facts(
    tiny, tiny_tokenizer, tiny_statistics, method, given, words
) -> None:
    with refused(tiny, FactError, *words):
        edit(tiny, tiny_tokenizer, given, method, statistics=tiny_statistics)
    with refused(tiny, FactError, *words):
        optimise_values(tiny, tiny_tokenizer, given, method)


@EVERY
def test_a_contradiction(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    other = Fact("{} is in the city of", "The tower", "Oslo")
    words = ("contradict", "fact 0", "fact 2", "'Rome'", "'Oslo'", "Keep one")
    with refused(tiny, ContradictionError, *words):
        edit(tiny, tiny_tokenizer, [TOWER, VIENNA, other], method, statistics=tiny_statistics)


@EVERY
def test_the_same_fact_twice_is_one_fact(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    again = Fact("The tower is in the city of", "The tower", "Rome")
    made = edit(tiny, tiny_tokenizer, [TOWER, again], method, statistics=tiny_statistics)
    assert made.facts == (TOWER,)


def test_a_shared_subject_under_equality(tiny, tiny_tokenizer, tiny_statistics) -> None:
    other = Fact("{} was sold in", "The tower", "Oslo")
    facts = [VIENNA, TOWER, other]
    prefixes = ledger_of(tiny).prefixes(tiny_tokenizer, ONE.contexts, 0)
    keys = compute_keys(anatomy(tiny), tiny_tokenizer, facts, prefixes, [1])[1]
    cosine = float(torch.cosine_similarity(keys[:, 1], keys[:, 2], dim=0))
    words = (TOWER.text, other.text, "'The tower'", f"{cosine:.6f}", "cosine", "separate edits")
    with refused(tiny, SharedSubjectError, *words, "ridge", "least_violation"):
        edit(tiny, tiny_tokenizer, facts, ONE, statistics=tiny_statistics)
    # nothing but upper and lower case and blanks
    same = Fact("{} was sold in", "the  Tower", "Oslo")
    with refused(tiny, SharedSubjectError, TOWER.text, same.text, "cosine"):
        edit(tiny, tiny_tokenizer, [TOWER, same], ONE, statistics=tiny_statistics)


@pytest.mark.parametrize(
    "method", [SPREAD, ONE.replace(infeasible="least_violation")], ids=["ridge", "least violation"]
)
def test_a_shared_subject_that_is_allowed_is_warned_of(
    tiny, tiny_tokenizer, tiny_statistics, method, caplog
) -> None:
    other = Fact("{} was sold in", "The tower", "Oslo")
    before = snapshot(tiny)
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        made = edit(tiny, tiny_tokenizer, [TOWER, other], method, statistics=tiny_statistics)
    (warning,) = made.warnings
    assert warning in caplog.text
    essential(warning, (TOWER.text, other.text, "'The tower'", "cosine", "neither is held exactly"))
    assert made.is_applied
    made.undo()
    assert_unchanged(tiny, before)


def test_a_shared_subject_in_turn_is_no_trouble(tiny, tiny_tokenizer, tiny_statistics) -> None:
    other = Fact("{} was sold in", "The tower", "Oslo")
    made = edit(tiny, tiny_tokenizer, [TOWER, other], IN_TURN, statistics=tiny_statistics)
    assert made.is_applied and len(made.outcomes) == 2 and not made.warnings


def test_more_facts_than_a_key_has_entries(tiny, tiny_tokenizer, tiny_statistics) -> None:
    d_k = anatomy(tiny).d_in
    facts = [Fact("{} is in", f"House {number}", "Rome") for number in range(d_k + 1)]
    words = (f"{d_k + 1} facts", f"d_k = {d_k}", "no solution", "ridge", "least_violation")
    with refused(tiny, InfeasibleError, *words):
        edit(tiny, tiny_tokenizer, facts, ONE, statistics=tiny_statistics)


def test_different_subjects_with_the_same_key(tiny, tiny_tokenizer, statistics_of) -> None:
    """Two words that the model cannot tell apart: the equality has no solution."""
    first, second = (tiny_tokenizer(word)["input_ids"] for word in (" Madrid", " Lisbon"))
    assert len(first) == len(second) == 1
    with torch.no_grad():
        embedding = tiny.get_input_embeddings().weight
        embedding[second[0]] = embedding[first[0]]
    facts = [VIENNA, *(Fact("I saw {} in", place, "Rome") for place in ("Madrid", "Lisbon"))]
    stats = statistics_of(tiny)
    words = ("cannot be held", "'I saw Madrid in'", "'I saw Lisbon in'", "condition", "ridge")
    with refused(tiny, InfeasibleError, *words, "least_violation"):
        edit(tiny, tiny_tokenizer, facts, ONE, statistics=stats)
    limit = ONE.replace(infeasible="least_violation")
    assert edit(tiny, tiny_tokenizer, facts, limit, statistics=stats).is_applied


def test_a_wrong_field_on_line_17(tmp_path) -> None:
    good = {"prompt": "{} is in", "subject": "Rome", "target_new": "Oslo"}
    lines = [json.dumps({**good, "subject": f"House {number}"}) for number in range(1, 30)]
    lines[16] = json.dumps({"prompt": "{} is in", "subject": "Rome", "target_nwe": "Oslo"})
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(FactFileError) as caught:
        read_facts(path)
    essential(str(caught.value), (str(path), "line 17", "'target_nwe'", "'target_new'"))


# --- lengths and tokens ---

LONG = "the old bridge and " * POSITIONS


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@pytest.mark.parametrize(
    "fact",
    [
        Fact(f"{LONG} so {{}} is in", "Rome", "Oslo"),
        Fact(f"{{}} is in {LONG} so", "Rome", "Oslo"),
        Fact("{} is in", "Rome", LONG),
        Fact("{} is in", LONG, "Rome"),
    ],
    ids=["before the subject", "after the subject", "target", "subject"],
)
def test_more_tokens_than_positions(make_gpt2, make_gptj, tiny_tokenizer, family, fact) -> None:
    model = unusual(make_gpt2() if family == "gpt2" else make_gptj())
    words = ("tokens", f"{POSITIONS}", "shorten", fact.text[:20])
    # no statistics needed: what can be refused at once is
    with refused(model, TokenizationError, *words):
        edit(model, tiny_tokenizer, [VIENNA, fact], ONE)
    with refused(model, TokenizationError, *words):
        edit(model, tiny_tokenizer, [VIENNA, fact], IN_TURN)
    with refused(model, TokenizationError, *words):
        optimise_values(model, tiny_tokenizer, [VIENNA, fact], ONE)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_prompt_that_fits_only_without_a_prefix(
    make_gpt2, make_gptj, tiny_tokenizer, statistics_of, family
) -> None:
    model = unusual(make_gpt2() if family == "gpt2" else make_gptj())
    text = "Rome is in"
    while len(tiny_tokenizer(f"{text} a Oslo")["input_ids"]) <= POSITIONS:
        text += " a"
    fact = Fact(text, "Rome", "Oslo")
    words = ("tokens", f"{POSITIONS}", "prefix", "shorten", "Rome is in")
    with refused(model, TokenizationError, *words):
        edit(model, tiny_tokenizer, [fact], ONE, statistics=statistics_of(model))
    with refused(model, TokenizationError, *words):
        optimise_values(model, tiny_tokenizer, [fact], ONE)


def test_prefixes_longer_than_the_positions(tiny, tiny_tokenizer, tiny_statistics) -> None:
    method = ONE.replace(contexts=Contexts(starts=("The",), lengths=(POSITIONS + 1,)))
    with refused(tiny, MethodError, "prefix", f"{POSITIONS + 1}", f"{POSITIONS}"):
        edit(tiny, tiny_tokenizer, [TOWER], method, statistics=tiny_statistics)


class SlowTokenizer:
    """What the library sees of a tokenizer without character offsets."""

    is_fast = False
    pad_token_id = 0


@pytest.mark.parametrize("tokenizer", [SlowTokenizer(), None, "gpt2"], ids=["slow", "none", "name"])
def test_no_fast_tokenizer(tiny, tiny_texts, tiny_statistics, tokenizer) -> None:
    with refused(tiny, TokenizationError, type(tokenizer).__name__, "fast", "AutoTokenizer"):
        edit(tiny, tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with refused(tiny, TokenizationError, type(tokenizer).__name__, "fast"):
        KeyStatistics.collect(tiny, tokenizer, tiny_texts, [0], shrinkage=1e-2)


def with_end_token(texts: list[str]) -> PreTrainedTokenizerFast:
    """Every text ends in the end-of-text token, so no text's ids begin another's."""
    tokenizer = byte_level_tokenizer(texts)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 0)]
    )
    return tokenizer


def across_blanks(texts: list[str]) -> PreTrainedTokenizerFast:
    """A BPE that merges over blanks: "of Rome" may be one token."""
    bpe = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=[END], show_progress=False, limit_alphabet=200
    )
    bpe.train_from_iterator([TOWER.text + " Rome"] * 50 + texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)


@pytest.mark.parametrize("make", [with_end_token, across_blanks], ids=lambda make: make.__name__)
@EVERY
def test_prompt_ids_that_do_not_begin_those_with_the_target(
    tiny, tiny_texts, tiny_statistics, make, method
) -> None:
    tokenizer = make(tiny_texts)
    words = ("not the beginning", repr(TOWER.text), "Rome", "whole word")
    with refused(tiny, TokenizationError, *words):
        edit(tiny, tokenizer, [TOWER], method, statistics=tiny_statistics)


def test_a_subject_without_tokens(tiny, tiny_statistics) -> None:
    """A normaliser may drop every character of a subject."""
    from tokenizers import Regex, normalizers

    tokenizer = byte_level_tokenizer(["The tower is in the city of Rome"])
    tokenizer._tokenizer.normalizer = normalizers.Replace(Regex("Q+"), "")
    fact = Fact("{} is in", "QQQ", "Rome")
    with refused(tiny, TokenizationError, "no token", "'QQQ is in'", "'QQQ'"):
        edit(tiny, tokenizer, [fact], ONE, statistics=tiny_statistics)


@EVERY
def test_a_tokenizer_of_another_model(tiny, tiny_texts, tiny_statistics, method) -> None:
    numerals = [f"{a}teen{b}ty{c}" for a in PLACES for b in PLACES for c in "abcdef"]
    large = byte_level_tokenizer([*tiny_texts, *numerals], 800)
    large.pad_token = END
    fact = Fact("The {} is in", large.decode([len(large) - 1]).strip(), "Rome")
    rows = tiny.get_input_embeddings().num_embeddings
    assert max(large(fact.text)["input_ids"]) >= rows
    words = ("tokenizer", f"{rows}", "another model")
    with refused(tiny, TokenizationError, *words):
        edit(tiny, large, [fact], method, statistics=tiny_statistics)
    with refused(tiny, TokenizationError, *words):
        optimise_values(tiny, large, [fact], method)
    with refused(tiny, TokenizationError, *words):
        KeyStatistics.collect(tiny, large, [fact.text] * 300, [0], shrinkage=1e-2)


def test_a_pad_token_that_the_model_does_not_know_is_no_trouble(
    tiny, tiny_texts, tiny_statistics
) -> None:
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= tiny.get_input_embeddings().num_embeddings
    assert edit(tiny, tokenizer, [TOWER], ONE, statistics=tiny_statistics).is_applied


def test_no_end_of_text_token_to_begin_a_prefix_with(tiny, tiny_texts, tiny_statistics) -> None:
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.eos_token = None
    with refused(tiny, TokenizationError, "end-of-text", "eos_token"):
        edit(tiny, tokenizer, [TOWER], IN_TURN, statistics=tiny_statistics)


# --- models that cannot be edited ---


def other_family(name: str, **fields: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **fields
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def plain_subclass(model: nn.Module) -> nn.Module:
    """A projection that is used in another way than its class says, as quantisers' are."""

    class Conv1DWithScales(Conv1D):
        pass

    model.transformer.h[1].mlp.c_proj.__class__ = Conv1DWithScales
    return model


def int8_weights(model: nn.Module) -> nn.Module:
    down = model.transformer.h[2].mlp.c_proj
    codes = (down.weight * 10).round().to(torch.int8)
    down.weight = nn.Parameter(codes, requires_grad=False)
    return model


def int8_elsewhere(model: nn.Module) -> nn.Module:
    attention = model.transformer.h[0].attn.c_attn
    codes = (attention.weight * 10).round().to(torch.int8)
    attention.weight = nn.Parameter(codes, requires_grad=False)
    return model


def flagged(model: nn.Module) -> nn.Module:
    model.is_quantized = True
    return model


def with_quantizer(model: nn.Module) -> nn.Module:
    model.hf_quantizer = object()
    return model


def dynamically_quantised_head(model: nn.Module) -> nn.Module:
    quantised = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic"})
    model.lm_head = quantised()
    return model


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def partly_on_meta(model: nn.Module) -> nn.Module:
    model.transformer.h[2].attn.c_attn.to("meta")
    return model


def peft_wrapped(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(model, config)


def peft_injected(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def weight_normed(model: nn.Module) -> nn.Module:
    """The old form keeps the class and computes the weight anew in every forward."""
    from torch.nn.utils import prune

    prune.l1_unstructured(model.transformer.h[1].mlp.c_proj, "weight", amount=0.1)
    return model


def parametrised(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.transformer.h[1].mlp.c_proj)
    return model


def without_projection(model: nn.Module) -> nn.Module:
    model.transformer.h[1].mlp = nn.Identity()
    return model


def headless(model: nn.Module) -> nn.Module:
    from transformers import GPT2Model

    return GPT2Model(model.config)


def classifier(model: nn.Module) -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(model.config)


UNUSABLE: dict[str, tuple[Callable[[nn.Module], Any], list[str]]] = {
    "GPT-NeoX": (
        lambda _: other_family("GPTNeoX", intermediate_size=32),
        ["'gpt_neox'", "not known", "gpt2, gptj", "missing", "models.py", "down-projection"],
    ),
    "OPT": (
        lambda _: other_family("OPT", ffn_dim=32, word_embed_proj_dim=16),
        ["'opt'", "not known", "gpt2, gptj", "missing"],
    ),
    "Llama": (
        lambda _: other_family("Llama", intermediate_size=32, num_key_value_heads=2),
        ["'llama'", "not known", "gpt2, gptj", "missing"],
    ),
    "no head": (headless, ["GPT2Model", "no language-model head", "causal language model"]),
    "classifier": (classifier, ["GPT2ForSequenceClassification", "no language-model head"]),
    "PEFT": (peft_wrapped, ["Peft", "adapters", "merge_and_unload()"]),
    "PEFT injected": (peft_injected, ["adapters", "GPT2LMHeadModel"]),
    "compiled": (torch.compile, ["compiled", "_orig_mod", "compile it again"]),
    "compiled in place": (compiled_in_place, ["compiled", "before"]),
    "data parallel": (nn.DataParallel, ["DataParallel", "not a transformers model"]),
    "subclass": (plain_subclass, ["transformer.h.1.mlp.c_proj", "Conv1DWithScales", "dequantise"]),
    "int8": (int8_weights, ["transformer.h.2.mlp.c_proj.weight", "int8", "unquantised"]),
    "int8 elsewhere": (int8_elsewhere, ["transformer.h.0.attn.c_attn.weight", "int8"]),
    "flag": (flagged, ["quantised", "GPT2LMHeadModel", "unquantised"]),
    "quantizer": (with_quantizer, ["quantised", "GPT2LMHeadModel", "unquantised"]),
    "quantised head": (dynamically_quantised_head, ["lm_head", "quantised", "unquantised"]),
    "meta": (on_meta, ["meta device", "transformer.", "device map"]),
    "partly meta": (partly_on_meta, ["meta device", "transformer.h.2.attn.c_attn", "device map"]),
    "pruned": (weight_normed, ["transformer.h.1.mlp.c_proj.weight", "computed", "parameter"]),
    "parametrised": (parametrised, ["transformer.h.1.mlp.c_proj", "Parametrized"]),
    "no projection": (without_projection, ["gpt2", "GPT2LMHeadModel", "c_proj"]),
    "a Linear": (lambda _: nn.Linear(3, 3), ["Linear", "not a transformers model", "load_model"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_model_that_cannot_be_edited(
    make_gpt2, tiny_tokenizer, tiny_texts, tiny_statistics, ready_made, name
) -> None:
    build, words = UNUSABLE[name]
    model = build(make_gpt2())
    with refused(model, ModelError, *words):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with refused(model, ModelError, *words):
        optimise_values(model, tiny_tokenizer, [TOWER], ONE)
    with refused(model, ModelError, *words):
        KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, [1])
    with refused(model, ModelError, *words):
        Editor(model, tiny_tokenizer)
    with refused(model, ModelError, *words):
        Edit.load(ready_made).apply(model)


@pytest.mark.parametrize("thing", [None, "gpt2", 3])
def test_no_model_at_all(tiny_tokenizer, tiny_statistics, ready_made, thing) -> None:
    for action in (
        lambda: edit(thing, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics),
        lambda: Editor(thing, tiny_tokenizer),
        lambda: KeyStatistics.collect(thing, tiny_tokenizer, ["a"], [0]),
    ):
        with pytest.raises(ModelError, match=f"{type(thing).__name__} is not a transformers model"):
            action()


def test_a_merged_model_can_be_edited(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    """What the message for PEFT models asks for must work."""
    merged = peft_wrapped(make_gpt2()).merge_and_unload()
    assert edit(merged, tiny_tokenizer, [TOWER], ONE, statistics=statistics_of(merged)).is_applied


def test_a_model_behind_its_compiled_form_can_be_edited(
    make_gpt2, tiny_tokenizer, tiny_statistics
) -> None:
    compiled = torch.compile(make_gpt2())
    made = edit(compiled._orig_mod, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    assert made.is_applied


DAMAGED = [
    "transformer.h.1.mlp.c_proj.weight",
    "transformer.h.2.mlp.c_fc.weight",
    "transformer.h.0.attn.c_attn.bias",
    "transformer.h.2.ln_2.weight",
    "transformer.ln_f.bias",
    "transformer.wte.weight",
    "transformer.wpe.weight",
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", DAMAGED)
def test_weights_that_are_not_finite(tiny, tiny_tokenizer, tiny_statistics, where, value) -> None:
    with torch.no_grad():
        tiny.get_parameter(where).view(-1)[-2:] = value
    words = (where, "2 NaN or infinite", "load it again")
    with refused(tiny, ModelError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with refused(tiny, ModelError, *words):
        optimise_values(tiny, tiny_tokenizer, [TOWER], ONE)


def test_weights_damaged_after_a_first_edit(tiny, tiny_tokenizer, tiny_statistics) -> None:
    edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with torch.no_grad():
        tiny.transformer.h[2].ln_1.bias[0] = float("nan")
    with refused(tiny, ModelError, "transformer.h.2.ln_1.bias", "load it again"):
        edit(tiny, tiny_tokenizer, [VIENNA], ONE, statistics=tiny_statistics)


def test_statistics_of_a_damaged_model(tiny, tiny_tokenizer, tiny_texts) -> None:
    with torch.no_grad():
        tiny.transformer.wpe.weight[3] = float("nan")
    with refused(tiny, StatisticsError, "layer 0", "not finite", "load it again"):
        KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, [0, 1])


def test_a_family_that_puts_a_norm_behind_the_mlp(tiny, tiny_tokenizer, statistics_of) -> None:
    """The probe, not the name, decides: here an update does not reach the block's output as is."""
    tiny.transformer.h[1].mlp.dropout = nn.LayerNorm(24)
    stats = statistics_of(tiny)
    with refused(tiny, ModelError, "probe", "layer 1", "orientation", "norm"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=stats)


@pytest.mark.parametrize("name", ["return_dict", "use_cache", "output_hidden_states"])
def test_a_configuration_for_other_outputs(tiny, tiny_tokenizer, tiny_statistics, name) -> None:
    """What a model is asked to return by default changes no edit."""
    expected = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).undo()
    setattr(tiny.config, name, name == "output_hidden_states")
    before = snapshot(tiny)
    made = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).undo()
    assert_unchanged(tiny, before)
    assert torch.allclose(made.delta(1), expected.delta(1), rtol=0, atol=1e-5)


def test_inside_inference_mode(tiny, tiny_tokenizer, tiny_statistics) -> None:
    """Gradients are needed; a caller's own mode must neither break the edit nor be changed."""
    with torch.inference_mode():
        made = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        made.undo()
        again = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
        assert not torch.is_grad_enabled()
    assert torch.equal(made.delta(1), again.delta(1))


def test_weights_made_in_inference_mode(make_gpt2, tiny_tokenizer, tiny_statistics) -> None:
    with torch.inference_mode():
        model = make_gpt2()
    with refused(model, ModelError, "inference_mode", "load"):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)


# --- methods ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ridge": -1.0}, ["ridge", "-1.0", ">= 0"]),
        ({"ridge": float("nan")}, ["ridge", "nan"]),
        ({"ridge": float("inf")}, ["ridge", "inf"]),
        ({"ridge": "1"}, ["ridge", "'1'", "number"]),
        ({"steps": 0}, ["steps", "0", ">= 1"]),
        ({"steps": 2.5}, ["steps", "2.5", "whole number"]),
        ({"steps": True}, ["steps", "True"]),
        ({"clamp": 0}, ["clamp", "positive"]),
        ({"clamp": "x"}, ["clamp", "'x'", "number"]),
        ({"learning_rate": -0.5}, ["learning_rate", "positive"]),
        ({"learning_rate": None}, ["learning_rate", "None"]),
        ({"kl_weight": -1}, ["kl_weight", ">= 0"]),
        ({"kl_weight": None}, ["kl_weight", "None"]),
        ({"weight_decay": float("nan")}, ["weight_decay", "nan"]),
        ({"stop_loss": "x"}, ["stop_loss", "'x'", "number"]),
        ({"ridge_from": 0}, ["ridge_from", ">= 1"]),
        ({"site": "attention"}, ["site", "'attention'", "block", "mlp"]),
        ({"key_mean": "median"}, ["key_mean", "'median'", "typed", "plain"]),
        ({"distribution": "even"}, ["distribution", "'even'", "memit", "pmet"]),
        ({"infeasible": "ignore"}, ["infeasible", "'ignore'", "least_violation"]),
        ({"layers": 1.5}, ["layers", "1.5"]),
        ({"layers": "1"}, ["layers", "'1'"]),
        ({"contexts": None}, ["contexts", "Contexts"]),
        ({"layer": (1,)}, ["no field 'layer'", "Method"]),
        ({"rigde": 0.0}, ["no field 'rigde'", "Method"]),
    ],
    ids=lambda value: (
        ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_wrong_setting(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(MethodError) as caught:
        ONE.replace(**fields)
    assert caught.type is MethodError
    essential(str(caught.value), ("EMMET", *words))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"starts": "The"}, ["starts", "'The'"]),
        ({"starts": (1,)}, ["starts", "1"]),
        ({"lengths": 10}, ["lengths", "10"]),
        ({"lengths": (0,)}, ["lengths", "0"]),
        ({"lengths": ("5",)}, ["lengths", "'5'"]),
        ({"per_start": 0}, ["per_start", "0"]),
        ({"per_start": 1.5}, ["per_start", "1.5"]),
    ],
    ids=lambda value: (
        ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_wrong_contexts(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(MethodError) as caught:
        Contexts(**fields)
    essential(str(caught.value), ("Contexts", *words))


def test_lists_and_ranges_are_as_good_as_tuples(
    tiny, tiny_tokenizer, tiny_statistics, tmp_path
) -> None:
    assert Contexts(starts=["The"], lengths=[4]) == Contexts(starts=("The",), lengths=(4,))
    method = SPREAD.replace(layers=range(3), contexts=Contexts(starts=["The"], lengths=[4]))
    assert method == SPREAD
    made = edit(tiny, tiny_tokenizer, [TOWER], method, statistics=tiny_statistics)
    made.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors").method == made.method


@pytest.mark.parametrize(
    "layers", [(LAYERS,), (0, LAYERS), (-1,), (1, 1), (2, 0), (), (1.0,), ("1",), (True,)], ids=repr
)
def test_layers_that_do_not_fit(tiny, tiny_tokenizer, tiny_statistics, layers) -> None:
    words = ("layers", repr(layers), f"0..{LAYERS - 1}", "ascending")
    with refused(tiny, ModelError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE.replace(layers=layers), statistics=tiny_statistics)
    with refused(tiny, ModelError, *words):
        KeyStatistics.collect(tiny, tiny_tokenizer, ["a"], layers)


@pytest.mark.parametrize(
    "method", ["EMMET", None, EMMET.to_dict(), Method], ids=lambda m: str(m)[:9]
)
def test_things_that_are_no_method(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    words = (type(method).__name__, "give a Method", "unified_edit.EMMET")
    with refused(tiny, MethodError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], method, statistics=tiny_statistics)
    with refused(tiny, MethodError, *words):
        optimise_values(tiny, tiny_tokenizer, [TOWER], method)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_without_published_settings(tiny, tiny_tokenizer, tiny_statistics, name) -> None:
    words = (name, "layers", "gpt2", f"{LAYERS} layers of width 24", "method.replace(layers=")
    with refused(tiny, MethodError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], METHODS[name], statistics=tiny_statistics)


def test_a_ridge_without_a_published_value(tiny, tiny_tokenizer, tiny_statistics) -> None:
    with refused(tiny, MethodError, "MEMIT", "ridge", "method.replace(ridge="):
        edit(tiny, tiny_tokenizer, [TOWER], MEMIT.replace(layers=(1,)), statistics=tiny_statistics)


@pytest.mark.parametrize("seed", [None, 0.5, "0", [0], 2**70, True], ids=repr)
def test_a_wrong_seed(tiny, tiny_tokenizer, tiny_statistics, seed) -> None:
    with refused(tiny, MethodError, "seed", repr(seed), "whole number"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics, seed=seed)
    with refused(tiny, MethodError, "seed", repr(seed), "whole number"):
        optimise_values(tiny, tiny_tokenizer, [TOWER], ONE, seed=seed)


@pytest.mark.parametrize(
    "thing", [{}, "stats.safetensors", torch.eye(48)], ids=["dict", "path", "C0"]
)
def test_things_that_are_no_statistics(tiny, tiny_tokenizer, thing) -> None:
    with refused(tiny, StatisticsError, type(thing).__name__, "KeyStatistics"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=thing)


@EVERY
def test_the_last_layer(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    """A value there is read by no later token; only a subject that ends its prompt can use it."""
    last = method.replace(layers=(LAYERS - 1,))
    words = (f"layer {LAYERS - 1}", "last", repr(TOWER.text), "'Rome'", "earlier layer")
    with refused(tiny, MethodError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], last, statistics=tiny_statistics)
    with refused(tiny, MethodError, *words):
        optimise_values(tiny, tiny_tokenizer, [TOWER], last)
    at_the_end = Fact("I have seen {}", "the tower", "Rome")
    assert edit(tiny, tiny_tokenizer, [at_the_end], last, statistics=tiny_statistics).is_applied


# --- values ---


def test_values_that_do_not_belong(tiny, make_gpt2, tiny_tokenizer, tiny_statistics) -> None:
    values = optimise_values(tiny, tiny_tokenizer, [TOWER], ONE)

    def write(facts: list[Fact], method: Method, given: Any = values, **more: Any) -> Any:
        return edit(
            tiny, tiny_tokenizer, facts, method, statistics=tiny_statistics, values=given, **more
        )

    with refused(tiny, FactError, "1 facts are missing", VIENNA.text, "optimise them"):
        write([TOWER, VIENNA], ONE)
    with refused(tiny, MethodError, "block 1", "block 2", "optimise them"):
        write([TOWER], ONE.replace(layers=(2,)))
    with refused(tiny, MethodError, "block 1", "mlp 1"):
        write([TOWER], ONE.replace(site="mlp"))
    with refused(tiny, MethodError, "another seed", "optimise_values"):
        write([TOWER], ONE, seed=1)
    with refused(tiny, MethodError, "settings", "optimise_values"):
        write([TOWER], ONE.replace(clamp=0.5))
    with refused(tiny, MethodError, "one after another", "leave values out"):
        write([TOWER, VIENNA], IN_TURN)
    with refused(tiny, MethodError, "dict", "optimise_values"):
        write([TOWER], ONE, {})
    foreign = optimise_values(make_gpt2(seed=5), tiny_tokenizer, [TOWER], ONE)
    with refused(tiny, MethodError, "another model", "optimise_values"):
        write([TOWER], ONE, foreign)
    write([VIENNA], ONE, optimise_values(tiny, tiny_tokenizer, [VIENNA], ONE))
    with refused(tiny, MethodError, "state of it", "optimise_values"):
        write([TOWER], ONE)


# --- statistics: the corpus ---


def collect(model: nn.Module, tokenizer: Any, texts: Any, **more: Any) -> KeyStatistics:
    return KeyStatistics.collect(model, tokenizer, texts, [0, 1], **more)


def test_too_few_tokens(tiny, tiny_tokenizer, tiny_texts) -> None:
    words = ("tokens", "fewer than 2*d_k = 96", "10*d_k = 480", "shrinkage")
    with refused(tiny, StatisticsError, *words):
        collect(tiny, tiny_tokenizer, tiny_texts[:25])
    with refused(tiny, StatisticsError, "256 set aside", "more text"):
        collect(tiny, tiny_tokenizer, tiny_texts[:10], shrinkage=1e-2)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], ["0 tokens", "10*d_k"]),
        (["", "", ""], ["0 tokens", "10*d_k"]),
        (iter(()), ["0 tokens", "10*d_k"]),
        ("The tower is in Rome. " * 200, ["one string", "list of texts"]),
        (["a text", 5], ["number 1", "int", "not a string"]),
        (["a text", None], ["number 1", "NoneType", "not a string"]),
        ([["a", "text"]], ["number 0", "list", "not a string"]),
        ([b"bytes"], ["number 0", "bytes", "not a string"]),
        (b"bytes", ["bytes", "list of texts"]),
        (None, ["NoneType", "list of texts"]),
        (7, ["int", "list of texts"]),
        (["fine", "not \ud800 fine"], ["number 1", "Unicode"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_a_corpus_that_cannot_be_used(tiny, tiny_tokenizer, texts, words) -> None:
    with refused(tiny, StatisticsError, *words):
        collect(tiny, tiny_tokenizer, texts)


def test_a_text_that_breaks_off_later(tiny, tiny_tokenizer, tiny_texts) -> None:
    def broken() -> Iterator[str]:
        yield from tiny_texts * 2
        raise OSError("the disk is gone")

    with refused(tiny, OSError, "the disk is gone"):
        collect(tiny, tiny_tokenizer, broken())


def test_a_corpus_that_leaves_directions_out(tiny, tiny_tokenizer) -> None:
    words = ("layer 0", "no Cholesky factor", "more text", "shrinkage=")
    with refused(tiny, StatisticsError, *words):
        collect(tiny, tiny_tokenizer, ["Rome"] * 600)


@pytest.mark.parametrize("shrinkage", [-1e-3, float("nan"), float("inf"), "1e-3", None])
def test_a_wrong_shrinkage(tiny, tiny_tokenizer, tiny_texts, tiny_statistics, shrinkage) -> None:
    with refused(tiny, StatisticsError, "shrinkage", repr(shrinkage), ">= 0"):
        collect(tiny, tiny_tokenizer, tiny_texts, shrinkage=shrinkage)
    with refused(tiny, StatisticsError, "shrinkage", repr(shrinkage), ">= 0"):
        tiny_statistics.shrunk(shrinkage)


@pytest.mark.parametrize("field", ["max_tokens", "tokens", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -5, 2.5, "9"])
def test_a_wrong_number_of_tokens(tiny, tiny_tokenizer, tiny_texts, field, value) -> None:
    with refused(tiny, StatisticsError, field, repr(value), "whole number"):
        collect(tiny, tiny_tokenizer, tiny_texts, **{field: value})


@pytest.mark.parametrize("layers", [5, None, "0"], ids=repr)
def test_layers_that_are_no_list(tiny, tiny_tokenizer, tiny_texts, layers) -> None:
    with refused(tiny, ModelError, "layers", repr(layers), f"0..{LAYERS - 1}"):
        KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, layers)


# --- statistics: use and files ---


def test_statistics_of_another_model(tiny, make_gpt2, tiny_tokenizer, statistics_of) -> None:
    other = statistics_of(make_gpt2(seed=1))
    words = ("made from", "not from this model", "Collect them for this model")
    with refused(tiny, StatisticsError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=other)


def test_statistics_of_the_same_model_in_another_type(
    make_gpt2, tiny_tokenizer, tiny_statistics
) -> None:
    model = unusual(make_gpt2(dtype=torch.float64))
    with refused(model, StatisticsError, "not from this model"):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)


def test_statistics_without_a_layer(tiny, tiny_tokenizer, tiny_statistics) -> None:
    words = ("layer 2", "(1,)", "KeyStatistics.collect", "layers=")
    with refused(tiny, StatisticsError, *words):
        edit(
            tiny, tiny_tokenizer, [TOWER], ONE.replace(layers=(2,)),
            statistics=tiny_statistics.only(1),
        )  # fmt: skip
    with refused(tiny, StatisticsError, "layer 7"):
        tiny_statistics.C0(7)


@EVERY
def test_statistics_of_the_wrong_size(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    small = {layer: moment[:40, :40] for layer, moment in tiny_statistics.moments.items()}
    stats = replace(tiny_statistics, moments=small, _metrics={})
    with refused(tiny, StatisticsError, "40", "48", "layer", "collect"):
        edit(tiny, tiny_tokenizer, [TOWER], method, statistics=stats)


def test_statistics_that_are_not_positive_definite(tiny, tiny_tokenizer, tiny_statistics) -> None:
    bad = {layer: -moment for layer, moment in tiny_statistics.moments.items()}
    stats = replace(tiny_statistics, moments=bad, _metrics={})
    with refused(tiny, StatisticsError, "layer 1", "no Cholesky factor", "more text"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=stats)


@pytest.mark.parametrize("damage", ["nan", "asymmetric"])
def test_statistics_that_are_no_second_moment(
    tiny, tiny_tokenizer, tiny_statistics, damage
) -> None:
    moments = {layer: moment.clone() for layer, moment in tiny_statistics.moments.items()}
    moments[1][0, 1] = float("nan") if damage == "nan" else 1e6
    stats = replace(tiny_statistics, moments=moments, _metrics={})
    with refused(tiny, StatisticsError, "layer 1", "C0", "Collect"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=stats)


def test_shrinking_twice(tiny_statistics) -> None:
    with pytest.raises(StatisticsError, match=r"already shrunk by 0\.01"):
        tiny_statistics.shrunk(1e-3)


def test_joining_statistics_of_two_models(make_gpt2, tiny_statistics, statistics_of) -> None:
    with pytest.raises(StatisticsError, match="different models"):
        KeyStatistics.joined([tiny_statistics, statistics_of(make_gpt2(seed=1))])


def test_no_statistics_and_no_corpus(tiny, tiny_tokenizer, tmp_path, monkeypatch) -> None:
    """Offline, with an empty cache: the message says how to go on."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ("cache", "WikiText-103", "could not be loaded", "KeyStatistics.collect", "statistics=")
    with refused(tiny, StatisticsError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE)


def test_damaged_statistics_in_the_cache_are_made_again(
    tiny, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "unified_edit.statistics.cache.default_corpus", lambda model: iter(tiny_texts * 3)
    )
    first = edit(tiny, tiny_tokenizer, [TOWER], ONE).undo()
    (path,) = tmp_path.rglob("layer-1.safetensors")
    moment = KeyStatistics.load(path).C0(1)
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        second = edit(tiny, tiny_tokenizer, [TOWER], ONE)
    essential(caplog.text, (str(path), "not used"))
    assert second.id == first.id
    assert torch.equal(KeyStatistics.load(path).C0(1), moment)
    assert list(tmp_path.rglob("*partial*")) == []


@pytest.fixture
def statistics_file(tiny_statistics, tmp_path) -> Path:
    path = tmp_path / "statistics.safetensors"
    tiny_statistics.save(path)
    return path


@pytest.fixture(scope="module")
def ready_made(make_gpt2, tiny_tokenizer, tiny_statistics, tmp_path_factory) -> Path:
    """The file of an edit of `tiny` at one layer."""
    path = tmp_path_factory.mktemp("edits") / "edit.safetensors"
    model = make_gpt2()
    edit(model, tiny_tokenizer, FACTS, ONE, statistics=tiny_statistics, apply=False).save(path)
    return path


def edit_file(ready_made: Path, folder: Path) -> Path:
    path = folder / "copy.safetensors"
    path.write_bytes(ready_made.read_bytes())
    return path


LOADERS: dict[str, tuple[Callable[[Path], Any], type[UnifiedEditError]]] = {
    "statistics": (KeyStatistics.load, StatisticsFileError),
    "edit": (Edit.load, EditFileError),
}


@pytest.fixture(params=list(LOADERS))
def stored(request, statistics_file, ready_made, tmp_path):
    """(a file of the library's own, its loader, the error the loader raises)."""
    path = statistics_file if request.param == "statistics" else edit_file(ready_made, tmp_path)
    return path, *LOADERS[request.param]


def rejected(load: Callable[[Path], Any], path: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        load(path)
    assert caught.type is error
    essential(str(caught.value), (str(path), *words))


def test_a_file_that_is_not_there(stored, tmp_path) -> None:
    _, load, error = stored
    rejected(load, tmp_path / "none.safetensors", error, "no such file")
    rejected(load, tmp_path, error, "no such file")
    with pytest.raises(error, match="no such file"):
        load(str(tmp_path / "none.safetensors"))


def test_a_truncated_file(stored) -> None:
    path, load, error = stored
    whole = path.read_bytes()
    for kept in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:kept])
        rejected(load, path, error, "damaged, truncated", "again")
    path.write_bytes(whole + b"\0")
    rejected(load, path, error, "damaged", "again")


def test_one_changed_byte_anywhere(stored) -> None:
    path, load, error = stored
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # every byte of the beginning, and some of everything else
    places = {*range(64), *range(64, header, 61), *range(header, len(whole), len(whole) // 40)}
    for place in sorted(places):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        rejected(load, path, error, "again" if place >= header else "")
    path.write_bytes(whole)
    load(path)


def test_files_of_other_kinds(stored, statistics_file, ready_made, tmp_path) -> None:
    path, load, error = stored
    other = ready_made if load == KeyStatistics.load else statistics_file
    rejected(load, other, error, "needed here", "another file")
    foreign = tmp_path / "foreign.safetensors"
    files_module.save_file({"weight": torch.zeros(3, 3)}, foreign)
    rejected(load, foreign, error, "nothing", "another file")
    pickled = tmp_path / "pickled.pt"
    torch.save({"weight": torch.zeros(3, 3)}, pickled)
    rejected(load, pickled, error, "cannot be read as safetensors")
    text = tmp_path / "facts.json"
    text.write_text(json.dumps([{"prompt": "{} is in", "subject": "Rome", "target_new": "Oslo"}]))
    rejected(load, text, error, "cannot be read as safetensors")


def test_a_file_of_a_later_format(stored) -> None:
    path, load, error = stored
    kind = EDIT_FORMAT if load == Edit.load else statistics_module.FORMAT
    tensors, description = read_safetensors(path, kind, error)
    write_safetensors(path, tensors, kind[:-1] + "9", description)
    rejected(load, path, error, kind[:-1] + "9", kind)


def without(description: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy without the field found by going down `names`."""
    copied = json.loads(json.dumps(description))
    inside = copied
    for name in names[:-1]:
        inside = inside[name]
    del inside[names[-1]]
    return copied


def test_statistics_whose_description_is_malformed(statistics_file) -> None:
    tensors, good = read_safetensors(statistics_file, statistics_module.FORMAT, StatisticsFileError)

    def load_with(description: Any, tensors: dict[str, Any] = tensors) -> None:
        write_safetensors(statistics_file, tensors, statistics_module.FORMAT, description)
        rejected(KeyStatistics.load, statistics_file, StatisticsFileError, "again")

    for description in (
        {}, [], "text", None, 5,
        without(good, "source"),
        without(good, "agreement"),
        without(good, "source", "fingerprint"),
        without(good, "agreement", "1"),
        {**good, "source": {**good["source"], "unknown": 1}},
        {**good, "source": "text"},
        {**good, "agreement": []},
        {**good, "agreement": {"one": 0.1}},
    ):  # fmt: skip
        load_with(description)
    load_with(good, {})
    load_with(good, {**tensors, "other": torch.zeros(2)})
    load_with(good, {**tensors, "C0.1": tensors["C0.1"][:40]})
    load_with(good, {**tensors, "C0.1": tensors["C0.1"][0]})


def test_edits_whose_description_is_malformed(ready_made, tmp_path) -> None:
    path = edit_file(ready_made, tmp_path)
    tensors, good = read_safetensors(path, EDIT_FORMAT, EditFileError)

    def load_with(description: Any, tensors: dict[str, Any] = tensors) -> None:
        write_safetensors(path, tensors, EDIT_FORMAT, description)
        rejected(Edit.load, path, EditFileError, "again")

    diagnosis = good["diagnosis"]
    for description in (
        {}, [], "text", None, 5,
        *(without(good, name) for name in good),
        without(good, "method", "name"),
        without(good, "method", "contexts"),
        without(good, "provenance", "before", "1"),
        without(good, "provenance", "after", "1"),
        without(good, "provenance", "fingerprint"),
        without(good, "diagnosis", "1", "rank"),
        {**good, "facts": []},
        {**good, "facts": good["facts"][:1]},
        {**good, "facts": [{"prompt": "no subject", "subject": "x", "target_new": "y"}]},
        {**good, "method": {**good["method"], "ridge": -1.0}},
        {**good, "method": {**good["method"], "contexts": []}},
        {**good, "diagnosis": {}},
        {**good, "diagnosis": []},
        {**good, "diagnosis": {"2": diagnosis["1"]}},
        {**good, "diagnosis": {"one": diagnosis["1"]}},
        {**good, "provenance": []},
        {**good, "outcomes": [5]},
        {**good, "warnings": None},
    ):  # fmt: skip
        load_with(description)
    load_with(good, {})
    (left, right) = (name for name in sorted(tensors))
    load_with(good, {left: tensors[left]})
    load_with(good, {**tensors, left: tensors[left][:, :-1]})
    load_with(good, {**tensors, left: tensors[left].flatten()})
    load_with(good, {**tensors, right: tensors[right] * float("nan")})


def test_a_loaded_thing_does_not_follow_its_file(stored, tmp_path) -> None:
    """Tensors of safetensors may lie in the file itself; the library's do not."""
    path, load, _ = stored
    thing = load(path)
    copy = tmp_path / "kept.safetensors"
    thing.save(copy)
    with path.open("r+b") as file:  # the same file, not a new one under its name
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    again = tmp_path / "again.safetensors"
    thing.save(again)
    assert same_content(again, copy)


def test_an_edit_whose_matrices_were_exchanged(tiny, ready_made, tmp_path) -> None:
    """A file that is whole and well-formed, but does not do what it says."""
    path = edit_file(ready_made, tmp_path)
    tensors, description = read_safetensors(path, EDIT_FORMAT, EditFileError)
    name = sorted(tensors)[0]
    write_safetensors(path, {**tensors, name: tensors[name] * 1.5}, EDIT_FORMAT, description)
    with refused(tiny, EditFileError, "layer 1", "other weights", "Make the edit again"):
        Edit.load(path).apply(tiny)
    wide = {name: torch.cat([value, value]) for name, value in tensors.items() if "left" in name}
    write_safetensors(path, {**tensors, **wide}, EDIT_FORMAT, description)
    with refused(tiny, EditFileError, "layer 1", "Make the edit again"):
        Edit.load(path).apply(tiny)


# --- edits in other models, other states ---


def test_an_edit_in_another_model(make_gpt2, make_gptj, ready_made) -> None:
    words = ("made for", "not for this model", "same dtype")
    others = {
        "other weights": make_gpt2(seed=1),
        "another type": make_gpt2(dtype=torch.float64),
        "half precision": make_gpt2(dtype=torch.bfloat16),
        "more layers": make_gpt2(n_layer=LAYERS + 1),
        "wider": make_gpt2(n_embd=32),
        "another family": make_gptj(),
        "another activation": make_gpt2(activation_function="relu"),
    }
    one = make_gpt2()
    with torch.no_grad():
        one.transformer.h[2].attn.c_proj.bias[0] += 1e-4
    others["one weight elsewhere"] = one
    for model in others.values():
        with refused(unusual(model), EditFileError, *words):
            Edit.load(ready_made).apply(model)


def test_a_loaded_edit_without_a_model(ready_made, tmp_path) -> None:
    loaded = Edit.load(ready_made)
    for action in (
        loaded.undo,
        loaded.apply,
        lambda: loaded.applied().__enter__(),
        lambda: loaded.undone().__enter__(),
        lambda: loaded.to_peft(tmp_path / "adapter"),
    ):
        with pytest.raises(EditError, match=r"not bound to a model.*edit\.apply\(model\)"):
            action()
    assert not (tmp_path / "adapter").exists()
    assert not loaded.is_applied
    with pytest.raises(EditError, match=r"does not touch layer 5, only \(1,\)"):
        loaded.delta(5)


@EVERY
def test_applied_twice_and_undone_twice(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    made = edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics)
    with refused(tiny, EditError, "already applied", "undo it first"):
        made.apply()
    with refused(tiny, EditError, "already applied"):
        made.apply(tiny)
    made.undo()
    with refused(tiny, EditError, "not applied", "cannot be undone", "apply it first"):
        made.undo()
    made.apply().undo()


def test_a_loaded_copy_of_an_applied_edit(tiny, ready_made) -> None:
    Edit.load(ready_made).apply(tiny)
    with refused(tiny, EditError, "already applied"):
        Edit.load(ready_made).apply(tiny)


@pytest.mark.parametrize("change", ["one entry", "type", "shape", "loaded again"])
def test_a_weight_that_somebody_else_changed(
    tiny, make_gpt2, tiny_tokenizer, tiny_statistics, ready_made, change
) -> None:
    made = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    down = tiny.transformer.h[1].mlp.c_proj
    with torch.no_grad():
        if change == "one entry":
            down.weight[0, 0] += 1
        elif change == "type":
            tiny.double()
        elif change == "shape":
            down.weight = nn.Parameter(torch.zeros(24, 24))
        else:
            tiny.load_state_dict(make_gpt2().state_dict())
    words = ("transformer.h.1.mlp.c_proj.weight", "something else changed it", "Load the model")
    with refused(tiny, ModelChangedError, *words):
        made.undo()
    with refused(tiny, ModelChangedError, *words):
        Editor(tiny, tiny_tokenizer).reset()
    with refused(tiny, ModelChangedError, *words):
        edit(tiny, tiny_tokenizer, [VIENNA], ONE, statistics=tiny_statistics)
    with refused(tiny, ModelChangedError, *words):
        KeyStatistics.collect(tiny, tiny_tokenizer, ["a"], [0])
    with refused(tiny, ModelChangedError, *words), made.undone():
        pass


def test_a_change_inside_applied(tiny, tiny_tokenizer, tiny_statistics) -> None:
    """The change is seen on leaving, and kept."""
    made = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics, apply=False)
    weight = tiny.transformer.h[1].mlp.c_proj.weight
    with pytest.raises(ModelChangedError, match="something else changed it"), made.applied():
        with torch.no_grad():
            weight[0, 0] = 7.0
        kept = weight.detach().clone()
    assert torch.equal(weight, kept)


def test_a_model_that_is_gone(make_gpt2, tiny_tokenizer, tiny_statistics) -> None:
    model = make_gpt2()
    made = edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    ledger, gone = made.ledger, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "an edit keeps its model alive"
    assert not made.is_applied
    assert "not applied" in repr(made)
    for action in (made.undo, made.apply, lambda: made.applied().__enter__()):
        with pytest.raises(EditError, match=r"edit\.apply\(model\)"):
            action()
    with pytest.raises(EditError, match="no longer exists"):
        ledger.verify() or ledger.parts
    made.apply(make_gpt2())


# --- edits that would do nothing or too much ---


def test_an_edit_that_vanishes_in_rounding(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    """bfloat16 has 8 bits: a value moved by 1e-5 of its size changes no weight."""
    model = unusual(make_gpt2(dtype=torch.bfloat16))
    stats = statistics_of(model)
    faint = ONE.replace(clamp=1e-6)
    words = ("layer 1 unchanged", "lost in rounding", "bfloat16", "of it arrives", "wider type")
    with refused(model, EditError, *words):
        edit(model, tiny_tokenizer, [TOWER], faint, statistics=stats)
    made = edit(model, tiny_tokenizer, [TOWER], faint, statistics=stats, apply=False)
    with refused(model, EditError, *words):
        made.apply()
    with refused(model, EditError, *words), made.applied():
        pass


def test_a_ridge_so_large_that_nothing_changes(tiny, tiny_tokenizer, tiny_statistics) -> None:
    with refused(tiny, EditError, "unchanged", "lost in rounding", "float32"):
        edit(tiny, tiny_tokenizer, [TOWER], SPREAD.replace(ridge=1e14), statistics=tiny_statistics)


def test_a_fact_that_the_model_says_already(tiny, tiny_tokenizer, tiny_statistics) -> None:
    """With a loss that counts as small from the start, no value is moved."""
    for method in (ONE, SPREAD, IN_TURN):
        with refused(tiny, EditError, "changes nothing", "says the target already"):
            edit(
                tiny, tiny_tokenizer, [TOWER], method.replace(stop_loss=1e9),
                statistics=tiny_statistics,
            )  # fmt: skip


def test_an_edit_that_overflows(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    model = unusual(make_gpt2(dtype=torch.float16))
    stats = statistics_of(model)
    wild = ONE.replace(clamp=1e9, learning_rate=1e6)
    words = ("loss", repr(TOWER.text), "nan", "step 1", "learning_rate")
    with refused(model, EditError, *words):
        edit(model, tiny_tokenizer, [TOWER], wild, statistics=stats)
    values = optimise_values(model, tiny_tokenizer, [TOWER], ONE)
    values = replace(values, delta=1e6 * values.delta)
    with refused(model, EditError, "layer 1", "overflows torch.float16", "float32"):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=stats, values=values)


def test_a_loss_that_is_not_finite(tiny, tiny_tokenizer, tiny_statistics, monkeypatch) -> None:
    original = values_module._losses

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        total, current = original(*args, **kwargs)
        return total * float("nan"), current

    monkeypatch.setattr(values_module, "_losses", spoiled)
    words = ("loss", repr(TOWER.text), "'Rome'", "nan", "step 0", "learning_rate")
    with refused(tiny, EditError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)


# --- failures in the middle ---

FAILURES = [RuntimeError("out of memory"), KeyboardInterrupt("stopped")]
FAILING = pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)


@EVERY
@pytest.mark.parametrize(
    ("place", "name", "at"),
    [
        (editor_module, "compute_keys", 1),
        (values_module, "_prepare", 1),
        (values_module, "_losses", 3),
        (editor_module, "solve", 2),
        (editor_module, "_make_edit", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_while_an_edit_is_made(
    tiny, tiny_tokenizer, tiny_statistics, monkeypatch, method, place, name, at
) -> None:
    """Another edit is in force and stays in force; a second attempt succeeds."""
    edit(tiny, tiny_tokenizer, [OSLO], ONE, statistics=tiny_statistics)
    failure = KeyboardInterrupt("stopped")
    monkeypatch.setattr(place, name, raising(failure, at, getattr(place, name)))
    with refused(tiny, KeyboardInterrupt, "stopped"):
        edit(tiny, tiny_tokenizer, [TOWER, VIENNA], method, statistics=tiny_statistics)
    monkeypatch.undo()
    made = edit(tiny, tiny_tokenizer, [TOWER, VIENNA], method, statistics=tiny_statistics)
    assert made.is_applied


@FAILING
def test_a_failure_in_the_middle_of_the_layers(
    tiny, tiny_tokenizer, tiny_statistics, monkeypatch, failure
) -> None:
    weights = {layer: tiny.transformer.h[layer].mlp.c_proj.weight for layer in range(3)}
    base = {layer: weight.detach().clone() for layer, weight in weights.items()}
    seen = []

    def solve(*args: Any, **kwargs: Any) -> Any:
        seen.append([not torch.equal(weights[layer], base[layer]) for layer in range(3)])
        if len(seen) == 3:
            raise failure
        return editor_solve(*args, **kwargs)

    editor_solve = editor_module.solve
    monkeypatch.setattr(editor_module, "solve", solve)
    with refused(tiny, type(failure)):
        edit(tiny, tiny_tokenizer, [TOWER, VIENNA], SPREAD, statistics=tiny_statistics)
    # the model was partly edited when it happened, or the test says nothing
    assert seen == [[False] * 3, [True, False, False], [True, True, False]]


@EVERY
def test_a_failure_at_any_block(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    """Somebody's hook raises at the n-th forward of the last block, whatever runs it."""
    calls, fail_at = 0, 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise RuntimeError("from a hook")

    tiny.transformer.h[LAYERS - 1].register_forward_hook(hook)
    edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics).undo()
    calls = 0  # the second time, what is kept between edits is there already
    edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics).undo()
    total, reached = calls, 0
    assert total >= 5
    for chosen in range(1, total + 1, max(1, total // 6)):
        calls, fail_at = 0, chosen
        with refused(tiny, RuntimeError, "from a hook"):
            edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics)
        reached += 1
    assert reached >= 5


class FailAt(TorchFunctionMode):
    """Raises at torch call number `at`, unless something is being put back at that moment."""

    #: Their frames are on the stack only while a context is entered or left.
    CLEANUP = frozenset({"quiet", "captured", "stubbed", "state_kept", "rollback", "base_state"})

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls, self.raised = at, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if not self.raised and self.calls >= self.at and not self._putting_back(func):
            self.raised = True
            raise Interrupted("at some call")
        return func(*args, **(kwargs or {}))

    def _putting_back(self, func: Any) -> bool:
        frame: Any = sys._getframe(2)
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        if "probe" in names and func is torch.Tensor.copy_:
            return True
        # torch's own contexts (no_grad, enable_grad) are left through these
        if getattr(func, "__name__", "") in ("_set_grad_enabled", "_enter_inference_mode"):
            return True
        return bool(names & self.CLEANUP)


@EVERY
def test_an_interrupt_at_any_torch_call(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    edit(tiny, tiny_tokenizer, [OSLO], ONE, statistics=tiny_statistics)

    def run(at: int) -> FailAt:
        with FailAt(at) as mode:
            edit(tiny, tiny_tokenizer, [TOWER, VIENNA], method, statistics=tiny_statistics)
        return mode

    before = snapshot(tiny)
    for _ in range(2):  # the second time, what is kept between edits is there already
        total = run(sys.maxsize).calls
        Editor(tiny, tiny_tokenizer).active[-1].undo()
    assert_unchanged(tiny, before)
    for at in range(1, total - 10, total // 10):
        with refused(tiny, Interrupted, "at some call"):
            run(at)


@pytest.mark.parametrize("action", ["apply", "undo"])
def test_an_interrupt_while_weights_are_written(
    tiny, tiny_tokenizer, tiny_statistics, action
) -> None:
    """All layers change or none, whichever torch call fails."""
    first = edit(tiny, tiny_tokenizer, [OSLO], ONE, statistics=tiny_statistics)
    made = edit(tiny, tiny_tokenizer, [TOWER], SPREAD, statistics=tiny_statistics, apply=False)
    if action == "undo":
        made.apply()
    act, back = (made.apply, made.undo) if action == "apply" else (made.undo, made.apply)
    with FailAt(sys.maxsize) as mode:
        act()
    back()
    # the writing itself is among the last calls
    for at in {*range(1, mode.calls, mode.calls // 12), *range(mode.calls - 12, mode.calls + 1)}:
        before = snapshot(tiny)
        with FailAt(at) as failing, pytest.raises(Interrupted):
            act()
            raise Interrupted("done")
        if failing.raised and made.is_applied == (action == "undo"):
            assert_unchanged(tiny, before)
        else:  # everything was written before a check, or a clean-up, could fail
            back()
            assert_unchanged(tiny, before)
    first.undo()


@FAILING
def test_an_interrupted_applied(tiny, tiny_tokenizer, tiny_statistics, failure) -> None:
    made = edit(tiny, tiny_tokenizer, [TOWER], SPREAD, statistics=tiny_statistics, apply=False)
    other = edit(tiny, tiny_tokenizer, [VIENNA], ONE, statistics=tiny_statistics)
    with refused(tiny, type(failure), str(failure)), made.applied():
        assert made.is_applied and other.is_applied
        raise failure
    with refused(tiny, type(failure), str(failure)), other.undone(), made.applied():
        assert made.is_applied and not other.is_applied
        raise failure
    with refused(tiny, type(failure), str(failure)), made.applied():
        other.undo()  # what is done inside is put back as well
        raise failure


@FAILING
@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_while_statistics_are_collected(
    tiny, tiny_tokenizer, tiny_texts, tiny_statistics, monkeypatch, failure, at
) -> None:
    """On an edited model: its edits are taken out meanwhile, and must be back."""
    edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    original = statistics_module._add_group
    monkeypatch.setattr(statistics_module, "_add_group", raising(failure, at, original))
    with refused(tiny, type(failure), str(failure)):
        collect(tiny, tiny_tokenizer, tiny_texts * 3)
    monkeypatch.undo()
    captured_now = raising(failure, at, statistics_module.captured)
    monkeypatch.setattr(statistics_module, "captured", captured_now)
    with refused(tiny, type(failure), str(failure)):
        collect(tiny, tiny_tokenizer, tiny_texts * 3)


@FAILING
def test_a_failure_while_prefixes_are_sampled(
    tiny, tiny_tokenizer, tiny_statistics, monkeypatch, failure
) -> None:
    edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    monkeypatch.setattr("unified_edit.model.ledger.sample_prefixes", raising(failure, 1, print))
    with refused(tiny, type(failure), str(failure)):
        edit(tiny, tiny_tokenizer, [VIENNA], SPREAD, statistics=tiny_statistics, seed=3)


# --- checkpoints ---


@pytest.fixture
def interrupted(tiny, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch):
    """(checkpoint, texts) of a collection that was stopped after two groups of texts."""
    monkeypatch.setattr(statistics_module, "CHECKPOINT_TOKENS", 1)
    texts = [f"{text} {number}" for number in range(4) for text in tiny_texts]
    path = tmp_path / "partial.safetensors"
    with monkeypatch.context() as patch:
        stop = raising(Interrupted("stopped"), 3, statistics_module._add_group)
        patch.setattr(statistics_module, "_add_group", stop)
        with refused(tiny, Interrupted):
            collect(tiny, tiny_tokenizer, texts, checkpoint=path)
    assert path.exists()
    return path, texts


def test_a_checkpoint_is_gone_on_from(tiny, tiny_tokenizer, interrupted) -> None:
    path, texts = interrupted
    resumed = collect(tiny, tiny_tokenizer, texts, checkpoint=path)
    assert not path.exists()
    whole = collect(tiny, tiny_tokenizer, texts)
    assert resumed.source == whole.source
    assert torch.equal(resumed.C0(1), whole.C0(1))


def test_a_checkpoint_of_something_else(tiny, make_gpt2, tiny_tokenizer, interrupted) -> None:
    path, texts = interrupted
    kept = path.read_bytes()

    def resume(model: nn.Module, texts: list[str], layers: list[int], **more: Any) -> None:
        KeyStatistics.collect(model, tiny_tokenizer, texts, layers, checkpoint=path, **more)

    words = (str(path), "delete it")
    other = make_gpt2(seed=1)
    with refused(other, StatisticsError, "another run", *words):
        resume(other, texts, [0, 1])
    with refused(tiny, StatisticsError, "another run", *words):
        resume(tiny, texts, [1])
    with refused(tiny, StatisticsError, "another run", *words):
        resume(tiny, texts, [0, 1], max_tokens=5)
    with refused(tiny, StatisticsError, "other texts", *words):
        resume(tiny, ["changed", *texts[1:]], [0, 1])
    with refused(tiny, StatisticsError, "other texts", *words):
        resume(tiny, texts[:300], [0, 1])  # fewer than were summed
    with refused(tiny, StatisticsError, "other texts", *words):
        resume(tiny, ["changed", *texts[1:]], [0, 1], tokens=300)
    assert path.read_bytes() == kept


def test_a_damaged_checkpoint(tiny, tiny_tokenizer, interrupted, statistics_file) -> None:
    path, texts = interrupted
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], ["damaged, truncated"]),
        (b"", ["damaged, truncated"]),
        (whole[:-5] + b"12345", ["checksum"]),
        (statistics_file.read_bytes(), ["needed here"]),
    ):
        path.write_bytes(content)
        with refused(tiny, StatisticsFileError, str(path), *words):
            collect(tiny, tiny_tokenizer, texts, checkpoint=path)


# --- files that cannot be written ---

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def partly_written(tensors: Any, path: Any, **_: Any) -> None:
    Path(path).write_bytes(b"half a fi")
    raise FULL


def partly_written_natively(tensors: Any, path: Any, **_: Any) -> None:
    """safetensors reports a full disk as an error of its own."""
    from safetensors import SafetensorError

    Path(path).write_bytes(b"half a fi")
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


WRITE_FAILURES = {
    "os.replace": lambda patch: patch.setattr("os.replace", raising(FULL, 1, os.replace)),
    "save_file": lambda patch: patch.setattr(files_module, "save_file", partly_written),
    "safetensors": lambda patch: patch.setattr(files_module, "save_file", partly_written_natively),
}


def same_content(first: Path, second: Path) -> bool:
    """safetensors writes the metadata in any order, so bytes may differ."""
    both = []
    for path in (first, second):
        with files_module.safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name).tolist() for name in handle.keys()}  # noqa: SIM118
            both.append((handle.metadata(), tensors))
    return both[0] == both[1]


@pytest.mark.parametrize("broken", WRITE_FAILURES)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_file_that_cannot_be_written(stored, tmp_path, monkeypatch, broken, existing) -> None:
    path, load, _ = stored
    thing = load(path)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "file.safetensors"
    if existing:
        target.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        WRITE_FAILURES[broken](patch)
        with pytest.raises(OSError, match="No space left on device"):
            thing.save(target)
    assert [item.name for item in folder.iterdir()] == ([target.name] if existing else [])
    if existing:
        assert target.read_bytes() == path.read_bytes()  # byte for byte: it was not touched
    thing.save(target)
    assert same_content(target, path)


def test_a_folder_in_the_way(stored, tmp_path) -> None:
    path, load, _ = stored
    thing = load(path)
    folder = tmp_path / "out" / "file.safetensors"
    folder.mkdir(parents=True)
    with pytest.raises(OSError):
        thing.save(folder)
    assert [item.name for item in folder.parent.iterdir()] == ["file.safetensors"]
    assert list(folder.iterdir()) == []
    with pytest.raises(OSError):
        thing.save(path / "inside a file")


@pytest.mark.parametrize("broken", WRITE_FAILURES)
def test_a_full_disk_in_the_cache(
    tiny, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch, broken
) -> None:
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "unified_edit.statistics.cache.default_corpus", lambda model: iter(tiny_texts * 3)
    )
    WRITE_FAILURES[broken](monkeypatch)
    with refused(tiny, OSError, "No space left on device"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_adapter_that_cannot_be_written(
    tiny, tiny_tokenizer, tiny_statistics, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("peft")
    import unified_edit.editing.peft_export as peft_module

    made = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with monkeypatch.context() as patch:
        patch.setattr(peft_module, "save_file", partly_written)
        with refused(tiny, OSError, "No space left"):
            made.to_peft(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    with refused(tiny, EditError, "not empty", "new folder"):
        made.to_peft(tmp_path / "used")
    with refused(tiny, EditError, "new folder"):
        made.to_peft(tmp_path / "used" / "note")
    assert (tmp_path / "used" / "note").read_text() == "mine"


# --- nothing left behind by what works ---


@EVERY
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_success_leaves_nothing_but_the_weights(
    make_gpt2, make_gptj, tiny_tokenizer, statistics_of, family, method
) -> None:
    """The snapshot is no blunt tool: it sees an edit, and nothing after its undo."""
    model = unusual(make_gpt2() if family == "gpt2" else make_gptj())
    before = snapshot(model)
    stats = statistics_of(model)
    assert_unchanged(model, before)
    made = edit(model, tiny_tokenizer, FACTS, method, statistics=stats)
    after = snapshot(model)
    changed = {name for name, value in before.items() if after[name] != value}
    assert changed == {"weights", "active edits"}
    parts = anatomy(model)
    touched = {parts.weight_name(layer) for layer in method.layers}
    assert touched == {
        name for name, value in before["weights"].items() if after["weights"][name] != value
    }
    made.undo()
    assert_unchanged(model, before)
    with made.applied():
        pass
    optimise_values(model, tiny_tokenizer, FACTS, method)
    assert_unchanged(model, before)
    check_finite(parts)


def flip_training(model: nn.Module) -> None:
    model.transformer.h[1].attn.train(not model.transformer.h[1].attn.training)


def flip_gradients(model: nn.Module) -> None:
    model.transformer.ln_f.weight.requires_grad_(False)


def leave_a_hook(model: nn.Module) -> None:
    model.transformer.h[2].mlp.register_forward_pre_hook(lambda *_: None)


def leave_a_forward(model: nn.Module) -> None:
    model.transformer.h[2].forward = model.transformer.h[2].forward


def remove_a_forward(model: nn.Module) -> None:
    del model.transformer.h[0].forward


def change_one_bit(model: nn.Module) -> None:
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nextafter(
            model.transformer.ln_f.weight[3], torch.tensor(9.0)
        )


def negative_zero(model: nn.Module) -> None:
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = -0.0


def exchange_a_weight(model: nn.Module) -> None:
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight.detach().clone())


def leave_a_gradient(model: nn.Module) -> None:
    model.transformer.ln_f.weight.grad = torch.zeros(24)


def draw_a_number(model: nn.Module) -> None:
    torch.rand(1)


@pytest.mark.parametrize(
    "change",
    [
        flip_training, flip_gradients, leave_a_hook, leave_a_forward, remove_a_forward,
        change_one_bit, negative_zero, exchange_a_weight, leave_a_gradient, draw_a_number,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_the_snapshot_sees(tiny, change) -> None:
    """All of the above says nothing if the comparison is blind."""
    with torch.no_grad():
        tiny.transformer.ln_f.bias[3] = 0.0
    before = snapshot(tiny)
    assert_unchanged(tiny, before)
    change(tiny)
    with pytest.raises(AssertionError, match="changed: "):
        assert_unchanged(tiny, before)


def test_places_are_single_tokens(tiny_tokenizer) -> None:
    """Some tests above count on it."""
    assert all(len(tiny_tokenizer(f" {place}")["input_ids"]) <= 2 for place in PLACES)
