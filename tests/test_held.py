"""Keys that are held: against the formula for all pairs at once, and its defining conditions."""

from __future__ import annotations

import pytest
import torch
from recipe import relative
from torch import Tensor

from unified_edit.errors import InfeasibleError, ObjectiveError
from unified_edit.objective import Held, Metric, MetricProtocol, solve

D, OUT, BATCHES, SIZE = 60, 20, 5, 7


def spd(d: int, condition: float, seed: int = 0) -> Tensor:
    """A C0 of a given condition number."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = condition ** torch.linspace(0, -1, d, dtype=torch.float64)
    C0 = (basis * values) @ basis.T
    return (C0 + C0.T) / 2


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def emmet(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """R (K' C0^-1 K)^-1 K' C0^-1, to the letter."""
    inverse = torch.linalg.inv(C0)
    return R @ torch.linalg.inv(K.T @ inverse @ K) @ K.T @ inverse


def memit(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """R K' (lam C0 + K K')^-1, to the letter."""
    return R @ K.T @ torch.linalg.inv(lam * C0 + K @ K.T)


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    """K and what is asked of it, beyond what the weight gives at the time."""
    return [
        (drawn(D, SIZE, seed=10 + t), drawn(OUT, SIZE, seed=50 + t)) for t in range(BATCHES)
    ]  # fmt: skip


def written(
    metric: MetricProtocol, W0: Tensor, batches: list[tuple[Tensor, Tensor]], kind: str | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """W after all batches, the values asked for, and the update of each batch."""
    W, asked, updates, lam = W0, [], [], 0.3
    for K, R in batches:
        asked.append(W @ K + R)
        update = solve(metric, K, R, ridge=lam if kind == "soft" else 0.0).delta
        W, updates = W + update, [*updates, update]
        if kind == "hard":
            metric = metric.holding(K) if isinstance(metric, Held) else Held(metric, K)
        elif kind == "soft":
            metric = metric.plus(K, 1 / lam)
    return W, asked, updates


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_equalities_of_all_batches_hold_and_add_up_to_one(batches, condition) -> None:
    """held-sum: the sum is EMMET's solution of all pairs with R = V - W0 K."""
    C0, W0 = spd(D, condition), drawn(OUT, D, seed=1)
    W, asked, updates = written(Metric(C0), W0, batches, "hard")
    K, V = torch.cat([K for K, _ in batches], dim=1), torch.cat(asked, dim=1)
    assert relative(W @ K, V) < 1e-11, "an earlier equality does not hold any more"
    for t, update in enumerate(updates):
        past = torch.cat([torch.zeros(D, 0, dtype=K.dtype), *(K for K, _ in batches[:t])], dim=1)
        assert (update @ past).norm() < 1e-11 * update.norm() * max(1.0, past.norm())
    assert relative(W - W0, emmet(C0, K, V - W0 @ K)) < 1e-12 * condition
    assert relative(W - W0, solve(C0, K, V - W0 @ K).delta) < 1e-11
    # the blind form is another matter, or this says nothing
    blind, also_asked, _ = written(Metric(C0), W0, batches, None)
    first = batches[0][0]
    assert relative(blind @ first, also_asked[0]) > 0.1


def test_least_squares_with_its_past_adds_up_to_one(batches) -> None:
    """soft-sum (arXiv 2605.26670): R_t K_t' (lam C0 + sum K_s K_s')^-1."""
    C0, W0, lam = spd(D, 1e3), drawn(OUT, D, seed=1), 0.3
    W, asked, updates = written(Metric(C0), W0, batches, "soft")
    K, V = torch.cat([K for K, _ in batches], dim=1), torch.cat(asked, dim=1)
    assert relative(W - W0, memit(C0, K, V - W0 @ K, lam)) < 1e-11
    for t, update in enumerate(updates):
        Kt, Rt = batches[t]
        seen = torch.cat([K for K, _ in batches[: t + 1]], dim=1)
        literal = Rt @ Kt.T @ torch.linalg.inv(lam * C0 + seen @ seen.T)
        assert relative(update, literal) < 1e-11


def test_an_update_is_the_cheapest_that_leaves_the_past_alone() -> None:
    """held-update: its gradient, Delta C0, answers to the keys of past and present alone."""
    C0, past, K = spd(D, 1e3), drawn(D, 9, seed=2), drawn(D, 4, seed=3)
    update = solve(Held(C0, past), K, drawn(OUT, 4, seed=4)).delta
    both = torch.cat([past, K], dim=1)
    Q = torch.linalg.qr(both).Q
    gradient = update @ C0
    assert relative(gradient @ Q @ Q.T, gradient) < 1e-12
    zero = torch.cat([torch.zeros(OUT, 9, dtype=K.dtype), drawn(OUT, 4, seed=4)], dim=1)
    assert relative(update, emmet(C0, both, zero)) < 1e-10


def test_least_squares_beside_keys_that_are_held() -> None:
    """In coordinates of what is orthogonal to the past it is MEMIT's formula."""
    C0, past, K, R = spd(D, 1e2), drawn(D, 9, seed=2), drawn(D, 4, seed=3), drawn(OUT, 4, seed=4)
    N = torch.linalg.svd(past.T, full_matrices=True).Vh[9:].T  # Delta = X N'
    inner = memit(N.T @ C0 @ N, N.T @ K, R, 0.5) @ N.T
    assert relative(solve(Held(C0, past), K, R, ridge=0.5).delta, inner) < 1e-11
    assert float((inner @ past).norm()) < 1e-11
    more = drawn(D, 70, seed=5)  # more facts than dimensions
    R = drawn(OUT, 70, seed=6)
    inner = memit(N.T @ C0 @ N, N.T @ more, R, 0.5) @ N.T
    assert relative(solve(Held(C0, past), more, R, ridge=0.5).delta, inner) < 1e-11


