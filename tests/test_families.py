"""What must hold for every family in `unified_edit.model.families`, on tiny random models.

A new family needs a row there and a configuration here; what further names one in this file is
particular to it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import reference
import torch
from fixtures_tiny import (
    END,
    InFloat64,
    assert_unchanged,
    byte_level_tokenizer,
    own_seed,
    snapshot,
)
from tokenizers import processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import unified_edit as ue
from unified_edit.editing import Contexts, read_values
from unified_edit.errors import MethodError, ModelError
from unified_edit.measuring import subject_sigma
from unified_edit.model import FAMILIES, Encoder, anatomy, beginnings, likelihoods
from unified_edit.model.families import REFUSED

LLAMA: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 48, "max_position_embeddings": 128,
}  # fmt: skip
#: `config.model_type`, and what is particular -> a configuration of four layers whose keys are
#: longer than its states. The vocabulary is that of the fixtures' tokenizer; windows are shorter
#: than prompts.
TINY: dict[str, dict[str, Any]] = {
    "falcon": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "ffn_hidden_size": 48,
        "max_position_embeddings": 128,
    },
    "falcon with alibi": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "ffn_hidden_size": 48,
        "max_position_embeddings": 128, "alibi": True, "parallel_attn": False, "bias": True,
        "multi_query": False,
    },
    "falcon with two norms": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "ffn_hidden_size": 48,
        "max_position_embeddings": 128, "new_decoder_architecture": True, "num_kv_heads": 1,
    },
    "gemma": LLAMA | {"head_dim": 8},
    "gemma2": LLAMA | {
        "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0,
    },
    "gemma3_text": LLAMA | {
        "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"n_embd": 24, "n_layer": 4, "n_head": 2, "n_inner": 48, "n_positions": 128},
    "gpt_neo": {
        "hidden_size": 24, "num_layers": 4, "num_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 128, "attention_types": [[["global", "local"], 2]],
        "window_size": 6,
    },
    "gpt_neox": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 128,
    },
    "gpt_neox in sequence": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 128, "use_parallel_residual": False,
    },
    "gptj": {
        "n_embd": 24, "n_layer": 4, "n_head": 2, "n_inner": 56, "n_positions": 128, "rotary_dim": 4,
        "tie_word_embeddings": False,
    },
    "granite": LLAMA | {
        "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 6},
    "olmo": LLAMA | {"clip_qkv": 3.0},
    "olmo2": LLAMA,
    "opt": {
        "hidden_size": 24, "word_embed_proj_dim": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "ffn_dim": 48, "max_position_embeddings": 128,
    },
    "opt with narrow embeddings": {
        "hidden_size": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "ffn_dim": 48, "max_position_embeddings": 128,
    },
    "phi": LLAMA | {"num_key_value_heads": 2},
    "phi3": LLAMA | {"sliding_window": 6},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": LLAMA | {"head_dim": 8},
    "stablelm": LLAMA | {
        "use_qkv_bias": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
}  # fmt: skip

#: The models are float64 throughout (`InFloat64`), and what is compared is summed in another order.
SAME = 1e-8

FACTS = [
    ue.Fact("The {} is in the city of", "old tower", "Rome", "Paris"),
    ue.Fact("I walked from the {} to the", "river", "market", "bridge"),
    ue.Fact("{} was born in", "Lisbon", "Oslo and Rome", "Dublin"),
]
#: One bare context: the key that an edit is made for is then the very key that the model meets.
METHOD = ue.EMMET.replace(layers=(1,), steps=6, contexts=Contexts(prefixes=["It is said. "]))
#: Prefixes of two lengths, so that rows are padded.
SAMPLED = Contexts(starts=("The", "I walked from the old"), lengths=(7,))


def tiny_model(name: str, vocabulary: int) -> Any:
    """A model of a configuration in float64, with weights large enough for every path to matter."""
    config = AutoConfig.for_model(
        name.split()[0],
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.3,
        **TINY[name],
    )
    with own_seed(0):
        made = AutoModelForCausalLM.from_config(config)
        for parameter in made.parameters():
            if (
                parameter.ndim == 1
            ):  # biases of zero, norms of one: they hide where they are forgotten
                parameter.data += torch.randn_like(parameter) * 0.3
    return made.double().eval()


@pytest.fixture(scope="module", params=sorted(TINY))
def model(request: Any, tiny_tokenizer: Any) -> Any:
    return tiny_model(request.param, len(tiny_tokenizer))


@pytest.fixture(scope="module")
def beginning(tiny_texts: list[str]) -> Any:
    """A tokenizer that puts a token in front of every text, as Llama's and Gemma's do."""
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    return tokenizer


@pytest.fixture
def as_it_is() -> None:
    """A test that asks for this runs models without `InFloat64`."""


@pytest.fixture(autouse=True)
def in_float64(request: Any) -> Iterator[None]:
    with contextlib.nullcontext() if "as_it_is" in request.fixturenames else InFloat64():
        yield


def test_every_family_has_a_tiny_model() -> None:
    assert {name.split()[0] for name in TINY} == set(FAMILIES)
    assert not set(REFUSED) & set(FAMILIES)


def test_an_update_moves_what_it_is_to_move(model: Any) -> None:
    parts = anatomy(model)
    assert parts.n_layers == 4
    for layer in range(parts.n_layers):
        weight = parts.weight(layer)
        assert weight.d_in > weight.d_out == parts.width
        assert parts.probe(weight, parts.mlp(layer)) <= SAME
        behind_a_norm = pytest.raises(ModelError, match="place of a norm")
        with behind_a_norm if parts.norm(layer) is not None else contextlib.nullcontext():
            assert parts.probe(weight, parts.blocks[layer]) <= SAME
        assert parts.attention(layer) is not parts.mlp(layer)


def test_a_batch_gives_what_each_row_gives(model: Any, tiny_tokenizer: Any, beginning: Any) -> None:
    parts = anatomy(model)
    for tokenizer in (tiny_tokenizer, beginning):
        rows = Encoder(tokenizer, parts).fact_rows(FACTS, ["", "I walked. "])
        each = [row for behind in rows.behind for row in behind]
        together = likelihoods(parts, each)
        for row, found in zip(each, together, strict=True):
            ids = torch.tensor([[*row.ids, row.target[-1]]])
            with torch.no_grad():
                logits = model(ids).logits[0, -len(row.target) - 1 : -1].log_softmax(-1)
            wanted = logits.gather(1, torch.tensor(row.target)[:, None]).mean()
            assert found.logp == pytest.approx(wanted.item(), rel=SAME)


def test_what_rows_share_is_run_once(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginnings and rests of many lengths, within a window of attention and beyond it."""
    parts = anatomy(model)
    behind = ["", " and back", " to the museum and then to", " by the old tower near"]
    starts = ["I walked from the river", "The old bridge in the city of Rome is"]
    pairs = [(s + b, t) for s in starts for b in behind for t in ("Oslo and Rome", "Oslo", "Paris")]
    rows = Encoder(tiny_tokenizer, parts).continuations([*pairs, ("Dublin", "Athens")])
    fed: list[int] = []
    body = model.base_model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        fed.append(int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum()))
        return body(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(beginnings, "CPU_FORWARD", 0)
        patch.setattr(beginnings, "SHARE_SAVED", 0)
        patch.setattr(model.base_model, "forward", counting)
        found = likelihoods(parts, rows)
    hosts = set(beginnings.hosts([row.ids for row in rows]).values())
    once = beginnings.shared(hosts)
    assert max(len(one.rows) for one in once) > 1 and sum(fed) < sum(map(len, hosts))
    assert sum(fed) == sum(len(one.stem) for one in once) + sum(
        len(row) - len(one.stem) for one in once for row in one.rows
    )
    for row, one in zip(rows, found, strict=True):
        ids = torch.tensor([[*row.ids, row.target[-1]]])
        with torch.no_grad():
            logits = model(ids).logits[0, -len(row.target) - 1 : -1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(row.target)[:, None])
        assert one.logp == pytest.approx(wanted.mean().item(), rel=SAME)
        assert one.greedy == bool((logits.argmax(-1) == torch.tensor(row.target)).all())


#: bfloat16 in every family; float16 in some that differ in their norms and attention.
HALVES = [(name, torch.bfloat16) for name in sorted(TINY)]
HALVES += [(name, torch.float16) for name in ("gpt2", "gptj", "gemma3_text", "llama", "opt")]


@pytest.mark.parametrize(("name", "dtype"), HALVES, ids=str)
def test_half_precision_rounds_once(
    name: str, dtype: torch.dtype, tiny_tokenizer: Any, tiny_texts: list[str], as_it_is: None
) -> None:
    """Delta is computed in float64 and added there; only the sum has the weight's type."""
    model = tiny_model(name, len(tiny_tokenizer)).to(dtype)
    statistics = ue.KeyStatistics.collect(
        model, tiny_tokenizer, tiny_texts[:40], [1], shrinkage=1e-2
    )
    weight, before = anatomy(model).weight(1), snapshot(model)
    base = weight.parameter.detach().double()
    method = METHOD.replace(steps=2)
    made = ue.edit(model, tiny_tokenizer, FACTS[:2], method, statistics=statistics)
    delta = made.delta(1)
    assert delta.dtype == torch.float64 and made.outcomes[0].after > 0
    exact = base + weight.to_stored(delta)
    assert torch.equal(weight.parameter, exact.to(dtype))
    lost = weight.to_stored(exact.to(dtype).double() - exact) @ made.keys[weight.name]
    wanted = float(lost.norm() / (delta @ made.keys[weight.name]).norm())
    assert made.rounding == {1: pytest.approx(wanted, rel=1e-9)}
    # each entry is off by at most half a unit in its last place
    most = exact.abs().max() * torch.finfo(dtype).eps / 2 * made.keys[weight.name].abs().sum(0)
    assert 0 < float(lost.abs().max()) <= float(most.max())
    made.undo()
    assert_unchanged(model, before)


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_the_value_is_written_and_taken_out(
    model: Any, tiny_tokenizer: Any, tiny_texts: list[str], site: str
) -> None:
    parts, before = anatomy(model), snapshot(model)
    statistics = ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)
    bare = METHOD.replace(site=site, key_mean=lambda count: [1.0, *[0.0] * (count - 1)])
    values = ue.optimise_values(model, tiny_tokenizer, FACTS, bare)
    # behind a norm there is one place for a value: in front of it
    assert values.site == (site if parts.norm(1) is None else "mlp")
    stood = read_values(parts, tiny_tokenizer, FACTS, 1, values.site)
    edit = ue.edit(model, tiny_tokenizer, FACTS, bare, statistics=statistics, values=values)
    stands = read_values(parts, tiny_tokenizer, FACTS, 1, values.site)
    assert (stands - stood - values.delta).norm() <= SAME * values.delta.norm()
    assert sum(one.after for one in edit.outcomes) > sum(one.before for one in edit.outcomes)
    edit.undo()
    assert torch.equal(read_values(parts, tiny_tokenizer, FACTS, 1, values.site), stood)
    assert_unchanged(model, before)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("start", ["no start", "a start"])
