"""Edits that fail, in other models and states, or midway: the model is as it was before.

A failure may come from anywhere: a key pressed, a full memory, somebody's hook. Whatever it is, no
weight, flag, hook or edit may be left behind.
"""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from fixtures_refusals import (
    EVERY,
    FACTS,
    IN_TURN,
    ONE,
    OSLO,
    SPREAD,
    TOWER,
    VIENNA,
    Interrupted,
    collect,
    raising,
    refused,
)
from fixtures_tiny import LAYERS, assert_unchanged, snapshot, unusual
from torch import nn
from torch.overrides import TorchFunctionMode

from unified_edit import objective
from unified_edit.editing import Edit, Editor, edit, optimise_values
from unified_edit.errors import EditError, EditFileError, ModelChangedError
from unified_edit.model import anatomy
from unified_edit.model.packed import logits_behind
from unified_edit.statistics import KeyStatistics

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
    with pytest.raises(EditError, match=r"does not touch 5, only layers \(1,\)"):
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
    with refused(model, EditError, "h.1.mlp.c_proj.weight", "overflows torch.float16", "float32"):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=stats, values=values)


def test_a_loss_that_is_not_finite(tiny, tiny_tokenizer, tiny_statistics, monkeypatch) -> None:
    place = "unified_edit.editing.descent.logits_behind"
    monkeypatch.setattr(place, lambda *args: float("nan") * logits_behind(*args))
    words = ("loss", repr(TOWER.text), "'Rome'", "nan", "step 0", "learning_rate")
    with refused(tiny, EditError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)


# --- failures in the middle ---

FAILURES = [RuntimeError("a kernel failed"), KeyboardInterrupt("stopped")]
FAILING = pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)


@EVERY
@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("unified_edit.editing.layer_loop.keys_of", 1),
        ("unified_edit.editing.prepared.captured", 1),
        ("unified_edit.editing.descent.logits_behind", 3),
        ("unified_edit.editing.layer_loop.solve", 2),
        ("unified_edit.editing.layer_loop.likelihoods", 1),
        ("unified_edit.model.ledger.tensor_hash", 2),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else "",
)
def test_a_failure_while_an_edit_is_made(
    tiny, tiny_tokenizer, tiny_statistics, monkeypatch, method, where, at
) -> None:
    """Another edit is in force and stays in force; a second attempt succeeds."""
    edit(tiny, tiny_tokenizer, [OSLO], ONE, statistics=tiny_statistics)
    if where.endswith(".solve") and method is ONE:
        at = 1  # one layer, one batch: it is solved once
    module, _, name = where.rpartition(".")
    original = getattr(import_module(module), name)
    monkeypatch.setattr(where, raising(KeyboardInterrupt("stopped"), at, original))
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
        return objective.solve(*args, **kwargs)

    monkeypatch.setattr("unified_edit.editing.layer_loop.solve", solve)
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
    CLEANUP = frozenset(
        {"quiet", "captured", "stubbed", "trying", "state_kept", "rollback", "base_state"}
    )

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
    run = tiny.base_model.forward
    monkeypatch.setattr(tiny.base_model, "forward", raising(failure, at, run))
    with refused(tiny, type(failure), str(failure)):
        collect(tiny, tiny_tokenizer, tiny_texts * 3)
    monkeypatch.undo()
    # while the hooks are put in: those that were put in already must be gone
    put_in = raising(failure, at, nn.Module.register_forward_pre_hook)
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", put_in)
    with refused(tiny, type(failure), str(failure)):
        collect(tiny, tiny_tokenizer, tiny_texts * 3)


@FAILING
def test_a_failure_while_prefixes_are_sampled(
    tiny, tiny_tokenizer, tiny_statistics, monkeypatch, failure
) -> None:
    edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    monkeypatch.setattr("unified_edit.editing.editor.sample_prefixes", raising(failure, 1, print))
    with refused(tiny, type(failure), str(failure)):
        edit(tiny, tiny_tokenizer, [VIENNA], SPREAD, statistics=tiny_statistics, seed=3)


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
    touched = {parts.weight(layer).name for layer in method.layers}
    assert touched == {
        name for name, value in before["weights"].items() if after["weights"][name] != value
    }
    made.undo()
    assert_unchanged(model, before)
    with made.applied():
        pass
    optimise_values(model, tiny_tokenizer, FACTS, method)
    assert_unchanged(model, before)


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
