"""Models that cannot be edited, and such that can in spite of appearances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_refusals import ONE, TOWER, VIENNA, refused
from fixtures_tiny import assert_unchanged, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from unified_edit.editing import Edit, Editor, edit, optimise_values
from unified_edit.errors import ModelError, StatisticsError
from unified_edit.statistics import KeyStatistics

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
    import peft

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(model, config)


def peft_injected(model: nn.Module) -> nn.Module:
    import peft

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
        ["'gpt_neox'", "not known", "gpt2, gptj", "missing", "families.py", "down-projection"],
    ),
    "OPT": (
        lambda _: other_family("OPT", ffn_dim=32, word_embed_proj_dim=16),
        ["'opt'", "not known", "gpt2, gptj", "missing"],
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


def test_the_advice_about_adapters_works(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    """What the message asks for depends on what the object at hand can do; both must help."""
    wrapped = peft_wrapped(make_gpt2())
    with refused(wrapped, ModelError, "merge them first (model = model.merge_and_unload())"):
        Editor(wrapped, tiny_tokenizer)
    # the model inside carries the adapters too, but cannot merge them itself
    inside = wrapped.base_model.model
    assert not hasattr(inside, "merge_and_unload")
    words = ("merge_and_unload() or unload() on the PeftModel it was made with", "load the model")
    with refused(inside, ModelError, *words):
        Editor(inside, tiny_tokenizer)
    for model in (wrapped.merge_and_unload(), inside):
        statistics = statistics_of(model)
        made = edit(model, tiny_tokenizer, [TOWER], ONE, statistics=statistics)
        assert made.is_applied
        made.undo()


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
    with refused(tiny, ModelError, "transformer.wpe.weight", "24 NaN", "load it again"):
        KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, [0, 1])


def test_statistics_of_a_model_whose_type_overflows(make_gpt2, tiny_tokenizer, tiny_texts) -> None:
    """Every weight is finite, but what they give is not."""
    model = make_gpt2(dtype=torch.float16)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(0).add_(6e4)
    with refused(model, StatisticsError, "layer 0", "not finite", "float32 or bfloat16"):
        KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, [0, 1])


def test_a_family_that_puts_a_norm_behind_the_mlp(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    """The probe, not the name, decides: here an update does not reach the block's output as is."""
    model = make_gpt2()
    model.transformer.h[1].mlp.dropout = nn.LayerNorm(24)
    stats = statistics_of(model)
    words = ("probe", "transformer.h.1.mlp.c_proj.weight", "missed it", "orientation", "norm")
    with refused(model, ModelError, *words):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=stats)
    # nor does it reach the MLP's, inside of which this norm stands
    with refused(model, ModelError, *words):
        edit(model, tiny_tokenizer, [TOWER], ONE.replace(site="mlp"), statistics=stats)


def flattening(model: nn.Module, layer: int) -> nn.Module:
    """Block `layer` hands its MLP all tokens of a batch as one list, as OPT does."""
    mlp = model.transformer.h[layer].mlp
    own = mlp.forward
    mlp.forward = lambda hidden: own(hidden.reshape(-1, 24)).reshape(hidden.shape)
    return model


def test_activations_without_a_place_for_the_text(
    make_gpt2, tiny_tokenizer, tiny_texts, tiny_statistics
) -> None:
    """Which rows belong to which text cannot be told there: a wrong row would be read silently."""
    model = flattening(make_gpt2(), 1)
    words = ("the input of Conv1D", "48)", "rows x tokens x width", "cannot be read there")
    with refused(model, ModelError, *words):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with refused(model, ModelError, *words):
        KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)


# --- hooks and settings of others ---


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("mlp", "mlp (GPT2MLP)"),
        ("mlp.c_proj", "mlp.c_proj (Conv1D)"),
        ("", "the block (GPT2Block)"),
    ],
    ids=["mlp", "projection", "block"],
)
def test_a_hook_that_changes_what_passes_is_named(
    make_gpt2, tiny_tokenizer, tiny_statistics, where, name
) -> None:
    model = make_gpt2()

    def halve(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    handle = model.transformer.h[1].get_submodule(where).register_forward_hook(halve)
    words = ("probe failed", "Hooks of another program", name, "of block 1", "remove it")
    with refused(model, ModelError, *words):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    handle.remove()
    assert edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).is_applied


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_in_less_than_float32(
    make_gpt2, tiny_tokenizer, tiny_statistics, precision
) -> None:
    """Allowed by the user, so that the probe must bear it; what is wrong is found all the same."""
    model = make_gpt2()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).is_applied
        assert torch.get_float32_matmul_precision() == precision
        # as rounded as such products are on a machine that has them
        rounding = model.transformer.h[2].mlp.register_forward_hook(
            lambda _module, _args, output: output.bfloat16().float()
        )
        two = ONE.replace(layers=(2,))
        assert edit(model, tiny_tokenizer, [VIENNA], two, statistics=tiny_statistics).is_applied
        rounding.remove()
        wrong = make_gpt2()
        wrong.transformer.h[1].mlp.register_forward_hook(
            lambda _module, _args, output: 1.1 * output
        )
        with refused(wrong, ModelError, "probe failed", "limit 3e-02"):
            edit(wrong, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    finally:
        torch.set_float32_matmul_precision(before)


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