@pytest.mark.parametrize("method", [ue.EMMET, ue.ROME], ids=lambda method: method.name)
def test_a_whole_edit_is_that_of_the_reference(
    model: Any,
    tiny_tokenizer: Any,
    beginning: Any,
    tiny_texts: list[str],
    method: ue.Method,
    start: str,
) -> None:
    """Prefixes, keys, values and Delta, against one fact at a time over full sequences.

    EMMET writes a batch whose rows are padded, ROME one fact at the MLP's output.
    """
    tokenizer = beginning if start == "a start" else tiny_tokenizer
    facts = FACTS[1:] if method is ue.EMMET else FACTS[:1]
    method = method.replace(layers=(1,), steps=4, contexts=SAMPLED).resolve(model)
    statistics = ue.KeyStatistics.collect(model, tokenizer, tiny_texts[:60], [1], shrinkage=1e-2)
    made = ue.edit(model, tokenizer, facts, method, statistics=statistics, apply=False)
    # what Granite's block adds is multiplied, so an update does that much more there
    gain = getattr(model.config, "residual_multiplier", 1.0) if method.site.name == "block" else 1.0
    wanted = reference.edit_delta_single_layer(
        model, tokenizer, [(fact.prompt, fact.subject, fact.target_new) for fact in facts], 1,
        statistics.C0(1), lambda C0, K, R: reference.emmet_delta(C0, K, R / gain),
        [prefix + "{}" for prefix in made.provenance.prefixes], mean=method.key_mean.name,
        site=method.site.name, steps=4, clamp=method.clamp,
    )  # fmt: skip
    assert relative(made.keys[made.names[1]], wanted.K) <= SAME
    assert relative(made.delta(1), wanted.delta) <= SAME


