"""How values are optimised together: lists of tokens without padding, no waiting, little memory.

That the values are right is the matter of `test_values.py` and `test_families.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import reference
import torch
from recipe import TINY_FACTS, relative, tiny_method
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gptj.modeling_gptj import GPTJAttention

import unified_edit as ue
from unified_edit.editing import descent, optimise_values, sizes, values
from unified_edit.editing.kept_prefixes import kept_prefixes
from unified_edit.editing.placing import Placing
from unified_edit.errors import EditError, ModelError
from unified_edit.model import Encoder, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.packed import Packing, gives_tuples, spread, taken

PREFIXES = ("", "The old market. ", "I walked from the river to the tower. ")


@pytest.fixture
def tiny_rows(tiny_tokenizer):
    """The rows of each fact, that of the KL term last."""
    rows = Encoder(tiny_tokenizer).fact_rows(TINY_FACTS, PREFIXES)
    return [[*behind, kl] for behind, kl in zip(rows.behind, rows.kl, strict=True)]


@pytest.fixture(params=["gpt2", "gptj"])
def tiny_either(request, make_gpt2, make_gptj, monkeypatch):
    """(family, a tiny model of it in float64)."""
    monkeypatch.setattr(GPTJAttention, "_attn", reference.attention_in_float64)
    make = {"gpt2": make_gpt2, "gptj": make_gptj}[request.param]
    return request.param, make(2, torch.float64)


# --- lists of tokens ------------------------------------------------------------------------------


def test_what_is_taken_and_spread_again() -> None:
    places = torch.tensor([5, 0, 3])
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(taken(rows, places), rows[places])
    back = spread(taken(rows, places), places, 6)
    assert torch.equal(back[places], rows[places])
    assert not back[[1, 2, 4]].any()
    assert torch.autograd.gradcheck(lambda x: taken(x, places), rows)
    assert torch.autograd.gradcheck(lambda x: spread(x, places, 9), rows[:3].detach().clone()
                                    .requires_grad_())  # fmt: skip


def test_a_packing_leaves_out_what_is_no_token() -> None:
    padded = torch.arange(24.0).reshape(2, 4, 3)
    packing = Packing(2, 4, torch.tensor([0, 1, 2, 4]))
    assert torch.equal(packing.packed(padded)[0], padded.flatten(0, 1)[[0, 1, 2, 4]])
    again = packing.padded(packing.packed(padded))
    assert torch.equal(again[0, :3], padded[0, :3])
    assert torch.equal(again[1, 0], padded[1, 0])
    assert not again[0, 3].any()
    assert not again[1, 1:].any()


def test_only_tokens_that_are_needed_are_run(tiny, tiny_tokenizer, tiny_rows) -> None:
    """Above the edited block an MLP sees each token once, the last one only those that are read."""
    parts, seen = anatomy(tiny), Counter[int]()
    method = tiny_method(ue.EMMET, "gpt2", layers=(0,), steps=3, stop_loss=1e-9)
    method = method.replace(contexts=ue.Contexts(prefixes=PREFIXES[1:]))
    handles = [
        parts.down(layer).register_forward_hook(
            lambda _module, args, _output, layer=layer: seen.update(
                {layer: args[0].numel() // args[0].shape[-1]}
            )
        )
        for layer in range(1, parts.n_layers)
    ]
    optimise_values(tiny, tiny_tokenizer, TINY_FACTS, method)
    with_all = dict(seen)
    for handle in handles:
        handle.remove()
    flat = [row for of_value in tiny_rows for row in of_value]
    needed = sum(len(row.ids) - row.subject if row.target else 1 for row in flat)
    read = sum(max(1, len(row.target)) for row in flat)
    last = parts.n_layers - 1
    for layer in range(1, last):
        # in each of three steps, and once in the prefixes: at most each of their tokens
        before = with_all[layer] - 3 * needed
        assert 0 < before <= sum(row.subject for row in flat)
    assert with_all[last] == 3 * read


def test_what_is_kept_of_prefixes_is_what_each_alone_leaves(
    tiny_either, tiny_tokenizer, tiny_rows
) -> None:
    _, model = tiny_either
    parts = anatomy(model)
    with quiet(model), torch.no_grad():
        found: Any = kept_prefixes(parts, tiny_rows, len(PREFIXES), gives_tuples(parts))
        flat = [row.ids[: row.subject] for of_value in tiny_rows for row in of_value]
        longest = max(map(len, flat))
        assert any(not ids for ids in flat)
        for number, ids in enumerate(flat):
            alone = model(torch.tensor([ids]), use_cache=True).past_key_values if ids else None
            for layer in range(parts.n_layers):
                both = found.layers[layer].keys[number], found.layers[layer].values[number]
                for name, one in zip(("keys", "values"), both, strict=True):
                    assert one.shape[1] == longest
                    assert not one[:, : longest - len(ids)].any()
                    if alone is not None:
                        wanted = getattr(alone.layers[layer], name)[0]
                        assert relative(one[:, longest - len(ids) :], wanted) <= 1e-12


def test_some_of_a_batch_stand_where_they_would_alone(tiny_rows) -> None:
    whole = Placing.of(tiny_rows, len(PREFIXES))
    kept, rows, tokens = whole.only([0, 2])
    alone = Placing.of([tiny_rows[0], tiny_rows[2]], len(PREFIXES))
    for name in ("owner", "suffix", "lengths", "positions", "subject", "read", "first", "places"):
        assert torch.equal(getattr(kept, name), getattr(alone, name)), name
    for one, other in zip(kept.slots, alone.slots, strict=True):
        assert torch.equal(one, other)
    assert len(rows) == len(alone.owner)
    assert len(tokens) == int(alone.lengths.sum())


# --- no waiting -----------------------------------------------------------------------------------


class _Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: numbers and sizes that only it knows."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
    #: What reads a tensor back without any operation of its own.
    READS = ("tolist", "numpy", "cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self.inside = 0, False
        for name in self.READS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, usual: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += self.inside
            return usual(tensor, *args, **kwargs)

        return read

    def __enter__(self) -> _Waits:
        self.inside = True
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.inside = False
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in self.NAMES
        if name in ("index", "index_put", "index_put_"):  # of a mask the size is not known
            indices = [one for one in args[1] if one is not None]
            self.count += any(one.dtype in (torch.bool, torch.uint8) for one in indices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cutoff", [0.0, -3.0, 0.999999])
def test_no_step_waits_for_the_device(tiny_either, tiny_tokenizer, cutoff, monkeypatch) -> None:
    """Steps between two looks: as many waits for two of them as for six."""
    family, model = tiny_either
    monkeypatch.setattr(descent, "steps_between_looks", lambda _device: 50)
    waits = []
    for steps in (2, 6):
        method = tiny_method(ue.EMMET, family, steps=steps, stop_loss=1e-9, prob_cutoff=cutoff)
        optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
        with monkeypatch.context() as patch, _Waits(patch) as counted:
            optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
        waits.append(counted.count)
    assert waits[0] == waits[1] > 0


def test_reading_back_is_counted(monkeypatch) -> None:
    ten = torch.arange(10)
    for waits in (
        lambda: ten.tolist(),
        lambda: ten[ten > 3],
        lambda: ten[3].item(),
        lambda: ten.cpu(),
    ):
        with monkeypatch.context() as patch, _Waits(patch) as counted:
            waits()
            assert counted.count >= 1
    with monkeypatch.context() as patch, _Waits(patch) as counted:
        ten[torch.tensor([1, 2])] * 2
        assert counted.count == 0


@pytest.mark.parametrize("every", [2, 3, 50])
def test_a_late_look_changes_nothing(tiny_either, tiny_tokenizer, monkeypatch, every) -> None:
    family, model = tiny_either
    method = tiny_method(ue.EMMET, family)
    at_once = optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
    assert len({len(losses) for losses in at_once.losses}) > 1
    monkeypatch.setattr(descent, "steps_between_looks", lambda _device: every)
    late = optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
    for one, other in zip(late.losses, at_once.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert relative(late.delta, at_once.delta) <= 1e-9


def test_a_loss_that_is_not_finite_is_told_by_its_step(tiny, tiny_tokenizer, monkeypatch) -> None:
    """Three steps are made before it is looked at; the first one that went wrong is named."""
    monkeypatch.setattr(descent, "steps_between_looks", lambda _device: 3)
    usual, calls = descent.logits_behind, Counter[str]()

    def logits_behind(*args: Any) -> torch.Tensor:
        calls["steps"] += 1
        logits = usual(*args)
        logits[0] = torch.nan if calls["steps"] == 2 else logits[0]
        return logits

    monkeypatch.setattr(descent, "logits_behind", logits_behind)
    method = tiny_method(ue.EMMET, "gpt2", stop_loss=1e-9)
    with pytest.raises(EditError, match=r"the loss of .* is nan at step 1; check"):
        optimise_values(tiny, tiny_tokenizer, TINY_FACTS, method)
    assert calls["steps"] == 3


# --- memory ---------------------------------------------------------------------------------------


def _short_of(memory: int, monkeypatch) -> list[int]:
    """Let batches of more than so many values run out of memory; the sizes that were tried."""
    tried: list[int] = []
    usual = values.descend

    def descend(parts: Any, batch: Any, method: Any, facts: Any, bar: Any) -> Any:
        tried.append(len(facts))
        if len(facts) > memory:
            bar.update(1)  # a value was found before memory ran out
            raise torch.OutOfMemoryError("planted")
        return usual(parts, batch, method, facts, bar)

    monkeypatch.setattr(values, "descend", descend)
    return tried


def test_out_of_memory_halves_the_batch(tiny, tiny_tokenizer, monkeypatch, caplog) -> None:
    method = tiny_method(ue.EMMET, "gpt2")
    wanted = optimise_values(tiny, tiny_tokenizer, TINY_FACTS, method)
    tried, bars, usual = _short_of(1, monkeypatch), [], values.progress
    monkeypatch.setenv("UNIFIED_EDIT_PROGRESS", "1")
    monkeypatch.setattr(values, "progress", lambda *told: bars.append(usual(*told)) or bars[-1])
    found = optimise_values(tiny, tiny_tokenizer, TINY_FACTS, method)
    assert tried == [3, 2, 1, 1, 1]
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3)]
    assert relative(found.delta, wanted.delta) <= 1e-4
    assert [len(one) for one in found.losses] == [len(one) for one in wanted.losses]
    assert "out of memory with 3 at a time; going on with halves" in caplog.text


def test_one_value_that_does_not_fit_is_an_error(tiny, tiny_tokenizer, monkeypatch) -> None:
    tried, before = _short_of(0, monkeypatch), [vars(one).get("forward") for one in tiny.modules()]
    with pytest.raises(ModelError, match=r"even for one at a time.*planted"):
        optimise_values(tiny, tiny_tokenizer, TINY_FACTS, tiny_method(ue.EMMET, "gpt2"))
    assert tried == [3, 2, 1]
    assert [vars(one).get("forward") for one in tiny.modules()] == before


def test_batches_are_as_large_as_memory_lets_them(tiny, tiny_rows, monkeypatch) -> None:
    parts, texts = anatomy(tiny), tiny_rows * 4
    assert len(sizes.batches_that_fit(parts, texts, 0)) == 1
    monkeypatch.setattr(sizes, "CPU_TOKENS", 40)
    few = sizes.batches_that_fit(parts, texts, 0)
    monkeypatch.setattr(sizes, "free_bytes", lambda _device: 1.0)
    single = sizes.batches_that_fit(parts, texts, 0)
    assert 1 < len(few) < len(single) == len(texts)
    for batches in (few, single):
        assert sorted(index for batch in batches for index in batch) == list(range(len(texts)))