def test_plus_and_holding_are_what_one_step_gives() -> None:
    C0, first, second, K = (
        spd(D, 1e3), drawn(D, 5, seed=2), drawn(D, 6, seed=3), drawn(D, 4, seed=4),
    )  # fmt: skip
    R = drawn(OUT, 4, seed=5)
    steps, once = Held(C0, first).holding(second), Held(C0, torch.cat([first, second], dim=1))
    assert steps.room == once.room == D - 11
    assert relative(solve(steps, K, R).delta, solve(once, K, R).delta) < 1e-12
    added = Held(C0, first).plus(second, 0.7)
    other = Held(C0 + 0.7 * second @ second.T, first)
    assert relative(solve(added, K, R).delta, solve(other, K, R).delta) < 1e-11
    assert isinstance(added, MetricProtocol) and added.dim == D and added.device == C0.device
    left, right = drawn(OUT, 3, seed=6), drawn(3, D, seed=7)
    assert added.cost(left, right) == pytest.approx(other.inner.cost(left, right), rel=1e-11)
    assert steps.nbytes == 8 * (2 * D * 11)


def test_what_is_left_of_a_key() -> None:
    """The share outside of the span, in the coordinates in which C0 is the identity."""
    C0, past = spd(D, 1e2), drawn(D, 5, seed=2)
    held = Held(C0, past)
    L = torch.linalg.cholesky(C0)
    key = drawn(D, 1, seed=3)
    a, A = torch.linalg.solve(L, key), torch.linalg.solve(L, past)
    rest = a - A @ torch.linalg.lstsq(A, a).solution
    assert float(held.left(key)) == pytest.approx(float(rest.norm() / a.norm()), rel=1e-10)
    assert float(held.left(past @ drawn(5, 1, seed=4))) < 1e-12
    outside = L @ torch.linalg.svd(A, full_matrices=True).U[:, -1:]
    assert float(held.left(outside)) == pytest.approx(1.0, rel=1e-12)


def test_keys_that_depend_on_each_other_take_no_more_room() -> None:
    C0, past = spd(D, 1e2), drawn(D, 5, seed=2)
    again = torch.cat([past, past @ drawn(5, 3, seed=3), 1e-9 * past[:, :1]], dim=1)
    held = Held(C0, again)
    assert held.room == D - 5
    assert held.holding(past * 3).room == D - 5
    Q = held.basis
    assert float((Q.T @ Q - torch.eye(5, dtype=Q.dtype)).norm()) < 1e-13


def test_nothing_held_is_the_metric_itself() -> None:
    C0, K, R = spd(D, 1e2), drawn(D, 4, seed=4), drawn(OUT, 4, seed=5)
    nothing = Held(C0, torch.zeros(D, 0))
    assert nothing.room == D
    assert torch.equal(solve(nothing, K, R).delta, solve(C0, K, R).delta)


def test_a_key_without_room_is_refused_by_name() -> None:
    C0, past = spd(D, 1e2), drawn(D, 5, seed=2)
    K = torch.cat([drawn(D, 1, seed=3), past @ drawn(5, 1, seed=4)], dim=1)
    held = Held(C0, past)
    with pytest.raises(InfeasibleError, match=r"fact 1 \(old\) is next to nothing"):
        solve(held, K, drawn(OUT, 2, seed=5), names=["new", "old"])
    # it comes out as zero: the solver has no other way to tell it from one that is merely short
    assert not held.whiten(K)[:, 1].any() and held.whiten(K)[:, 0].any()
    # the limit lam -> 0 writes what can be written
    update = solve(held, K, drawn(OUT, 2, seed=5), infeasible="least_violation").delta
    assert relative(update @ K[:, :1], drawn(OUT, 2, seed=5)[:, :1]) < 1e-11


def test_more_facts_than_dimensions_are_refused() -> None:
    held = Held(spd(D, 1e2), drawn(D, D - 3, seed=2))
    assert held.room == 3
    solve(held, drawn(D, 3, seed=3), drawn(OUT, 3, seed=4))
    with pytest.raises(InfeasibleError, match="rank 3"):
        solve(held, drawn(D, 4, seed=3), drawn(OUT, 4, seed=4))


@pytest.mark.parametrize("K", [torch.zeros(D + 1, 2), torch.zeros(D)], ids=["rows", "vector"])
def test_keys_that_do_not_fit(K) -> None:
    with pytest.raises(ObjectiveError):
        Held(spd(D, 1e2), K)


def test_dead_coordinates_stay_dead() -> None:
    C0 = spd(D, 1e2)
    C0[3], C0[:, 3] = 0.0, 0.0
    past, K = drawn(D, 5, seed=2), drawn(D, 4, seed=3)
    past[3], K[3] = 0.0, 0.0
    update = solve(Held(C0, past), K, drawn(OUT, 4, seed=4)).delta
    assert float(update[:, 3].norm()) == 0.0
    assert float((update @ past).norm()) < 1e-11