def restored_literally(
    model: Any, whole: list[int], count: int, subject: list[int], noise: Tensor, kind: str,
    token: int, layers: list[int],
) -> float:  # fmt: skip
    """The probability of what stands in `whole` behind `count` tokens, in one restored run."""
    modules = {
        "state": lambda layer: reference.block_of(model, layer),
        "mlp": lambda layer: reference.mlp_of(model, layer),
        "attention": lambda layer: anatomy(model).attention(layer),
    }
    clean: dict[int, Tensor] = {}

    def keep(_module: Any, _args: Any, output: Any, layer: int) -> None:
        clean[layer] = reference.hidden_of(output)[0].clone()

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in layers:
            module = modules[kind](layer)
            stack.enter_context(module.register_forward_hook(partial(keep, layer=layer)))
        reference.logits_of(model, whole)

    def put_back(_module: Any, _args: Any, output: Any, layer: int) -> Any:
        hidden = reference.hidden_of(output).clone()
        hidden[0, token] = clean[layer][token]
        if isinstance(output, tuple):
            return hidden, *output[1:]
        return hidden.view(output.shape)

    def corrupt(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, subject] += noise
        return output

    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(model.get_input_embeddings().register_forward_hook(corrupt))
        for layer in layers:
            module = modules[kind](layer)
            stack.enter_context(module.register_forward_hook(partial(put_back, layer=layer)))
        logits = reference.logits_of(model, whole).log_softmax(-1)
    logs = [float(logits[place - 1, whole[place]]) for place in range(count, len(whole))]
    return math.exp(sum(logs) / len(logs))


