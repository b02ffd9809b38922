"""Rows that begin alike, batches cut where they cost least, and memory that runs out on the way."""

from __future__ import annotations

import importlib
import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers.activations import NewGELUActivation

from unified_edit.errors import ModelError
from unified_edit.model import Encoder, anatomy, beginnings, likelihoods, next_token
from unified_edit.model.beginnings import even_batches, hosts, shared
from unified_edit.model.hooks import one_kernel

Ids = tuple[int, ...]


# --- which beginnings ------------------------------------------------------------------------

ROWS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=7
)


def fewest(rows: list[Ids], least: int) -> int:
    """Tokens to be run for the best of all ways to give rows one beginning or none."""
    best = sum(map(len, rows))
    options: list[list[Ids]] = []
    for row in rows:
        stems = {row[:n] for n in range(1, len(row))}
        options.append([(), *(s for s in stems if sum(r[: len(s)] == s for r in rows) > 1)])
    for chosen in itertools.product(*options):
        groups = {stem: chosen.count(stem) for stem in chosen if stem}
        if any((n - 1) * len(stem) < least for stem, n in groups.items()):
            continue
        rests = sum(len(r) - len(s) for r, s in zip(rows, chosen, strict=True))
        best = min(best, rests + sum(map(len, groups)))
    return best


@given(ROWS)
def test_of_all_ways_to_share_the_shortest_is_taken(rows: list[Ids]) -> None:
    apart = sorted(set(hosts(rows).values()))[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "LEAST_SAVED", 2)
        found = shared(apart, 0)
    assert sorted(row for one in found for row in one.rows) == apart
    for one in found:
        assert all(row[: len(one.stem)] == one.stem and row != one.stem for row in one.rows)
        assert one.stem or len(one.rows) == 1
    run = sum(len(one.stem) + sum(len(r) - len(one.stem) for r in one.rows) for one in found)
    assert run == fewest(apart, 2)


def test_little_is_not_worth_a_forward_of_its_own() -> None:
    rows = [(1, 2, 3, 4, 5, n) for n in range(5)]
    assert [one.stem for one in shared(rows)] == [(1, 2, 3, 4, 5)]
    assert {one.stem for one in shared(rows, 21)} == {()}
    assert {one.stem for one in shared(rows[:2])} == {()}
    assert shared([]) == []


def test_rows_that_branch_off_at_every_token() -> None:
    rows = [(*[1] * n, 2) for n in range(900)]
    assert sorted(row for one in shared(rows) for row in one.rows) == sorted(rows)


# --- which batches ---------------------------------------------------------------------------


