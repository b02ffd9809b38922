"""Many facts at once: what is saved there, against what is not saved, and what is kept in memory.

Above 256 facts singular values come from the Gram matrix, above 2^24 terms products are ordinary
ones; `tests/test_objective.py` holds smaller problems against the formulas of the papers.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import reference
import torch
from test_objective import EPS, SLACK, Problem, close, violation
from torch import Tensor

from unified_edit.errors import ObjectiveError
from unified_edit.objective import Held, Metric, matmul, solve
from unified_edit.objective.inputs import float64_device, say_no_float64
from unified_edit.objective.spectrum import spectrum_of
from unified_edit.statistics import key_statistics


def by_qr(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """EMMET's Delta in whitened coordinates: R S^-1 Q' L^-1, L^-1 K = Q S."""
    L = torch.linalg.cholesky(C0)
    Q, S = torch.linalg.qr(torch.linalg.solve_triangular(L, K, upper=False))
    left = torch.linalg.solve_triangular(S, R, upper=True, left=False)
    return left @ torch.linalg.solve_triangular(L, Q.mT, upper=False, left=False)


@pytest.mark.parametrize(("condition", "from_gram"), [(1.0, True), (3e4, True), (1e7, False)])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_extreme_singular_values_of_many_facts(
    shape: tuple[int, int], condition: float, from_gram: bool
) -> None:
    p = Problem(0, *shape, 1, cond_C0=1.0, cond_A=condition)
    A = torch.linalg.solve_triangular(p.L, p.K, upper=False)
    found = spectrum_of(A, 1e-8)
    assert (found.gram is not None) is from_gram
    assert found.rank == 300
    # EPS cond^2 where the Gram matrix tells: 2e-7; Lanczos leaves less
    assert found.condition == pytest.approx(condition, rel=1e-5)
    assert found.largest == pytest.approx(1.0, rel=1e-9)
    small = A if shape[0] > shape[1] else A.mT
    assert close(found.triangle.mT @ found.triangle, small.mT @ small, SLACK * EPS)


def test_a_rank_that_is_missing_is_seen_among_many_facts() -> None:
    p = Problem(1, 400, 300, 1, rank=290)
    assert spectrum_of(p.K, 1e-8).rank == 290


@pytest.mark.parametrize("cond_A", [500.0, 5e4, 1e7])
def test_equality_of_many_facts(cond_A: float) -> None:
    p = Problem(2, 400, 300, 150, cond_C0=10.0, cond_A=cond_A)
    metric = Metric(p.C0)
    update = solve(metric, p.K, p.R)
    # a thousand: terms of the sums. Up to a condition of 1,000 a Gram matrix may square it.
    squared = min(cond_A, 1e3) if cond_A <= 1e3 else 1.0
    assert close(update.delta, by_qr(p.C0, p.K, p.R), 1000 * EPS * cond_A * squared)
    assert violation(update, p.K, p.R) <= max(1e-12, 100 * EPS * cond_A)
    assert update.diagnosis.memorization_error == pytest.approx(
        violation(update, p.K, p.R), abs=1e-12
    )
    # the cost is taken from whitened coordinates: the literal one agrees
    literal = metric.cost(update.left, update.right)
    assert update.diagnosis.preservation_error == pytest.approx(literal, rel=1e-9)


@pytest.mark.parametrize(("d_in", "E", "d_out"), [(400, 300, 350), (400, 300, 60), (290, 330, 20)])
@pytest.mark.parametrize("lam", [1e-3, 10.0])
def test_ridge_of_many_facts(d_in: int, E: int, d_out: int, lam: float) -> None:
    p = Problem(3, d_in, E, d_out, cond_C0=10.0, cond_A=10.0)
    metric = Metric(p.C0)
    update = solve(metric, p.K, p.R, ridge=lam)
    expected = reference.memit_delta(p.C0, p.K, p.R, lam)
    assert close(update.delta, expected, 1000 * EPS * 10 * (1 + lam) / min(1.0, lam))
    missed = math.sqrt(reference.memorization(expected, p.K, p.R)) / float(p.R.norm())
    assert update.diagnosis.memorization_error == pytest.approx(missed, rel=1e-9)
    literal = metric.cost(update.left, update.right)
    assert update.diagnosis.preservation_error == pytest.approx(literal, rel=1e-9)


def test_what_is_held_costs_what_the_metric_says() -> None:
    p = Problem(4, 30, 8, 6)
    held = Held(p.C0, p.K[:, :3])
    for ridge in (0.0, 0.5):
        update = solve(held, p.K[:, 3:], p.R[:, 3:], ridge=ridge)
        literal = reference.preservation(update.delta, p.C0)
        assert update.diagnosis.preservation_error == pytest.approx(literal, rel=1e-11)


@pytest.mark.parametrize(("E", "whole"), [(149, False), (200, True)])
def test_a_large_update_is_kept_whole_where_factors_save_less_than_half(
    E: int, whole: bool
) -> None:
    p = Problem(5, 600, E, 600, cond_C0=1.0, cond_A=2.0)
    assert E * 1200 < 600 * 600  # its factors are fewer numbers
    for ridge in (0.0, 1.0):
        update = solve(p.C0, p.K, p.R, ridge=ridge)
        assert update.is_dense is whole
        assert torch.equal(matmul(update.left, update.right), update.delta)
        assert update.to("cpu") is update


# ------------------------------------------------------------------ the factor


D = 600  # more than one square of 512


@pytest.fixture(scope="module")
def C0() -> Tensor:
    keys = torch.randn(D, 2 * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C0 = keys @ keys.mT
    return (C0 + C0.mT) / (4 * D)


def test_every_square_of_C0_is_looked_at(C0: Tensor) -> None:
    for row, column in ((550, 3), (3, 550), (590, 580)):
        spoilt = C0.clone()
        spoilt[row, column] += 1e-3
        with pytest.raises(ObjectiveError, match=r"not symmetric: .* up to 1\.0e-03"):
            Metric(spoilt)
        spoilt[row, column] = math.nan
        with pytest.raises(ObjectiveError, match="C0 has 1 entries that are not finite"):
            Metric(spoilt)


def test_a_large_C0_is_symmetrised(C0: Tensor) -> None:
    skew = 1e-8 * torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double()
    mean = C0 + (skew + skew.mT) / 2
    factor = Metric(C0 + skew).factor
    assert torch.equal(factor, factor.tril())
    assert close(factor @ factor.mT, mean, SLACK * EPS)


@pytest.mark.parametrize("by_columns", [False, True])
def test_C0_is_factored_in_its_place_only_if_it_may(C0: Tensor, by_columns: bool) -> None:
    given = C0.mT.clone().mT if by_columns else C0.clone()
    kept = Metric(given)
    assert torch.equal(given, C0)
    assert kept.factor.data_ptr() != given.data_ptr()
    made = Metric(given, overwrite=True)
    assert made.factor.data_ptr() == given.data_ptr()
    assert torch.equal(made.factor, kept.factor)
    assert made.to("cpu") is made
    assert torch.equal(Metric.on("cpu", C0).factor, kept.factor)


def test_factors_beyond_what_memory_allows_are_made_again(tiny_statistics, monkeypatch) -> None:
    statistics = key_statistics.KeyStatistics(
        tiny_statistics.source, dict(tiny_statistics.moments), dict(tiny_statistics.agreement)
    )
    first, second = statistics.layers[:2]
    width = statistics.width(first)
    assert not statistics._metrics
    monkeypatch.setattr(key_statistics, "FACTOR_BYTES", 8 * width**2)
    before = statistics.metric(first)
    assert statistics.metric(first) is before
    statistics.metric(second)
    assert list(statistics._metrics) == [second]
    assert torch.equal(statistics.metric(first).factor, before.factor)


def test_shrunk_moments_are_made_one_at_a_time(tiny_statistics, tmp_path, monkeypatch) -> None:
    """Shrinking makes no matrix; a factor takes the place of the one that is made for it."""
    source = replace(tiny_statistics.source, shrinkage=0.0)
    held = replace(tiny_statistics, source=source, _metrics={})
    held.save(tmp_path / "stats.safetensors")
    onto, made = [], key_statistics.Metric.on
    monkeypatch.setattr(
        key_statistics.Metric, "on", lambda *args, **more: onto.append(more) or made(*args, **more)
    )
    width = tiny_statistics.width(0)
    for base in (held, key_statistics.KeyStatistics.lazily(tmp_path / "stats.safetensors")):
        C0 = base.C0(0).clone()
        shrunk = base.shrunk(0.5)
        assert shrunk.nbytes == 0
        wanted = C0 + 0.5 * C0.trace() / width * torch.eye(width, dtype=C0.dtype)
        for _ in range(2):
            assert torch.allclose(shrunk.C0(0), wanted, rtol=1e-13)
        factor = shrunk.metric(0).factor
        assert torch.allclose(factor @ factor.T, wanted, rtol=1e-10)
        assert torch.equal(base.C0(0), C0)
    assert onto == [{"overwrite": True}] * 2


def test_a_device_without_float64_gives_way_and_says_so_once(caplog) -> None:
    say_no_float64.cache_clear()
    with caplog.at_level(logging.WARNING, "unified_edit.objective.inputs"):
        places = [float64_device(name) for name in ("mps", "mps:0", "cpu", "meta")]
    assert places == [torch.device("cpu")] * 4
    assert float64_device("cuda:1") == torch.device("cuda:1")
    assert [record.getMessage() for record in caplog.records] == [
        "MPS has no float64: solutions, statistics and sums of edits are computed on the CPU"
    ]
