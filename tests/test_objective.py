"""The objective against the papers' equations, its optimality conditions, and bad input.

Matrices are built with the condition numbers that a test needs: C0 with `cond_C0`, and K = L A with
A = L^-1 K of condition `cond_A`. A tolerance is EPS times what the arithmetic multiplies it by,
times `SLACK` for the dimensions (at most 40), which rounding enters through sums.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import reference
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unified_edit.errors import InfeasibleError, NotPositiveDefiniteError, ObjectiveError
from unified_edit.objective import CONDITION_LIMIT, Metric, Update, feasible, matmul, solve

EPS = 2.0**-52
SLACK = 100.0

examples = settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],  # a seed has nothing to shrink
)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(2, 24), st.integers(1, 24), st.integers(1, 12)).filter(
    lambda size: size[1] <= size[0]
)  # d_in, E, d_out with E <= d_in
conditions_C0 = st.sampled_from([1.0, 10.0, 1e3])
conditions_A = st.sampled_from([1.0, 10.0, 100.0])


class Problem:
    """C0 (d_in x d_in), K (d_in x E) and R (d_out x E) with the given condition numbers."""

    def __init__(
        self,
        seed: int,
        d_in: int,
        E: int,
        d_out: int,
        cond_C0: float = 10.0,
        cond_A: float = 10.0,
        rank: int | None = None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        rank = min(d_in, E) if rank is None else rank
        basis = self.orthonormal(d_in, d_in)
        C0 = basis @ torch.diag(self.spectrum(d_in, cond_C0)) @ basis.T
        self.C0 = (C0 + C0.T) / 2
        self.L = torch.linalg.cholesky(self.C0)
        self.s = self.spectrum(rank, cond_A if rank > 1 else 1.0)
        self.V = self.orthonormal(E, rank)
        self.K = self.L @ (self.orthonormal(d_in, rank) * self.s) @ self.V.T
        self.R = self.normal(d_out, E)

    def normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)

    def orthonormal(self, rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(self.normal(rows, columns)).Q

    @staticmethod
    def spectrum(n: int, condition: float) -> Tensor:
        return torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, relative: float) -> bool:
    return float((actual - expected).norm()) <= relative * float(expected.norm())


def violation(update: Update, K: Tensor, R: Tensor) -> float:
    """||Delta K - R|| / ||R|| of the stored factors, in products whose own rounding is less."""
    missed = matmul(update.left, matmul(update.right, K)) - R
    return float(missed.norm() / R.norm())


# ------------------------------------------------------------------ the papers' equations


@examples
@given(seed=seeds, size=sizes, cond_C0=conditions_C0, cond_A=conditions_A)
def test_equality_is_emmet_and_the_lagrangian_solution(
    seed: int, size: tuple[int, int, int], cond_C0: float, cond_A: float
) -> None:
    p = Problem(seed, *size, cond_C0, cond_A)
    update = solve(p.C0, p.K, p.R)
    # The literal formula inverts C0 and then a Gram matrix of condition cond_A**2.
    tolerance = SLACK * EPS * cond_C0 * cond_A**2
    assert tolerance < 1e-6
    assert close(update.delta, reference.emmet_delta(p.C0, p.K, p.R), tolerance)
    assert close(update.delta, reference.lagrangian_delta(p.C0, p.K, p.R), tolerance)
    assert update.diagnosis.form == "equality"


@pytest.mark.equation("first-rank-one")
@examples
@given(seed=seeds, d_in=st.integers(1, 24), d_out=st.integers(1, 12), cond_C0=conditions_C0)
def test_one_fact_is_rome(seed: int, d_in: int, d_out: int, cond_C0: float) -> None:
    p = Problem(seed, d_in, 1, d_out, cond_C0)
    expected = reference.rome_delta(p.C0, p.K[:, 0], p.R[:, 0])
    assert close(solve(p.C0, p.K, p.R).delta, expected, SLACK * EPS * cond_C0)


@examples
@given(
    seed=seeds,
    d_in=st.integers(1, 20),
    E=st.integers(1, 40),
    d_out=st.integers(1, 12),
    cond_C0=conditions_C0,
    lam=st.sampled_from([1e-2, 1.0, 100.0]),
)
def test_ridge_is_memit_for_few_and_for_many_facts(
    seed: int, d_in: int, E: int, d_out: int, cond_C0: float, lam: float
) -> None:
    p = Problem(seed, d_in, E, d_out, cond_C0)
    update = solve(p.C0, p.K, p.R, ridge=lam)
    # lam C0 + K K^T = L (lam I + A A^T) L^T, and A has the largest singular value 1.
    tolerance = SLACK * EPS * cond_C0 * (1 + lam) / lam
    assert tolerance < 1e-8
    assert close(update.delta, reference.memit_delta(p.C0, p.K, p.R, lam), tolerance)
    assert update.diagnosis.form == "ridge"


@examples
@given(
    seed=seeds, size=sizes, w=st.sampled_from([1.0, 30.0, 1000.0]), alpha=st.sampled_from([0.1, 2])
)
def test_damped_emmet_is_memit(
    seed: int, size: tuple[int, int, int], w: float, alpha: float
) -> None:
    p = Problem(seed, *size)
    mean, scaled = solve(p.C0, p.K, p.R, ridge=alpha * w), solve(w * p.C0, p.K, p.R, ridge=alpha)
    # lam = alpha w >= 0.1: the Gram matrices have a condition below 11, the inverses that of C0.
    tolerance = SLACK * EPS * 10 * 11
    assert close(mean.delta, scaled.delta, tolerance)
    assert close(mean.delta, reference.memit_delta(p.C0, p.K, p.R, alpha * w), tolerance)
    if size[1] > 1:  # as released, nothing is added for a single fact
        released = reference.emmet_released_delta(p.C0, p.K, p.R, w, alpha)
        assert close(mean.delta, released, tolerance)
        assert mean.diagnosis.memorization_error > alpha * w / (1 + alpha * w) / 2


def exact_emmet(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """The literal formula with 80 digits."""
    with mpmath.workdps(80):
        C, k, r = (mpmath.matrix(M.tolist()) for M in (C0, K, R))
        C_inverse = mpmath.inverse(C)
        exact = r * mpmath.inverse(k.T * C_inverse * k) * k.T * C_inverse
        return torch.tensor(exact.tolist(), dtype=torch.float64)


def exact_memit(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """The literal formula with 80 digits."""
    with mpmath.workdps(80):
        C, k, r = (mpmath.matrix(M.tolist()) for M in (C0, K, R))
        exact = r * k.T * mpmath.inverse(mpmath.mpf(lam) * C + k * k.T)
        return torch.tensor(exact.tolist(), dtype=torch.float64)


@pytest.mark.parametrize(
    ("cond_C0", "cond_A"), [(1.0, 1e3), (1.0, 1e7), (1e4, 1e5), (1e10, 1.0), (1e10, 1e3)]
)
@pytest.mark.parametrize("seed", range(3))
def test_equality_does_not_square_the_condition(seed: int, cond_C0: float, cond_A: float) -> None:
    p = Problem(seed, 12, 6, 4, cond_C0, cond_A)
    delta = solve(p.C0, p.K, p.R).delta
    # Rounding C0 and K, which nobody can avoid, changes A by EPS sqrt(cond_C0) and, with it, the
    # solution by cond_A times that. A Gram matrix's inverse would lose cond_A twice.
    tolerance = SLACK * EPS * math.sqrt(cond_C0) * cond_A * math.sqrt(cond_C0)
    assert close(delta, exact_emmet(p.C0, p.K, p.R), tolerance)


# ------------------------------------------------------------------ optimality


@examples
@given(seed=seeds, size=sizes, cond_C0=conditions_C0, cond_A=conditions_A)
def test_equality_is_stationary_and_no_feasible_update_costs_less(
    seed: int, size: tuple[int, int, int], cond_C0: float, cond_A: float
) -> None:
    p = Problem(seed, *size, cond_C0, cond_A)
    metric = Metric(p.C0)
    update = solve(metric, p.K, p.R)
    tolerance = SLACK * EPS * cond_C0 * cond_A
    # The constraint.
    assert violation(update, p.K, p.R) <= 1e-14 * cond_A
    # Stationarity: Delta C0 = Lambda K^T for some Lambda; rows lie in the span of the keys.
    gradient = update.delta @ p.C0
    multipliers = torch.linalg.lstsq(p.K, gradient.T).solution.T
    assert close(multipliers @ p.K.T, gradient, tolerance)
    # A move within the feasible set, N K = 0, adds its own cost: nothing can be gained.
    span = torch.linalg.qr(p.K).Q
    move = p.normal(*update.delta.shape)
    move = move - (move @ span) @ span.T
    cost = update.diagnosis.preservation_error
    for step in (1e-3, 0.1, 1.0):
        moved = update.delta + step * move
        added = step**2 * reference.preservation(move, p.C0)
        rounding = tolerance * (cost + added)
        moved_cost = reference.preservation(moved, p.C0)
        assert abs(moved_cost - cost - added) <= rounding
        assert moved_cost >= cost - rounding


@examples
@given(
    seed=seeds,
    d_in=st.integers(1, 20),
    E=st.integers(1, 40),
    d_out=st.integers(1, 12),
    lam=st.sampled_from([1e-8, 1e-4, 0.1, 10.0]),
)
def test_ridge_has_a_vanishing_gradient_and_is_the_minimum(
    seed: int, d_in: int, E: int, d_out: int, lam: float
) -> None:
    p = Problem(seed, d_in, E, d_out, cond_C0=100.0)
    delta = solve(p.C0, p.K, p.R, ridge=lam).delta

    def value(update: Tensor) -> float:
        return lam * reference.preservation(update, p.C0) + reference.memorization(update, p.K, p.R)

    gradient = lam * delta @ p.C0 + (delta @ p.K - p.R) @ p.K.T
    # cond(A) = 10, so the condition of lam I + A^T A is at most 100, or 1/lam if E > rank(A);
    # the two terms of the gradient are rounded at the size of R K^T.
    condition = min(100.0, (1 + lam) / lam) if d_in >= E else (1 + lam) / (0.01 + lam)
    rounding = SLACK * EPS * 100.0 * condition
    assert float(gradient.norm()) <= rounding * float((p.R @ p.K.T).norm())
    # The objective is quadratic: any move adds lam tr(N C0 N^T) + ||N K||^2.
    move = p.normal(d_out, d_in)
    best = value(delta)
    for step in (1e-3, 0.1, 1.0):
        added = step**2 * (
            lam * reference.preservation(move, p.C0) + float((move @ p.K).square().sum())
        )
        assert abs(value(delta + step * move) - best - added) <= rounding * (
            best + added + float(p.R.square().sum())
        )


@pytest.mark.parametrize(("d_in", "E", "rank"), [(12, 5, 5), (12, 6, 3), (6, 15, 6), (6, 15, 2)])
def test_ridge_tends_to_the_least_violation_at_the_rate_of_lam(
    d_in: int, E: int, rank: int
) -> None:
    p = Problem(7, d_in, E, 4, cond_C0=10.0, cond_A=10.0, rank=rank)
    metric = Metric(p.C0)
    limit = solve(metric, p.K, p.R, infeasible="least_violation")
    assert limit.diagnosis.form == ("equality" if rank == E else "least_violation")
    assert limit.diagnosis.rank == rank
    size = math.sqrt(limit.diagnosis.preservation_error)

    def distance(lam: float) -> float:
        difference = solve(metric, p.K, p.R, ridge=lam).delta - limit.delta
        return math.sqrt(reference.preservation(difference, p.C0))

    # In whitened coordinates each direction is off by the factor lam / (s^2 + lam), 1/10 <= s <= 1.
    distances = {lam: distance(lam) for lam in (1e-3, 1e-5, 1e-7)}
    for lam, off in distances.items():
        rounding = SLACK * EPS * 10 * 100 * size
        assert size * lam / (1 + lam) - rounding <= off <= size * lam / (0.01 + lam) + rounding
    # Two decades of lam are two decades of distance: of first order, up to lam / s^2 = 1e-1, 1e-3.
    assert distances[1e-3] / distances[1e-5] == pytest.approx(100, rel=0.11)
    assert distances[1e-5] / distances[1e-7] == pytest.approx(100, rel=2e-3)


@examples
@given(seed=seeds, d_in=st.integers(2, 16), E=st.integers(2, 30), d_out=st.integers(1, 8))
def test_least_violation_violates_least_and_then_costs_least(
    seed: int, d_in: int, E: int, d_out: int
) -> None:
    rank = max(1, min(d_in, E) // 2)
    p = Problem(seed, d_in, E, d_out, cond_C0=10.0, cond_A=10.0, rank=rank)
    update = solve(p.C0, p.K, p.R, infeasible="least_violation")
    tolerance = SLACK * EPS * 10 * 10**2
    assert close(update.delta, reference.least_violation_delta(p.C0, p.K, p.R), tolerance)
    # Least violation: the residual is orthogonal to every change that an update can make.
    residual = p.R - update.delta @ p.K
    assert float((residual @ p.K.T).norm()) <= tolerance * float((p.R @ p.K.T).norm())
    assert close(update.delta @ p.K, p.R @ p.V @ p.V.T, tolerance)
    # Least cost among them: as for the equality.
    gradient = update.delta @ p.C0
    span = torch.linalg.svd(p.K).U[:, :rank]
    assert close(gradient @ span @ span.T, gradient, tolerance)


@examples
@given(seed=seeds, size=sizes)
def test_least_violation_is_the_equality_where_that_can_be_held(
    seed: int, size: tuple[int, int, int]
) -> None:
    p = Problem(seed, *size)
    strict, lenient = solve(p.C0, p.K, p.R), solve(p.C0, p.K, p.R, infeasible="least_violation")
    assert torch.equal(strict.delta, lenient.delta)
    assert lenient.diagnosis == strict.diagnosis


def test_two_targets_for_one_key_get_their_mean_in_the_limit() -> None:
    p = Problem(11, 8, 3, 5)
    K = torch.cat([p.K, p.K[:, :1]], dim=1)
    R = torch.cat([p.R, p.normal(5, 1)], dim=1)
    mean = R.clone()
    mean[:, 0] = mean[:, 3] = (R[:, 0] + R[:, 3]) / 2
    limit = solve(p.C0, K, R, infeasible="least_violation")
    # The constraint holds for the mean; the conditions are 10 each.
    assert close(limit.delta @ K, mean, SLACK * EPS * 10 * 10)


@pytest.mark.parametrize("cond_C0", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("seed", range(5))
def test_a_ridge_below_rounding_does_not_amplify_rounding(cond_C0: float, seed: int) -> None:
    p = Problem(seed, 20, 8, 5, cond_C0, cond_A=10.0, rank=5)
    metric = Metric(p.C0)
    limit = solve(metric, p.K, p.R, infeasible="least_violation")
    # K has rank 5 up to rounding, so A does up to EPS sqrt(cond_C0). A ridge of that size squared,
    # or any smaller one, must not bring back what the facts contradict each other in.
    noise = EPS * math.sqrt(cond_C0)
    for lam in (noise**2, 1e-40, 1e-300):
        tiny = solve(metric, p.K, p.R, ridge=lam)
        difference = reference.preservation(tiny.delta - limit.delta, p.C0)
        allowed = SLACK * noise * 10 * 10 + 100 * lam
        assert math.sqrt(difference / limit.diagnosis.preservation_error) <= allowed


@pytest.mark.parametrize(("d_in", "E"), [(8, 5), (5, 8)])
@pytest.mark.parametrize("lam", [1e-4, 2e-6, 1.01e-6, 0.99e-6, 5e-7, 1e-8])
def test_a_ridge_is_right_on_either_side_of_where_the_gram_matrix_is_given_up(
    d_in: int, E: int, lam: float
) -> None:
    # s^2 + lam spans 1 + lam to 1e-10 + lam: its condition passes 1e6 near lam = 1e-6.
    p = Problem(27, d_in, E, 3, cond_C0=10.0, cond_A=1e5)
    delta = solve(p.C0, p.K, p.R, ridge=lam).delta
    # Half of the digits that a Gram matrix of condition 1e6 loses, or those of the filter.
    loses = 1e6 if lam > 1e-6 else 1 / math.sqrt(lam)
    assert close(delta, exact_memit(p.C0, p.K, p.R, lam), SLACK * EPS * 10 * loses)


@pytest.mark.parametrize("lam", [1e-9, 1e-12, 1e-15])
def test_a_tiny_ridge_keeps_the_digits_that_a_gram_matrix_loses(lam: float) -> None:
    # cond(A) = 1e6: A^T A has the condition 1e12, and 1e-16 * 1e12 / 1e-8 digits too few.
    p = Problem(5, 12, 6, 4, cond_C0=1.0, cond_A=1e6)
    delta = solve(p.C0, p.K, p.R, ridge=lam).delta
    expected = exact_memit(p.C0, p.K, p.R, lam)
    # Data rounded by EPS move the filter s / (s^2 + lam) by at most EPS / sqrt(lam) or EPS cond_A.
    assert close(delta, expected, SLACK * EPS * min(1e6, 1 / math.sqrt(lam)))


# ------------------------------------------------------------------ ill-conditioned keys


@examples
@given(
    seed=seeds,
    size=sizes.filter(lambda size: size[1] >= 2),
    cond_C0=st.sampled_from([1.0, 1e4, 1e10]),
    cond_A=st.sampled_from([1e4, 1e6, 1e8]),
    worst=st.booleans(),
)
def test_equality_is_held_up_to_the_limit(
    seed: int, size: tuple[int, int, int], cond_C0: float, cond_A: float, worst: bool
) -> None:
    p = Problem(seed, *size, cond_C0, cond_A)
    # Worst: every fact asks for the one direction that the keys hardly contain.
    R = p.R[:, :1] @ p.V[:, -1:].T if worst else p.R
    update = solve(p.C0, p.K, R)
    assert violation(update, p.K, R) <= 1e-8
    assert update.diagnosis.memorization_error <= 1e-8
    # Rounding in A = L^-1 K shifts its smallest singular value by EPS sqrt(cond_C0) cond_A of it.
    shift = SLACK * EPS * math.sqrt(cond_C0) * cond_A
    assert update.diagnosis.condition == pytest.approx(cond_A, rel=min(shift, 0.01))


@pytest.mark.parametrize("d_in", [40, 200])
def test_the_dense_update_holds_the_equality_in_an_ordinary_product(d_in: int) -> None:
    p = Problem(3, d_in, d_in // 3, 30, cond_C0=1.0, cond_A=1e8)
    delta = solve(p.C0, p.K, p.R).delta
    assert float((delta @ p.K - p.R).norm() / p.R.norm()) <= 1e-8


@pytest.mark.parametrize(("cond_C0", "cond_A"), [(1e4, 1e2), (1e10, 1e7)])
def test_a_large_batch_is_held_as_well(cond_C0: float, cond_A: float) -> None:
    """Large enough that accurate products are saved; with bad conditions they are needed."""
    p = Problem(7, 1100, 1000, 1000, cond_C0, cond_A)
    update = solve(p.C0, p.K, p.R)
    missed = violation(update, p.K, p.R)
    # a well-conditioned one as well as small ones, rounding in 1,100 terms apart
    assert missed <= (1e-12 if cond_A < 1e3 else 1e-8)
    assert update.diagnosis.memorization_error == pytest.approx(missed, abs=1e-12)


def test_equality_at_a_badly_conditioned_C0() -> None:
    p = Problem(4, 40, 12, 30, cond_C0=1e10, cond_A=1e3)
    update = solve(p.C0, p.K, p.R)
    assert violation(update, p.K, p.R) <= 1e-12  # EPS cond_A
    # In dense form the entries of Delta and K cancel: EPS ||Delta|| ||K|| / ||R||.
    cancelling = float(update.delta.norm() * p.K.norm() / p.R.norm())
    dense = float((update.delta @ p.K - p.R).norm() / p.R.norm())
    assert dense <= 10 * EPS * cancelling <= 1e-5


def test_one_step_of_correction_takes_out_the_rounding_of_the_factor() -> None:
    p = Problem(6, 40, 20, 40, cond_C0=1e10, cond_A=1e4)
    metric = Metric(p.C0)
    Q, S = torch.linalg.qr(metric.whiten(p.K))
    right = metric.unwhiten(Q.T)
    uncorrected = torch.linalg.solve_triangular(S, p.R, upper=True, left=False)
    before = float((matmul(uncorrected, matmul(right, p.K)) - p.R).norm() / p.R.norm())
    after = violation(solve(metric, p.K, p.R), p.K, p.R)
    assert after < 1e-3 * before


@pytest.mark.parametrize("cond_C0", [1.0, 1e4])
@pytest.mark.parametrize("cond_A", [1.1e8, 1e10])
def test_keys_beyond_the_limit_are_refused(cond_C0: float, cond_A: float) -> None:
    p = Problem(8, 20, 6, 4, cond_C0, cond_A)
    with pytest.raises(InfeasibleError) as caught:
        solve(p.C0, p.K, p.R)
    message = str(caught.value)
    found = re.search(r"rank (\d+) and condition ([\d.e+]+) \(limit 1e\+08\)", message)
    assert found is not None, message
    assert int(found[1]) == 5 if cond_A == 1.1e8 else int(found[1]) < 6
    assert float(found[2]) == pytest.approx(cond_A, rel=0.05)  # two digits are printed
    for remedy in ("ridge", "drop one", 'infeasible="least_violation"'):
        assert remedy in message
    # What is refused as an equality has a limit and can be damped.
    assert solve(p.C0, p.K, p.R, infeasible="least_violation").diagnosis.rank == int(found[1])
    assert solve(p.C0, p.K, p.R, ridge=1.0).diagnosis.rank == int(found[1])


def test_the_refusal_names_the_two_most_collinear_facts() -> None:
    p = Problem(9, 20, 6, 4)
    K = p.K.clone()
    K[:, 4] = -2 * K[:, 1]
    with pytest.raises(InfeasibleError, match=r"of fact 1 and fact 4, \|cosine\| (1|0\.9{11}\d*)"):
        solve(p.C0, K, p.R)
    names = ["Paris", "Rome", "Lima", "Oslo", "Bern", "Riga"]
    with pytest.raises(InfeasibleError, match=r"fact 1 \(Rome\) and fact 4 \(Bern\)"):
        solve(p.C0, K, p.R, names=names)
    assert feasible(p.C0, K).closest[:2] == (1, 4)


def test_collinear_is_meant_in_the_metric() -> None:
    # As they stand, facts 0 and 1 are the most alike: (10, 1) and (10, -1). But their first entry
    # is common among keys (10 is its usual size), and what is left of it in units of the usual is
    # 1: (1, 1), (1, -1), (0.2, -1).
    C0 = torch.diag(torch.tensor([100.0, 1.0], dtype=torch.float64))
    K = torch.tensor([[10.0, 10.0, 2.0], [1.0, -1.0, -1.0]], dtype=torch.float64)
    assert feasible(Metric.identity(2), K).closest[:2] == (0, 1)
    i, j, cosine = feasible(C0, K).closest
    assert (i, j) == (1, 2)
    assert cosine == pytest.approx(1.2 / math.sqrt(2 * 1.04), rel=4 * EPS)


def test_the_closest_pair_is_found_across_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(16, 2100, generator=generator, dtype=torch.float64)
    for i, j in ((5, 2050), (1500, 1600), (2098, 2099)):
        doubled = K.clone()
        doubled[:, j] = -doubled[:, i]
        closest = feasible(Metric.identity(16), doubled).closest
        assert closest == (i, j, pytest.approx(1.0, abs=1e-14))
    assert feasible(Metric.identity(16), K[:, :1]).closest is None


def test_more_facts_than_dimensions_are_refused_with_the_reason() -> None:
    p = Problem(10, 5, 9, 4)
    with pytest.raises(
        InfeasibleError, match=r"more than the 5 dimensions .* rank 5 and condition inf"
    ):
        solve(p.C0, p.K, p.R)
    assert solve(p.C0, p.K, p.R, ridge=0.1).diagnosis.condition == math.inf


# ------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_diagnosis_says_what_the_update_does(ridge: float) -> None:
    p = Problem(12, 20, 6, 9, cond_C0=100.0, cond_A=50.0)
    update = solve(p.C0, p.K, p.R, ridge=ridge)
    diagnosis = update.diagnosis
    assert update.left.shape == (9, 6)
    assert update.right.shape == (6, 20)
    assert update.rank == diagnosis.rank == 6
    assert not update.is_dense
    assert diagnosis.condition == pytest.approx(50.0, rel=1e-11)  # SLACK EPS 10 50
    cost = reference.preservation(update.delta, p.C0)
    assert diagnosis.preservation_error == pytest.approx(cost, rel=1e-11)
    missed = math.sqrt(reference.memorization(update.delta, p.K, p.R)) / float(p.R.norm())
    assert diagnosis.memorization_error == pytest.approx(missed, rel=1e-11, abs=1e-13)
    assert torch.equal(update.delta, matmul(update.left, update.right))
    assert update.delta is update.delta  # made once


def test_nothing_to_add_is_an_update_of_zero() -> None:
    p = Problem(13, 10, 3, 4)
    for ridge in (0.0, 1.0):
        update = solve(p.C0, p.K, torch.zeros(4, 3), ridge=ridge)
        assert torch.equal(update.delta, torch.zeros(4, 10).double())
        assert update.diagnosis.memorization_error == 0.0  # absolute: there is no ||R||
        assert update.diagnosis.preservation_error == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_type_is_solved_in_float64_and_inputs_are_left_alone(
    dtype: torch.dtype,
) -> None:
    p = Problem(14, 12, 4, 6)
    C0 = p.C0.float().requires_grad_()
    C0_double = C0.detach().double()
    K, R = p.K.to(dtype).requires_grad_(), p.R.to(dtype).T.contiguous().T
    before = [M.detach().clone() for M in (C0, K, R)]
    update = solve(C0, K, R)
    assert update.delta.dtype == update.left.dtype == update.right.dtype == torch.float64
    assert not update.delta.requires_grad
    assert not Metric(C0).factor.requires_grad
    expected = reference.emmet_delta(C0_double, K.detach(), R)
    # Rounded to eight bits, K keeps its condition of about 10 within a factor of two.
    assert close(update.delta, expected, SLACK * EPS * 10 * 20**2)
    assert all(torch.equal(now, then) for now, then in zip((C0, K, R), before, strict=True))


@pytest.mark.parametrize(
    ("d_out", "d_in", "E", "dense"),
    [
        (8, 32, 4, False),  # half of the smaller side: far from dense
        (8, 32, 6, False),  # 6 * 40 = 240 numbers against 256
        (8, 32, 7, True),  # 7 * 40 = 280
        (32, 8, 6, False),
        (32, 8, 7, True),
        (8, 8, 4, False),
        (8, 8, 5, True),
        (1, 6, 1, True),  # 7 numbers against 6
    ],
)
def test_factors_or_dense_whichever_takes_fewer_numbers(
    d_out: int, d_in: int, E: int, dense: bool
) -> None:
    p = Problem(15, d_in, E, d_out)
    for ridge in (0.0, 0.5):
        update = solve(p.C0, p.K, p.R, ridge=ridge)
        assert update.is_dense is dense
        assert update.left.is_contiguous()
        assert update.right.is_contiguous()  # as files want it
        assert update.rank == (min(d_out, d_in) if dense else E)
        expected = (
            reference.memit_delta(p.C0, p.K, p.R, ridge)
            if ridge
            else reference.emmet_delta(p.C0, p.K, p.R)
        )
        assert close(update.delta, expected, SLACK * EPS * 10 * 100)
        # A file may hold the factors or, if dense, Delta: either gives the same bits.
        assert torch.equal(matmul(update.left, update.right), update.delta)


@pytest.mark.parametrize(("d_out", "d_in"), [(8, 20), (20, 8)])
def test_a_dense_update_is_the_product_of_its_factors_to_the_last_bit(
    d_out: int, d_in: int
) -> None:
    # Entries that range over 24 decades: more than one product can carry below the largest.
    p = Problem(26, d_in, 7, d_out)
    keys, values = (torch.logspace(-6, 6, n, dtype=torch.float64)[:, None] for n in (d_in, d_out))
    update = solve(keys * p.C0 * keys.T, keys * p.K, values * p.R)
    assert update.is_dense
    assert torch.equal(matmul(update.left, update.right), update.delta)
    expected = values * reference.emmet_delta(p.C0, p.K, p.R) / keys.T
    assert close(update.delta, expected, SLACK * EPS * 10 * 100)


# ------------------------------------------------------------------ the metric


@examples
@given(seed=seeds, d=st.integers(1, 24), cond_C0=st.sampled_from([1.0, 1e3, 1e6]))
def test_the_metric_whitens_and_measures(seed: int, d: int, cond_C0: float) -> None:
    p = Problem(seed, d, min(3, d), 4, cond_C0)
    metric = Metric(p.C0)
    assert metric.dim == d
    assert metric.factor.dtype == torch.float64
    assert close(metric.factor @ metric.factor.T, p.C0, SLACK * EPS)
    assert torch.equal(metric.factor, metric.factor.tril())
    rows = p.normal(2, d)
    # Triangular solutions have a small residual whatever the condition.
    whitened, unwhitened = metric.whiten(p.K), metric.unwhiten(rows)
    size = float(metric.factor.norm())
    allowed = SLACK * EPS * size
    assert float((metric.factor @ whitened - p.K).norm()) <= allowed * float(whitened.norm())
    assert float((unwhitened @ metric.factor - rows).norm()) <= allowed * float(unwhitened.norm())
    # k^T C0^-1 k is the squared length of the whitened key.
    literal = torch.diagonal(p.K.T @ torch.linalg.inv(p.C0) @ p.K)
    assert close(whitened.square().sum(dim=0), literal, SLACK * EPS * cond_C0)
    left = p.normal(4, 2)
    cost = reference.preservation(left @ rows, p.C0)
    assert metric.cost(left, rows) == pytest.approx(cost, rel=SLACK * EPS * cond_C0)


def test_a_metric_is_made_once_and_serves_every_batch() -> None:
    p = Problem(18, 10, 3, 4)
    metric = Metric(p.C0)
    for K in (p.K, p.K[:, :1], p.K[:, 1:]):
        R = p.R[:, : K.shape[1]]
        assert torch.equal(solve(metric, K, R).delta, solve(p.C0, K, R).delta)


def test_the_identity_metric() -> None:
    p = Problem(19, 10, 3, 4)
    metric = Metric.identity(10)
    assert metric.dim == 10
    assert torch.equal(metric.whiten(p.K), p.K)
    assert close(solve(metric, p.K, p.R).delta, p.R @ torch.linalg.pinv(p.K), SLACK * EPS * 100)
    assert "dim=10" in repr(metric)


def test_float32_statistics_are_symmetrised() -> None:
    p = Problem(20, 30, 3, 4)
    C0 = p.C0.float()
    C0[0, 1] *= 1 + 2.0**-23  # the last bit of float32
    metric = Metric(C0)
    expected = (C0.double() + C0.double().T) / 2
    assert close(metric.factor @ metric.factor.T, expected, SLACK * EPS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda C0: C0[:, :-1], r"square matrix .* not of shape \(6, 5\)"),
        (lambda C0: C0[0], r"C0 must be a matrix, not of shape \(6,\)"),
        (lambda C0: C0[:0, :0], r"square matrix .* \(0, 0\)"),
        (lambda C0: C0.index_fill(1, torch.tensor(2), math.nan), "6 entries that are not finite"),
        (lambda C0: C0 / 0, "not finite"),
        (lambda C0: C0 + 1e-5 * torch.ones(6, 6).triu(1), "not symmetric"),
        (lambda C0: C0.half(), "float32 or torch.float64, not torch.float16"),
        (lambda C0: C0.round().long(), "not torch.int64"),
        (lambda C0: C0.numpy(), "C0 must be a torch.Tensor, not ndarray"),
    ],
)
def test_a_malformed_C0_is_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    C0 = Problem(21, 6, 2, 3).C0
    with pytest.raises(ObjectiveError, match=message) as caught:
        Metric(spoil(C0))
    assert not isinstance(caught.value, NotPositiveDefiniteError)


def test_too_few_tokens_are_refused_with_what_to_do() -> None:
    generator = torch.Generator().manual_seed(0)
    p = Problem(22, 8, 2, 3)
    indefinite = p.C0 - 0.5 * torch.eye(8)
    no_moment = p.C0.clone()
    no_moment[3, 3] = 0.0  # a key's entry that is always zero, and yet goes with others
    singular = [indefinite, no_moment, torch.zeros(8, 8)]
    for tokens in range(1, 8):  # one token short is enough
        keys = torch.randn(8, tokens, generator=generator, dtype=torch.float64)
        singular.append(keys @ keys.T / tokens)
    for C0 in singular:
        with pytest.raises(NotPositiveDefiniteError, match=r"more tokens \(at least 16.*shrinkage"):
            Metric(C0)
        with pytest.raises(NotPositiveDefiniteError):
            solve(C0, p.K, p.R)
        shrinkage = 1.0 if C0 is indefinite or C0 is no_moment else 1e-3
        Metric(C0 + shrinkage * torch.eye(8))


@pytest.mark.parametrize("d", [8, 50])
def test_a_singular_C0_is_refused_where_rounding_lets_its_factor_through(d: int) -> None:
    passed = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(d, d - 1, generator=generator, dtype=torch.float64)
        keys *= torch.logspace(0, 3, d, dtype=torch.float64)[:, None]  # units do not matter
        C0 = keys @ keys.T
        passed += int(torch.linalg.cholesky_ex(C0).info) == 0
        with pytest.raises(NotPositiveDefiniteError):
            Metric(C0)
    assert passed > 10  # otherwise the factorisation alone would have done


def test_units_of_the_coordinates_do_not_make_C0_singular() -> None:
    units = torch.logspace(-9, 9, 6, dtype=torch.float64)
    p = Problem(25, 6, 2, 3)
    rescaled = Metric(units[:, None] * p.C0 * units)
    assert close(rescaled.factor / units[:, None], Metric(p.C0).factor, SLACK * EPS * 10)


# ------------------------------------------------------------------ bad input


def with_entry(matrix: Tensor, row: int, column: int, value: float) -> Tensor:
    matrix = matrix.clone()
    matrix[row, column] = value
    return matrix


def with_zero_column(matrix: Tensor, column: int) -> Tensor:
    return matrix.index_fill(1, torch.tensor(column), 0.0)


NAMES = ["Paris", "Rome", "Lima"]


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": lambda p: p.K[:-1]}, r"K \(d_in x E\) has 7 rows, but C0 is 8 x 8"),
        ({"K": lambda p: p.K.T}, r"has 3 rows, but C0 is 8 x 8: columns are facts"),
        ({"K": lambda p: p.K[:, 0]}, r"K must be a matrix, not of shape \(8,\)"),
        ({"R": lambda p: p.R[:, :2]}, r"K .* has 3 columns and R .* has 2"),
        ({"R": lambda p: p.R[:, 0]}, r"R must be a matrix, not of shape \(5,\)"),
        ({"K": lambda p: p.K[:, :0], "R": lambda p: p.R[:, :0]}, r"nothing to solve: K is 8 x 0"),
        ({"R": lambda p: p.R[:0]}, r"nothing to solve: .* R is 0 x 3"),
        ({"K": lambda p: with_entry(p.K, 0, 1, math.nan)}, r"K has .* in 1 of 3 .* fact 1 \(Rome"),
        ({"R": lambda p: with_entry(p.R, 0, 2, math.inf)}, r"R has .* in 1 of 3 .* fact 2 \(Lima"),
        ({"K": lambda p: with_zero_column(p.K, 1)}, r"key of fact 1 \(Rome\) is zero"),
        ({"K": lambda p: p.K.round().int()}, r"K must be of a floating-point type, not torch.int"),
        ({"R": lambda p: p.R.tolist()}, r"R must be a torch.Tensor, not list"),
        ({"K": lambda p: p.K * 1e300, "C0": lambda p: p.C0 * 1e-30}, r"overflows float64"),
    ],
)
def test_malformed_facts_are_refused(
    ridge: float, change: dict[str, Callable[[Problem], Tensor]], message: str
) -> None:
    p = Problem(23, 8, 3, 5)
    given_ = {name: change.get(name, lambda q, n=name: getattr(q, n))(p) for name in "KR"}
    C0 = change["C0"](p) if "C0" in change else p.C0
    with pytest.raises(ObjectiveError, match=message):
        solve(C0, given_["K"], given_["R"], ridge=ridge, names=NAMES)


def test_a_fact_without_a_name_is_called_by_its_index() -> None:
    p = Problem(23, 8, 3, 5)
    with pytest.raises(ObjectiveError, match=r"key of fact 2 is zero"):
        solve(p.C0, with_zero_column(p.K, 2), p.R)
    with pytest.raises(ObjectiveError, match=r"2 names were given for 3 facts"):
        solve(p.C0, p.K, p.R, names=NAMES[:2])


@pytest.mark.parametrize("ridge", [-1.0, -1e-300, math.nan, math.inf, True, "0.1", None])
def test_a_ridge_that_is_no_weight_is_refused(ridge: object) -> None:
    p = Problem(24, 6, 2, 3)
    with pytest.raises(ObjectiveError, match=r"ridge is .*; it must be a finite number >= 0"):
        solve(p.C0, p.K, p.R, ridge=ridge)  # type: ignore[arg-type]


@pytest.mark.parametrize("one", [1, np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_a_ridge_may_be_a_number_of_numpy_or_torch(one: object) -> None:
    p = Problem(24, 6, 2, 3)
    expected = solve(p.C0, p.K, p.R, ridge=1.0).delta
    assert torch.equal(solve(p.C0, p.K, p.R, ridge=one).delta, expected)  # type: ignore[arg-type]


def test_an_unknown_way_out_is_refused() -> None:
    p = Problem(24, 6, 2, 3)
    with pytest.raises(ObjectiveError, match=r"raise, least_violation, not 'pinv'"):
        solve(p.C0, p.K, p.R, infeasible="pinv")  # type: ignore[arg-type]


def test_the_limit_stands_as_documented() -> None:
    assert CONDITION_LIMIT == 1e8