def cheapest(lengths: list[int], tokens: int, forward: int) -> int:
    """Cost of the cheapest way to cut sorted rows into batches."""
    ordered = sorted(lengths, reverse=True)
    best = [0] * (len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        best[end] = min(
            best[begin] + forward + ordered[begin] * (end - begin)
            for begin in range(end)
            if ordered[begin] * (end - begin) <= tokens or end - begin == 1
        )
    return best[-1]


@given(
    st.lists(st.integers(1, 30), max_size=40), st.integers(1, 200), st.sampled_from([0, 5, 20, 500])
)
def test_batches_are_cut_where_they_cost_least(
    lengths: list[int], tokens: int, forward: int
) -> None:
    made = list(even_batches(lengths, tokens, forward))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    sizes = [(max(lengths[i] for i in batch), len(batch)) for batch in made]
    assert all(longest * count <= tokens or count == 1 for longest, count in sizes)
    cost = sum(longest * count + forward for longest, count in sizes)
    # only full batches and those that end with a length are looked at, which costs little
    assert cost <= cheapest(lengths, tokens, forward) * 1.1 + forward


# --- the model -------------------------------------------------------------------------------

STARTS = ("I walked from the old museum to the", "The harbour is in the city of")
PAIRS = [
    (f"{start} {place}{more}", target)
    for start in STARTS
    for place in ("Rome", "old bridge", "river")
    for more in ("", " and back")
    for target in ("Oslo and Rome", "Paris")
]


@pytest.fixture
def model(make_gpt2: Any) -> Any:
    """Without the hooks of others that the shared tiny model carries."""
    return make_gpt2()


@pytest.fixture
def asked(model: Any, tiny_tokenizer: Any) -> list[Any]:
    return Encoder(tiny_tokenizer, anatomy(model)).continuations(PAIRS)


def share_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all beginnings be worth a forward; some of one length and a little more share it."""
    monkeypatch.setattr(beginnings, "CPU_FORWARD", 2)
    monkeypatch.setattr(beginnings, "SHARE_SAVED", 0)


def forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(rows, tokens, whether behind something kept) of each forward of the body from now on."""
    seen: list[tuple[int, int, bool]] = []
    usual = model.base_model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        rows, tokens = kwargs["input_ids"].shape
        seen.append((rows, tokens, kwargs["attention_mask"].shape[1] > tokens))
        return usual(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", noting)
    return seen


def test_beginnings_change_nothing_but_the_work(model, asked, monkeypatch) -> None:
    parts = anatomy(model)
    alone = [likelihoods(parts, [one])[0] for one in asked]
    seen = forwards(model, monkeypatch)
    whole = likelihoods(parts, asked)
    assert not any(behind for *_, behind in seen)
    before = sum(rows * tokens for rows, tokens, _ in seen)
    seen.clear()
    share_all(monkeypatch)
    once = likelihoods(parts, asked)
    assert any(behind for *_, behind in seen)
    assert sum(rows * tokens for rows, tokens, _ in seen) < 0.7 * before
    # attention sums over places in another order
    for found in (whole, once):
        for one, wanted in zip(found, alone, strict=True):
            assert one.logp == pytest.approx(wanted.logp, rel=1e-6)
            assert one.greedy == wanted.greedy


def test_the_next_token_of_rows_that_share(model, tiny_tokenizer, monkeypatch) -> None:
    parts = anatomy(model)
    rows = Encoder(tiny_tokenizer, parts).prompts([*STARTS, *(prompt for prompt, _ in PAIRS)])
    alone = [next_token(parts, [row])[0] for row in rows]
    share_all(monkeypatch)
    for found, wanted in zip(next_token(parts, rows), alone, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=0)


def test_where_hooks_stand_texts_are_run_whole(model, asked, monkeypatch) -> None:
    share_all(monkeypatch)
    seen = forwards(model, monkeypatch)
    lengths = []
    handle = model.transformer.h[1].mlp.register_forward_hook(
        lambda _module, args, _output: lengths.append(args[0].shape[1])
    )
    try:
        likelihoods(anatomy(model), asked)
    finally:
        handle.remove()
    assert seen and not any(behind for *_, behind in seen)


@pytest.mark.parametrize("sharing", [True, False])
def test_memory_that_runs_out_costs_time_only(
    model, asked, monkeypatch, caplog, sharing: bool
) -> None:
    parts = anatomy(model)
    if sharing:
        share_all(monkeypatch)
    wanted = likelihoods(parts, asked)
    usual = model.base_model.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return usual(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", small)
    with caplog.at_level(logging.WARNING):
        found = likelihoods(parts, asked)
    assert "out of memory" in caplog.text
    for one, other in zip(found, wanted, strict=True):
        assert one.logp == pytest.approx(other.logp, rel=1e-6)

    def none(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(model.base_model, "forward", none)
    with pytest.raises(ModelError, match="even for one at a time"):
        likelihoods(parts, asked)


def test_an_activation_by_one_kernel_is_the_same_function(make_gpt2) -> None:
    model = make_gpt2()
    activations = [one for one in model.modules() if isinstance(one, NewGELUActivation)]
    assert activations
    x = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    usual = activations[0](x)
    with one_kernel(model):
        inside = activations[0](x)
        assert torch.equal(inside, functional.gelu(x, approximate="tanh"))
    assert torch.equal(activations[0](x), usual) and "forward" not in vars(activations[0])
    # both round in every step, of which there are about ten
    assert float((inside - usual).abs().max()) <= 1e-14


def test_nothing_asked_is_nothing_found(model) -> None:
    assert likelihoods(anatomy(model), []) == [] == next_token(anatomy(model), [])


def test_more_places_than_the_head_takes_at_once(model, asked, monkeypatch) -> None:
    wanted = [one.logp for one in likelihoods(anatomy(model), asked)]
    module = importlib.import_module("unified_edit.model.likelihoods")
    monkeypatch.setattr(module, "POSITIONS", 3)
    found = [one.logp for one in likelihoods(anatomy(model), asked)]
    assert found == pytest.approx(wanted, rel=1e-6)