def test_a_trace_is_that_of_one_restoration_at_a_time(model: Any, beginning: Any) -> None:
    """At tokens further apart than windows of attention are wide; each at half of the layers."""
    fact = ue.Fact("The {} is in the city of", "old tower", "Rome", "Oslo and Rome")
    own = {"state": 1, "mlp": 3, "attention": 3}
    trace = ue.locate(model, beginning, [fact], samples=2, windows=own, sigma=0.5)
    one = trace.facts[0]
    whole, count = reference.ids_with_target(beginning, fact.text, fact.target_true)
    subject = list(range(one.subject[0], one.subject[1] + 1))
    assert one.subject == (2, 3) and count > 8
    tokens = dict(enumerate((2, 3, 5, count - 1)))
    for kind, (place, token), half in itertools.product(own, tokens.items(), range(2)):
        layer = 2 * half + place % 2
        near = [other for other in range(4) if abs(other - layer) <= own[kind] // 2]
        wanted = restored_literally(
            model, whole, count, subject, one.noise[half], kind, token, near
        )
        assert float(one.restored[kind][half, token, layer]) == pytest.approx(wanted, rel=SAME)


def test_noise_is_measured_where_it_is_added(model: Any, tiny_tokenizer: Any) -> None:
    """In what the embedding module gives: Gemma's multiplies by the root of the width."""
    ids = tiny_tokenizer("The old tower is")["input_ids"]
    subject = ids[1 : 1 + len(tiny_tokenizer(" old tower")["input_ids"])]
    given = reference.module_at_work(model, model.get_input_embeddings(), ids)[1]
    wanted = float(given[1 : 1 + len(subject)].std())
    fact = ue.Fact("The {} is", "old tower", "Rome")
    assert subject_sigma(model, tiny_tokenizer, fact) == pytest.approx(wanted, rel=1e-12)
    table = model.get_input_embeddings().weight[subject].std().item()
    scaled = model.config.model_type.startswith("gemma")
    assert wanted / table == pytest.approx(math.sqrt(24) if scaled else 1.0)


# --- what is particular ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mistral", "opt", "phi3"])
def test_padding_with_the_models_own_attention(
    name: str, dtype: torch.dtype, tiny_tokenizer: Any, as_it_is: None
) -> None:
    """Eager attention takes the softmax in float32, also of what is masked in float64."""
    model = tiny_model(name, len(tiny_tokenizer)).to(dtype)
    model.set_attn_implementation("eager")
    parts = anatomy(model)
    rows = Encoder(tiny_tokenizer, parts).fact_rows(FACTS, ["", "I walked by the old tower. "])
    each = [row for behind in rows.behind for row in behind]
    for row, found in zip(each, likelihoods(parts, each), strict=True):
        assert found.logp == pytest.approx(likelihoods(parts, [row])[0].logp, rel=1e-4)
    method = METHOD.replace(steps=3)
    together = ue.optimise_values(model, tiny_tokenizer, FACTS, method)
    for column, fact in enumerate(FACTS):
        alone = ue.optimise_values(model, tiny_tokenizer, fact, method)
        assert together.losses[column] == pytest.approx(alone.losses[0], rel=1e-3)


def test_several_layers_add_up_where_a_block_is_multiplied(
    tiny_tokenizer: Any, tiny_texts: list[str]
) -> None:
    model, layers = tiny_model("granite", len(tiny_tokenizer)), (0, 1, 2)
    statistics = ue.KeyStatistics.collect(
        model, tiny_tokenizer, tiny_texts[:60], layers, shrinkage=1e-2
    )
    method = ue.MEMIT.replace(layers=layers, ridge=0.5, steps=4, contexts=SAMPLED).resolve(model)
    made = ue.edit(model, tiny_tokenizer, FACTS[:2], method, statistics=statistics, apply=False)
    wanted = reference.edit_deltas_multi_layer(
        model, tiny_tokenizer, [(one.prompt, one.subject, one.target_new) for one in FACTS[:2]],
        layers, {layer: statistics.C0(layer) for layer in layers},
        lambda C0, K, R: reference.memit_delta(C0, K, R / model.config.residual_multiplier, 0.5),
        [prefix + "{}" for prefix in made.provenance.prefixes], steps=4, clamp=method.clamp,
    )  # fmt: skip
    for layer in layers:
        assert relative(made.delta(layer), wanted[layer].delta) <= SAME


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2"])
def test_several_layers_behind_norms_are_refused(name: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(name, len(tiny_tokenizer))
    method = ue.MEMIT.replace(layers=(0, 1), ridge=1.0)
    with pytest.raises(MethodError, match="a norm stands between") as caught:
        method.resolve(model)
    assert "layers=(1,)" in str(caught.value)
    assert method.replace(layers=(1,)).resolve(model).site.name == "mlp"


@pytest.mark.parametrize("method", [ue.EMMET, ue.ROME], ids=lambda method: method.name)
def test_a_norm_behind_the_whole_block_is_refused(method: ue.Method, tiny_tokenizer: Any) -> None:
    """OPT 350M: wherever the value is set, what reaches the next block is not what was added."""
    config = AutoConfig.for_model(
        "opt", vocab_size=len(tiny_tokenizer), do_layer_norm_before=False, **TINY["opt"]
    )
    with own_seed(0):
        model = AutoModelForCausalLM.from_config(config).double().eval()
    method = method.replace(layers=(1,))
    with pytest.raises(ModelError, match="probe failed") as caught:
        ue.edit(model, tiny_tokenizer, FACTS[:1], method)
    assert "OPTDecoderLayer" in str(caught.value)
    assert "norm" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("mixtral", {"num_local_experts": 2}, "mixture of experts"),
        ("qwen2_moe", {"num_experts": 2, "moe_intermediate_size": 8}, "mixture of experts"),
        ("mamba", {}, "state-space"),
    ],
)
def test_what_cannot_be_edited_says_why(name: str, fields: dict[str, Any], words: str) -> None:
    size = LLAMA if name != "mamba" else {"hidden_size": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model(name, vocab_size=50, **{**size, **fields})
    with pytest.raises(ModelError, match=words) as caught:
        anatomy(AutoModelForCausalLM.from_config(config))
    assert repr(name) in str(caught.value)
    assert "Edit a" in str(caught.value)
