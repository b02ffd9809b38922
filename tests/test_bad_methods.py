"""Methods and values that do not fit: a clear error, and an unchanged model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_refusals import (
    EVERY,
    IN_TURN,
    ONE,
    SPREAD,
    TOWER,
    VIENNA,
    by_name,
    essential,
    refused,
)
from fixtures_tiny import LAYERS

from unified_edit.editing import (
    EMMET,
    MEMIT,
    METHODS,
    Contexts,
    Edit,
    Method,
    edit,
    optimise_values,
)
from unified_edit.errors import FactError, MethodError, ModelError, StatisticsError
from unified_edit.facts import Fact
from unified_edit.statistics import KeyStatistics

# --- methods ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ridge": -1.0}, ["ridge", "-1.0", ">= 0"]),
        ({"ridge": float("nan")}, ["ridge", "nan"]),
        ({"ridge": float("inf")}, ["ridge", "inf"]),
        ({"ridge": "1"}, ["ridge", "'1'", "number"]),
        ({"steps": 0}, ["steps", "0", "whole number of at least 1"]),
        ({"steps": 2.5}, ["steps", "2.5", "whole number"]),
        ({"steps": True}, ["steps", "True"]),
        ({"clamp": 0}, ["clamp", "0", "> 0"]),
        ({"clamp": "x"}, ["clamp", "'x'", "number"]),
        ({"learning_rate": -0.5}, ["learning_rate", "-0.5", "> 0"]),
        ({"learning_rate": "x"}, ["learning_rate", "'x'"]),
        ({"kl_weight": -1}, ["kl_weight", ">= 0"]),
        ({"kl_weight": None}, ["kl_weight", "None"]),
        ({"weight_decay": float("nan")}, ["weight_decay", "nan"]),
        ({"stop_loss": "x"}, ["stop_loss", "'x'", "number"]),
        ({"ridge_from": 0}, ["ridge_from", "0", "of at least 1"]),
        ({"site": "attention"}, ["site", "'attention'", "block", "mlp"]),
        ({"key_mean": "median"}, ["key_mean", "'median'", "typed", "plain"]),
        ({"distribution": "even"}, ["distribution", "'even'", "memit", "pmet"]),
        ({"infeasible": "ignore"}, ["infeasible", "'ignore'", "least_violation"]),
        ({"layers": 1.5}, ["layer", "1.5", "whole number"]),
        ({"layers": "1"}, ["layer", "'1'", "whole number"]),
        ({"layers": (1.0,)}, ["layer", "1.0", "whole number"]),
        ({"layers": ("1",)}, ["layer", "'1'", "whole number"]),
        ({"layers": (True,)}, ["layer", "True", "whole number"]),
        ({"contexts": None}, ["contexts", "Contexts"]),
        ({"layer": (1,)}, ["no field 'layer'", "Method"]),
        ({"rigde": 0.0}, ["no field 'rigde'", "Method"]),
    ],
    ids=by_name,
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
        ({"lengths": "10"}, ["length", "'10'"]),
        ({"lengths": (0,)}, ["length", "0", "at least 1"]),
        ({"lengths": ("5",)}, ["length", "'5'", "whole number"]),
        ({"per_start": 0}, ["per_start", "0"]),
        ({"per_start": 1.5}, ["per_start", "1.5"]),
    ],
    ids=by_name,
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


@pytest.mark.parametrize("layers", [(LAYERS,), (0, LAYERS), (-1,), (1, 1), (2, 0), ()], ids=repr)
def test_layers_that_do_not_fit(tiny, tiny_tokenizer, tiny_statistics, layers) -> None:
    words = ("layers", repr(layers), f"0..{LAYERS - 1}", "ascending")
    with refused(tiny, ModelError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE.replace(layers=layers), statistics=tiny_statistics)
    with refused(tiny, ModelError, *words):
        KeyStatistics.collect(tiny, tiny_tokenizer, ["a"], layers)


@pytest.mark.parametrize("layers", [(1.0,), ("1",), (True,)], ids=repr)
def test_layers_that_are_no_numbers(tiny, tiny_tokenizer, layers) -> None:
    with refused(tiny, ModelError, "a layer", repr(layers[0]), "whole number"):
        KeyStatistics.collect(tiny, tiny_tokenizer, ["a"], layers)


@pytest.mark.parametrize("method", ["EMMET", 1, EMMET.to_dict(), Method], ids=lambda m: str(m)[:9])
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
