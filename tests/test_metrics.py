"""Metrics: any object is one that has the methods; C0's with dead coordinates, and with more keys.

Besides, what can be held in a metric. Tolerances as in test_objective.py.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_objective import EPS, SLACK, Problem, close, examples, seeds
from torch import Tensor

from unified_edit.errors import (
    InfeasibleError,
    NotPositiveDefiniteError,
    NullSpaceError,
    ObjectiveError,
)
from unified_edit.objective import Metric, MetricProtocol, feasible, matmul, solve

# ------------------------------------------------------------------ metrics of one's own


@dataclass
class NullSpace:
    """Updates that act on the span of N (d_in x n, orthonormal) alone: Delta = Delta N N^T.

    They cost ||Delta||^2, and what `inner` (n coordinates) has been given more.
    """

    N: Tensor
    inner: Metric

    @property
    def dim(self) -> int:
        return self.N.shape[0]

    @property
    def device(self) -> torch.device:
        return self.N.device

    def whiten(self, K: Tensor) -> Tensor:
        return self.inner.whiten(self.N.T @ K)

    def unwhiten(self, rows: Tensor) -> Tensor:
        return self.inner.unwhiten(rows) @ self.N.T

    def cost(self, left: Tensor, right: Tensor) -> float:
        return self.inner.cost(left, right @ self.N)

    def plus(self, K: Tensor, weight: float) -> NullSpace:
        return NullSpace(self.N, self.inner.plus(self.N.T @ K, weight))


@dataclass
class Unmoved:
    """C0 is preserved on the whole and the keys `named` (d_in x m) exactly: Delta named = 0."""

    soft: Metric
    named: Tensor

    def __post_init__(self) -> None:
        self.dim, self.device = self.soft.dim, self.soft.device
        self.span = torch.linalg.qr(self.soft.whiten(self.named)).Q

    def without(self, A: Tensor) -> Tensor:
        rest = A - self.span @ (self.span.T @ A)
        return torch.where(rest.norm(dim=0) < 1e-12 * A.norm(dim=0), 0.0, rest)

    def whiten(self, K: Tensor) -> Tensor:
        return self.without(self.soft.whiten(K))

    def unwhiten(self, rows: Tensor) -> Tensor:
        return self.soft.unwhiten(self.without(rows.T).T)

    def cost(self, left: Tensor, right: Tensor) -> float:
        return self.soft.cost(left, right)

    def plus(self, K: Tensor, weight: float) -> Unmoved:
        return Unmoved(self.soft.plus(K, weight), self.named)


def alphaedit(N: Tensor, Kp: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """AlphaEdit (arXiv 2410.02355), as published: R K'P (Kp Kp'P + K K'P + I)^-1, P = N N'."""
    P, one = N @ N.T, torch.eye(len(N), dtype=torch.float64)
    return R @ K.T @ P @ torch.linalg.inv(Kp @ Kp.T @ P + K @ K.T @ P + one)


@pytest.mark.parametrize(
    ("d_in", "n", "before", "E", "d_out"),
    [(20, 12, 4, 5, 7), (20, 6, 3, 15, 9), (20, 2, 1, 15, 9), (12, 12, 4, 3, 5)],
)
def test_alphaedit_is_the_objective_in_coordinates_of_the_null_space(
    d_in: int, n: int, before: int, E: int, d_out: int
) -> None:
    p = Problem(0, d_in, E, d_out, cond_C0=1.0)
    N, Kp = p.orthonormal(d_in, n), p.normal(d_in, before)
    metric = NullSpace(N, Metric.identity(n)).plus(Kp, 1.0)
    assert isinstance(metric, MetricProtocol)
    assert metric.whiten(p.K).shape == (n, E)
    update = solve(metric, p.K, p.R, ridge=1.0)
    assert close(update.delta, alphaedit(N, Kp, p.K, p.R), 1e-13)
    # As formulated: the same C0 and keys in coordinates, by hand.
    reduced = torch.eye(n, dtype=torch.float64) + N.T @ Kp @ Kp.T @ N
    expected = reference.memit_delta(reduced, N.T @ p.K, p.R, 1.0) @ N.T
    assert close(update.delta, expected, 1e-13)
    cost = reference.preservation(update.delta @ N, reduced)
    assert update.diagnosis.preservation_error == pytest.approx(cost, rel=1e-12)
    assert update.diagnosis.rank == min(n, E)
    assert math.isinf(update.diagnosis.condition) == (n < E)
    # The factors take no more numbers than Delta, and Delta none more than need be.
    rank = min(n, E) if min(n, E) * (d_out + d_in) <= d_out * d_in else min(d_out, d_in)
    assert update.rank == rank


@pytest.mark.parametrize("rank", [4, 2])
def test_the_equality_and_its_limit_in_a_null_space(rank: int) -> None:
    p = Problem(1, 20, 4, 6, cond_C0=1.0)
    N = p.orthonormal(20, 9)
    K = p.K @ p.V[:, :rank] @ p.V[:, :rank].T
    P = N @ N.T
    expected = p.R @ torch.linalg.pinv(K.T @ P @ K, rtol=1e-10, hermitian=True) @ K.T @ P
    metric = NullSpace(N, Metric.identity(9))
    update = solve(metric, K, p.R, infeasible="least_violation")
    assert update.diagnosis.form == ("equality" if rank == 4 else "least_violation")
    assert close(update.delta, expected, SLACK * EPS * 100 * 10)
    tiny = solve(metric, K, p.R, ridge=1e-20)
    assert close(tiny.delta, expected, SLACK * EPS * 100 * 10)
    outside = torch.linalg.qr(N, mode="complete").Q[:, 9:]
    assert float((update.delta @ outside).norm()) <= SLACK * EPS * float(update.delta.norm())


def test_more_facts_than_the_metric_leaves_dimensions() -> None:
    p = Problem(2, 20, 6, 8, cond_C0=1.0)
    metric = NullSpace(p.orthonormal(20, 5), Metric.identity(5))
    found = feasible(metric, p.K)
    assert (bool(found), found.facts, found.dim, found.rank) == (False, 6, 5, 5)
    assert math.isinf(found.condition)
    with pytest.raises(InfeasibleError, match="more than the 5 dimensions of a key that the metri"):
        solve(metric, p.K, p.R)
    lenient = solve(metric, p.K, p.R, infeasible="least_violation")
    assert lenient.diagnosis.rank == 5


def test_a_metric_may_leave_nothing() -> None:
    p = Problem(3, 8, 2, 4, cond_C0=1.0)
    metric = Metric.identity(8)
    nothing = NullSpace(p.orthonormal(8, 8)[:, :0], metric)
    nothing.whiten = lambda K: K.new_zeros(0, K.shape[1])  # type: ignore[method-assign]
    nothing.unwhiten = lambda rows: rows.new_zeros(len(rows), 8)  # type: ignore[method-assign]
    nothing.cost = lambda left, right: 0.0  # type: ignore[method-assign]
    found = feasible(nothing, p.K)
    assert (found.holds, found.rank, found.dim) == (False, 0, 0)
    for options in ({"ridge": 1.0}, {"infeasible": "least_violation"}):
        assert torch.equal(solve(nothing, p.K, p.R, **options).delta, torch.zeros(4, 8).double())
    with pytest.raises(InfeasibleError, match=r"rank 0"):
        solve(nothing, p.K, p.R)


@pytest.mark.parametrize(("d_in", "named", "E"), [(16, 5, 6), (10, 4, 20)])
def test_named_keys_do_not_move(d_in: int, named: int, E: int) -> None:
    p = Problem(4, d_in, E, 7)
    keep = p.normal(d_in, named)
    metric = Unmoved(Metric(p.C0), keep)
    assert isinstance(metric, MetricProtocol)
    # As facts of which nothing is asked: exactly, or (beside a ridge) with no end of weight.
    if d_in - named >= E:
        update = solve(metric, p.K, p.R)
        asked = torch.cat([keep, p.K], dim=1), torch.cat([p.R.new_zeros(7, named), p.R], dim=1)
        expected = reference.emmet_delta(p.C0, *asked)
        cond = float(torch.linalg.cond(Metric(p.C0).whiten(asked[0])))
        assert close(update.delta, expected, SLACK * EPS * 10 * cond**2)
        assert update.diagnosis.form == "equality"
    update = solve(metric, p.K, p.R, ridge=0.5)
    assert float((update.delta @ keep).norm()) <= SLACK * EPS * 10 * float(update.delta.norm())
    heavy = solve(Metric(p.C0).plus(keep, 1e9), p.K, p.R, ridge=0.5)
    assert close(update.delta, heavy.delta, 1e-6)  # the weight's inverse, times conditions


class Counting(Metric):
    """Counts how often keys are whitened."""

    times = 0

    def whiten(self, K: Tensor) -> Tensor:
        self.times += 1
        return super().whiten(K)


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("ridge", [0.0, 1e-20, 1.0])
def test_keys_are_whitened_once(rank: int, ridge: float) -> None:
    p = Problem(16, 9, 4, 3, rank=rank)
    metric = Counting(p.C0)
    solve(metric, p.K, p.R, ridge=ridge, infeasible="least_violation")
    assert metric.times == 1


def test_a_fact_that_the_metric_leaves_nothing_of_is_named() -> None:
    p = Problem(5, 12, 3, 4)
    keep = p.normal(12, 2)
    metric = Unmoved(Metric(p.C0), keep)
    K = torch.cat([p.K[:, :2], keep @ torch.tensor([[1.0], [2.0]]).double()], dim=1)
    blame = r"rank 2 .*The key of fact 2 \(Oslo\) is next to nothing there.*drop that fact"
    with pytest.raises(InfeasibleError, match=blame):
        solve(metric, K, p.R, names=["Rome", "Lima", "Oslo"])
    with pytest.raises(InfeasibleError, match="The key of fact 0 is next to nothing"):
        solve(metric, K[:, 2:], p.R[:, 2:])
    # With less than the equality it can be solved for, and that fact gets nothing.
    limit = solve(metric, K, p.R, infeasible="least_violation")
    assert close(limit.delta @ K[:, :2], p.R[:, :2], SLACK * EPS * 10)
    assert float((limit.delta @ K[:, 2]).norm()) <= SLACK * EPS * float(limit.delta.norm())


def test_what_is_no_metric_is_refused() -> None:
    p = Problem(6, 6, 2, 3)
    for what in (p.C0.numpy(), object(), None):
        with pytest.raises(
            ObjectiveError, match=r"dim, device, whiten, .*, not (ndarray|obj|None)"
        ):
            solve(what, p.K, p.R)  # type: ignore[arg-type]


# ------------------------------------------------------------------ feasibility


@examples
@given(seed=seeds, d_in=st.integers(2, 16), E=st.integers(1, 20), whole=st.booleans())
def test_feasible_says_what_solve_does(seed: int, d_in: int, E: int, whole: bool) -> None:
    rank = min(d_in, E) if whole else max(1, min(d_in, E) // 2)
    p = Problem(seed, d_in, E, 4, rank=rank)
    found = feasible(p.C0, p.K)
    assert (found.facts, found.dim, found.rank) == (E, d_in, rank)
    assert bool(found) is found.holds is (rank == E)
    if found:
        found.require()
        assert solve(p.C0, p.K, p.R).diagnosis.condition == found.condition
    else:
        with pytest.raises(InfeasibleError) as own:
            found.require()
        with pytest.raises(InfeasibleError) as solved:
            solve(p.C0, p.K, p.R)
        assert str(own.value) == str(solved.value)
    damped = solve(p.C0, p.K, p.R, ridge=0.1).diagnosis
    assert damped.rank == rank
    assert damped.condition == pytest.approx(found.condition, rel=1e-12)


def test_feasible_names_the_facts_and_refuses_what_solve_refuses() -> None:
    p = Problem(7, 8, 2, 3)
    K = torch.cat([p.K, 3 * p.K[:, :1]], dim=1)
    names = ["Paris", "Rome", "Lima"]
    found = feasible(p.C0, K, names=names)
    assert found.closest == (0, 2, pytest.approx(1.0, abs=1e-14))
    with pytest.raises(InfeasibleError, match=r"fact 0 \(Paris\) and fact 2 \(Lima\)"):
        found.require()
    with pytest.raises(ObjectiveError, match="2 names were given for 3 facts"):
        feasible(p.C0, K, names=names[:2])
    with pytest.raises(ObjectiveError, match=r"key of fact 1 \(Rome\) is zero"):
        feasible(p.C0, K.index_fill(1, torch.tensor(1), 0.0), names=names)
    with pytest.raises(AttributeError):
        found.rank = 3  # type: ignore[misc]
    assert "rank=2" in repr(found) and "tensor" not in repr(found)


# ------------------------------------------------------------------ dead coordinates


def planted(seed: int, E: int, cond_A: float = 10.0, rank: int | None = None, **sizes: int):
    """A problem over 24 coordinates (d_out: 40) within 30 of which 6 are dead."""
    small = Problem(seed, 24, E, sizes.get("d_out", 40), cond_A=cond_A, rank=rank)
    alive = torch.randperm(30, generator=small.generator)[:24].sort().values
    C0, K = torch.zeros(30, 30).double(), torch.zeros(30, E).double()
    C0[alive[:, None], alive] = small.C0
    K[alive] = small.K
    return small, alive, C0, K


@pytest.mark.parametrize(
    ("E", "rank", "options"),
    [
        (5, None, {}),
        (23, None, {}),
        (8, 4, {"infeasible": "least_violation"}),
        (28, None, {"infeasible": "least_violation"}),
        (5, None, {"ridge": 0.3}),
        (28, None, {"ridge": 0.3}),
        (8, 4, {"ridge": 1e-30}),
    ],
)
def test_dead_coordinates_drop_out_exactly(E: int, rank: int | None, options: dict) -> None:
    small, alive, C0, K = planted(8, E, rank=rank)
    metric = Metric(C0)
    assert metric.dim == 30
    assert torch.equal(metric.alive, alive)
    assert torch.equal(metric.factor, Metric(small.C0).factor)
    update, expected = (
        solve(metric, K, small.R, **options),
        solve(small.C0, small.K, small.R, **options),
    )
    dead = [i for i in range(30) if i not in alive]
    assert torch.equal(update.delta[:, dead], torch.zeros(40, 6).double())
    assert torch.equal(update.delta[:, alive], expected.delta)
    assert update.diagnosis.form == expected.diagnosis.form
    assert update.diagnosis.preservation_error == pytest.approx(
        expected.diagnosis.preservation_error, rel=1e-14
    )
    # Whatever second moment is made up for the dead coordinates, facts do not come across it.
    for eps in (1e-12, 1e-3, 1.0, 1e6):
        filled = C0.clone()
        filled.diagonal()[dead] = eps
        # Q and U carry EPS into those rows, where unwhitening divides by the root of eps.
        allowed = 1e-13 * max(1.0, eps**-0.5)
        assert close(solve(filled, K, small.R, **options).delta, update.delta, allowed)
    literal = reference.preservation(update.delta, C0)
    assert update.diagnosis.preservation_error == pytest.approx(literal, rel=1e-12)


def test_a_metric_with_dead_coordinates_measures_and_maps() -> None:
    small, alive, C0, K = planted(9, 5)
    metric, reduced = Metric(C0), Metric(small.C0)
    assert reduced.alive is None
    assert torch.equal(metric.whiten(K), reduced.whiten(small.K))
    rows = small.normal(3, 24)
    assert metric.unwhiten(rows).shape == (3, 30)
    assert torch.equal(metric.unwhiten(rows)[:, alive], reduced.unwhiten(rows))
    left, right = small.normal(4, 3), small.normal(3, 30)
    cost = reference.preservation(left @ right, C0)
    assert metric.cost(left, right) == pytest.approx(cost, rel=1e-12)
    with pytest.raises(ObjectiveError, match=r"30 x 30 with 24 coordinates that are not dead"):
        metric.unwhiten(right)
    with pytest.raises(ObjectiveError, match=r"does not fit C0, which is 30 x 30$"):
        metric.whiten(small.K)


def test_float16_keys_with_neurons_that_never_fire_give_a_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, 400, generator=generator).half().float()
    keys[[3, 11, 29]] = 0.0
    metric = Metric(keys @ keys.T / 400)
    assert metric.alive.tolist() == [i for i in range(30) if i not in (3, 11, 29)]


def test_keys_in_dead_coordinates_are_refused_by_name() -> None:
    small, alive, C0, K = planted(10, 8)
    dead = [i for i in range(30) if i not in alive]
    K[dead[2], 3] = 1e-30
    K[dead[4], 6] = K[dead[2], 6] = 1.0
    metric, names = Metric(C0), [f"city {i}" for i in range(8)]
    counted = (
        r"keys reach where no preserved key does: 2 of 8 facts, first fact 3, have entries in 2 of "
        r"the 6 coordinates in which C0 \(30 x 30\) is zero.*eps \* tr\(C0\)/d \* I"
    )
    with pytest.raises(NullSpaceError, match=counted) as caught:
        metric.whiten(K)
    assert caught.value.facts == (3, 6)
    assert isinstance(caught.value, NotPositiveDefiniteError)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.facts) == (str(caught.value), (3, 6))
    with pytest.raises(NullSpaceError, match="first fact 3"):
        solve(metric, K, small.R)
    named = r"The facts in question: fact 3 \(city 3\), fact 6 \(city 6\)$"
    with pytest.raises(NullSpaceError, match=named):
        solve(metric, K, small.R, ridge=1.0, names=names)
    with pytest.raises(NullSpaceError, match=named):
        feasible(metric, K, names=names)
    K[dead[0]] = 1.0
    with pytest.raises(NullSpaceError, match=r"fact 4 \(city 4\) and 3 more$"):
        feasible(metric, K, names=names)
    solve(C0 + 1e-3 * torch.eye(30), K, small.R)  # the remedy


# ------------------------------------------------------------------ one more: plus


def exact_sum(metric: Metric, K: Tensor, weight: float, k: Tensor) -> Tensor:
    """k^T (L L^T + weight K K^T)^-1 k with 60 digits."""
    with mpmath.workdps(60):
        L, keys, other = (mpmath.matrix(M.tolist()) for M in (metric.factor, K, k))
        total = L * L.T + mpmath.mpf(weight) * keys * keys.T
        product = other.T * mpmath.inverse(total) * other
        return torch.tensor(product.tolist(), dtype=torch.float64)


@examples
@given(seed=seeds, d=st.integers(1, 12), E=st.integers(0, 20), weight=st.sampled_from([0, 0.1, 30]))
def test_plus_is_the_metric_of_the_sum(seed: int, d: int, E: int, weight: float) -> None:
    p = Problem(seed, d, 1, 2)
    K = p.normal(d, E)
    metric = Metric(p.C0)
    before = metric.factor.clone()
    more = metric.plus(K, weight)
    total = p.C0 + weight * K @ K.T
    assert close(more.factor @ more.factor.T, total, SLACK * EPS)
    assert torch.equal(more.factor, more.factor.tril())
    assert bool((more.factor.diagonal() > 0).all())
    assert close(more.factor, torch.linalg.cholesky(total), SLACK * EPS * 10 * (1 + 100 * weight))
    assert torch.equal(metric.factor, before)
    assert (more.dim, more.alive) == (d, None)


def test_plus_over_several_panels_is_that_of_its_parts() -> None:
    p = Problem(11, 600, 1, 2)
    K = p.normal(600, 300)
    metric = Metric(p.C0)
    total = p.C0 + 0.5 * K @ K.T
    whole, parts = metric.plus(K, 0.5), metric.plus(K[:, :50], 0.5).plus(K[:, 50:], 0.5)
    for more in (whole, parts):
        assert close(more.factor @ more.factor.T, total, SLACK * EPS)
        assert torch.equal(more.factor, more.factor.tril())


@pytest.mark.parametrize("seed", range(3))
def test_plus_keeps_the_digits_of_an_ill_conditioned_C0(seed: int) -> None:
    p = Problem(seed, 10, 3, 2, cond_C0=1e12)
    metric = Metric(p.C0)
    # Half an ordinary key, half one of C0's least: what a sum rounds away shows at once.
    K, k = p.K[:, :2], p.L[:, -1:]
    exact = exact_sum(metric, K, 2.0, k)
    off = {
        name: abs(float(one.whiten(k).square().sum() / exact - 1))
        for name, one in {
            "plus": metric.plus(K, 2.0),
            "sum": Metric(metric.factor @ metric.factor.T + 2.0 * K @ K.T),
        }.items()
    }
    assert off["plus"] <= SLACK * EPS * math.sqrt(1e12)
    assert off["sum"] > 10 * off["plus"]


@pytest.mark.parametrize("lam", [0.2, 30.0])
def test_a_history_is_memit_with_all_facts_so_far(lam: float) -> None:
    p = Problem(12, 14, 5, 6)
    stored = p.normal(14, 9)
    update = solve(Metric(p.C0).plus(stored, 1 / lam), p.K, p.R, ridge=lam)
    literal = p.R @ p.K.T @ torch.linalg.inv(lam * p.C0 + stored @ stored.T + p.K @ p.K.T)
    assert close(update.delta, literal, SLACK * EPS * 10 * 1000)


def test_plus_wakes_dead_coordinates_where_its_keys_are() -> None:
    small, alive, C0, K = planted(13, 5)
    metric = Metric(C0)
    dead = [i for i in range(30) if i not in alive]
    keys = torch.zeros(30, 4).double()
    keys[alive] = small.normal(24, 4)
    assert torch.equal(metric.plus(keys, 1.0).alive, alive)
    keys[dead[1]], keys[dead[4]] = small.normal(2, 4)
    more = metric.plus(keys, 0.7)
    assert more.alive.tolist() == sorted([*alive.tolist(), dead[1], dead[4]])
    total = C0 + 0.7 * keys @ keys.T
    assert torch.equal(more.alive, Metric(total).alive)
    assert close(more.factor @ more.factor.T, total[more.alive][:, more.alive], SLACK * EPS)
    K[dead[1]] = 1.0  # out of reach before
    delta = solve(more, K, small.R).delta
    assert close(delta, solve(total, K, small.R).delta, SLACK * EPS * 1000)
    everywhere = metric.plus(torch.eye(30), 0.1)
    assert everywhere.alive is None
    assert torch.equal(metric.alive, alive)  # as it was
    # One key with entries in two dead coordinates: no price for their difference.
    with pytest.raises(NotPositiveDefiniteError, match=r"the 1 keys of K reach 2 coord.*shrinkage"):
        metric.plus(keys[:, :1], 1.0)
    assert torch.equal(metric.plus(keys, 0.0).alive, alive)


@pytest.mark.parametrize("weight", [1.0, np.float32(1.0), torch.tensor(1)])
def test_a_weight_may_be_any_number(weight: float) -> None:
    p = Problem(14, 5, 2, 3)
    assert torch.equal(Metric(p.C0).plus(p.K, weight).factor, Metric(p.C0).plus(p.K, 1).factor)


@pytest.mark.parametrize(
    ("K", "weight", "message"),
    [
        (torch.ones(5, 2), -1.0, r"the weight of keys is -1.0; it must be a finite number >= 0"),
        (torch.ones(5, 2), math.nan, r"the weight of keys is nan"),
        (torch.ones(5, 2), "2", r"the weight of keys is '2'"),
        (torch.ones(4, 2), 1.0, r"K of shape \(4, 2\) does not fit C0, which is 5 x 5"),
        (torch.full((5, 2), math.inf), 1.0, r"K has entries that are not finite"),
        (torch.full((5, 2), 1e300, dtype=torch.float64), 1e20, r"or overflows with its weight"),
    ],
)
def test_keys_that_cannot_be_preserved_are_refused(K: Tensor, weight: float, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        Metric.identity(5).plus(K, weight)


def test_stored_factors_of_a_metric_of_ones_own_give_delta_bit_for_bit() -> None:
    p = Problem(15, 20, 15, 9, cond_C0=1.0)
    update = solve(NullSpace(p.orthonormal(20, 6), Metric.identity(6)), p.K, p.R, ridge=1.0)
    assert torch.equal(matmul(update.left, update.right), update.delta)
