"""Checks of the chapter "The bridge", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.editing import SETTINGS
from unified_edit.errors import InfeasibleError
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.bridge import (
    both_errors,
    check_bridge,
    check_filter,
    check_frontier,
    filtered_update,
    from_released,
)
from unified_edit.teaching.exercises.checking import draw

Check = Callable[[Any], str]


def moment(d: int) -> Tensor:
    K0 = draw(1, d, 3 * d)
    return K0 @ K0.T / K0.shape[1]


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def solve(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    return ue.objective.solve(C0, K, R, ridge=lam, infeasible="least_violation").delta


def by_bracket(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    return torch.linalg.solve(lam * C0 + K @ K.T, K @ R.T).T


def by_gram(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    row_space = torch.linalg.solve(C0, K).T
    return R @ torch.linalg.inv(lam * eye(K.shape[1]) + row_space @ K) @ row_space


def released(C0: Tensor, K: Tensor, R: Tensor, w: float, alpha: float) -> Tensor:
    inverse = torch.inverse(w * C0)
    gram = K.T @ inverse @ K + alpha * eye(K.shape[1])
    return R @ torch.inverse(gram) @ K.T @ inverse


def problem(E: int, repeated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """C0, K and R with keys of five entries; on wish, the last key is the first one again."""
    K = draw(2, 5, E)
    if repeated:
        K[:, -1] = K[:, 0]
    return moment(5), K, draw(3, 4, E)


# --- equations ------------------------------------------------------------------------------------

# C0 of 15 keys with 5 entries has a condition below 100, and the brackets below 1e5: float64
# leaves ten digits, and the tolerances ask for eight.


@pytest.mark.equation("bridge-push-through", "bridge-identity")
@pytest.mark.parametrize(
    ("E", "repeated"), [(1, False), (3, False), (5, False), (9, False), (3, True)]
)
def test_the_small_bracket_does_what_the_large_one_does(E: int, repeated: bool) -> None:
    C0, K, R = problem(E, repeated)
    row_space = torch.linalg.solve(C0, K).T
    for lam in (-0.5, 0.0, 0.7):
        left = (lam * eye(E) + row_space @ K) @ K.T
        assert torch.allclose(left, row_space @ (lam * C0 + K @ K.T), rtol=1e-8, atol=1e-10)
    for lam in (1e-2, 1.0, 1e3):
        delta = solve(C0, K, R, lam)
        assert torch.allclose(delta, by_bracket(C0, K, R, lam), rtol=1e-8, atol=1e-10)
        assert torch.allclose(delta, by_gram(C0, K, R, lam), rtol=1e-8, atol=1e-10)


@pytest.mark.equation("bridge-svd")
@pytest.mark.parametrize(("E", "repeated"), [(3, False), (9, False), (3, True)])
def test_the_library_filters_singular_values(E: int, repeated: bool) -> None:
    C0, K, R = problem(E, repeated)
    for lam in (0.0, 1e-2, 1.0, 1e3):
        assert torch.allclose(solve(C0, K, R, lam), filtered_update(C0, K, R, lam), atol=1e-8)


@pytest.mark.equation("bridge-errors")
@pytest.mark.parametrize(("E", "repeated"), [(3, False), (9, False), (3, True)])
def test_the_errors_are_sums_over_combinations(E: int, repeated: bool) -> None:
    C0, K, R = problem(E, repeated)
    lams = torch.tensor([1e-2, 0.3, 1.0, 50.0]).double()
    for lam, P, M in zip(lams.tolist(), *both_errors(C0, K, R, lams), strict=True):
        diagnosis = ue.objective.solve(C0, K, R, ridge=lam).diagnosis
        assert diagnosis.preservation_error == pytest.approx(float(P), rel=1e-8)
        missing = (diagnosis.memorization_error * float(R.norm())) ** 2
        assert missing == pytest.approx(float(M), rel=1e-8)


@pytest.mark.equation("bridge-slope")
@pytest.mark.parametrize("E", [3, 9])
def test_the_frontier_is_convex_and_nothing_is_below_it(E: int) -> None:
    C0, K, R = problem(E)
    lams = torch.logspace(-3, 3, 400, dtype=torch.float64)
    P, M = both_errors(C0, K, R, lams)
    assert (P.diff() < 0).all()
    assert (M.diff() > 0).all()
    slope = M.diff() / P.diff()  # by the mean value theorem, minus a lambda in between
    assert (-lams[1:] <= slope).all()
    assert (slope <= -lams[:-1]).all()
    at = solve(C0, K, R, 0.7)
    (P,), (M,) = both_errors(C0, K, R, torch.tensor([0.7]).double())
    for seed in range(50):
        other = at + 0.3 * draw(seed, 4, 5)
        cost = float(torch.trace(other @ C0 @ other.T))
        missing = float((other @ K - R).square().sum())
        assert 0.7 * cost + missing > 0.7 * float(P) + float(M)


@pytest.mark.equation("bridge-pseudoinverse", "bridge-limit")
@pytest.mark.parametrize(("E", "repeated"), [(3, False), (9, False), (3, True)])
def test_the_limit_is_the_least_violation(E: int, repeated: bool) -> None:
    C0, K, R = problem(E, repeated)
    row_space = torch.linalg.solve(C0, K).T
    limit = R @ torch.linalg.pinv(row_space @ K, rtol=1e-10) @ row_space
    found = ue.objective.solve(C0, K, R, infeasible="least_violation")
    assert torch.allclose(found.delta, limit, rtol=1e-7, atol=1e-9)
    dependent = repeated or E > 5
    assert found.diagnosis.form == ("least_violation" if dependent else "equality")
    if dependent:
        with pytest.raises(InfeasibleError):
            ue.objective.solve(C0, K, R)
    L = torch.linalg.cholesky(C0)
    squares = torch.linalg.eigvalsh(row_space @ K)
    smallest = float(squares[squares > 1e-10 * squares.max()].min())
    for lam in (1e-1, 1e-3, 1e-5):
        away = float(((solve(C0, K, R, lam) - limit) @ L).norm())
        assert away <= lam / (lam + smallest) * float((limit @ L).norm()) * (1 + 1e-6)


@pytest.mark.equation("bridge-infinity")
def test_facts_do_not_know_of_one_another_at_infinity() -> None:
    C0, K, R = problem(3)
    alone = sum(torch.outer(r, torch.linalg.solve(C0, k)) for r, k in zip(R.T, K.T, strict=True))
    # what is left out is G / lam, of norm below 100 / lam
    assert torch.allclose(1e9 * solve(C0, K, R, 1e9), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.equation("bridge-released")
@pytest.mark.parametrize(("w", "alpha"), [(1.0, 0.1), (1000.0, 0.1), (0.5, 3.0)])
def test_the_released_emmet_is_memit(w: float, alpha: float) -> None:
    C0, K, R = problem(3)
    literal = released(C0, K, R, w, alpha)
    lam, delta = from_released(C0, K, R, w, alpha)
    assert lam == alpha * w
    assert torch.allclose(delta, literal, rtol=1e-8, atol=1e-12)
    assert torch.allclose(solve(C0, K, R, alpha * w), literal, rtol=1e-8, atol=1e-12)
    assert torch.allclose(released(C0, K, R, w, 0.0) @ K, R)  # not damped: w cancels


@pytest.mark.equation("bridge-released")
def test_the_preset_of_the_library_is_the_released_setting() -> None:
    for key, w in ((("gpt2", 48, 1600), 1000), (("gptj", 28, 4096), 1)):
        assert SETTINGS[key]["EMMET_RELEASED"]["ridge"] == pytest.approx(0.1 * w)
    method = ue.EMMET_RELEASED.replace(ridge=100.0)
    assert (method.ridge_for(1), method.ridge_for(2)) == (0.0, 100.0)


# --- checks ---------------------------------------------------------------------------------------


def by_edit(C0: Tensor, K: Tensor, R: Tensor, w: float, alpha: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(w * alpha), by_gram(C0, K, R, w * alpha)


def by_pinv(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    if lam:
        return by_bracket(C0, K, R, lam)
    L = torch.linalg.cholesky(C0)
    return R @ torch.linalg.pinv(torch.linalg.solve(L, K), rtol=1e-9) @ torch.linalg.inv(L)


def svd_of(C0: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L = torch.linalg.cholesky(C0)
    return L, *torch.linalg.svd(torch.linalg.solve(L, K), full_matrices=False)


def with_filter(f: Callable[[Tensor, float], Tensor], cut: float = 1e-8) -> Callable[..., Tensor]:
    def filtered(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
        L, U, s, Vt = svd_of(C0, K)
        keep = s > cut * s[0]
        left = (R @ Vt[keep].T) * f(s[keep], lam)
        return left @ U[:, keep].T @ torch.linalg.inv(L)

    return filtered


def whitened(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    return filtered_update(C0, K, R, lam) @ torch.linalg.cholesky(C0)


def wrong_side(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    L = torch.linalg.cholesky(C0)
    return filtered_update(C0, K, R, lam) @ L @ torch.linalg.inv(L).T


def transposed(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    L, U, s, Vt = svd_of(C0, K)
    return ((R @ Vt) * (s / (s**2 + lam))) @ U.T @ torch.linalg.inv(L)


def in_a_loop(C0: Tensor, K: Tensor, R: Tensor, lams: Tensor) -> list[list[float]]:
    found = []
    for lam in lams.tolist():
        delta = by_bracket(C0, K, R, lam)
        cost, missing = torch.trace(delta @ C0 @ delta.T), (delta @ K - R).square().sum()
        found.append([float(cost), float(missing)])
    return [list(column) for column in zip(*found, strict=True)]


def without_delta(C0: Tensor, K: Tensor, R: Tensor, lams: Tensor) -> list[list[float]]:
    """By functions of the Gram matrix, one lambda after another."""
    G, found = K.T @ torch.linalg.solve(C0, K), []
    for lam in lams.tolist():
        left = torch.linalg.solve(G + lam * eye(len(G)), R.T).T
        found.append([float(((left @ G) * left).sum()), lam**2 * float(left.square().sum())])
    return [list(column) for column in zip(*found, strict=True)]


def thin(C0: Tensor, K: Tensor, R: Tensor, lams: Tensor) -> tuple[Tensor, Tensor]:
    _, _, s, Vt = svd_of(C0, K)
    keep = s > 1e-8 * s[0]
    squares, weights = s[keep] ** 2, (R @ Vt[keep].T).square().sum(dim=0)
    total = squares + lams[:, None]
    return (weights * squares / total**2).sum(1), (weights * (lams[:, None] / total) ** 2).sum(1)


def changed(f: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    """A frontier whose right result is spoilt by `f`."""
    return lambda C0, K, R, lams: f(*both_errors(C0, K, R, lams))


def terms(
    P: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    M: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A frontier with other terms in one of its sums, of s_i^2, lam and |R v_i|^2."""

    def frontier(C0: Tensor, K: Tensor, R: Tensor, lams: Tensor) -> tuple[Tensor, Tensor]:
        squares, V = torch.linalg.eigh(K.T @ torch.linalg.solve(C0, K))
        squares, weights = squares.clamp(min=0), (R @ V).square().sum(0)
        right = both_errors(C0, K, R, lams)
        new = [
            x if f is None else f(squares, lams[:, None], weights).sum(1)
            for x, f in zip(right, (P, M), strict=True)
        ]
        return new[0], new[1]

    return frontier


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_bridge, from_released),
        (check_bridge, by_edit),
        (check_bridge, lambda C0, K, R, w, a: [a * w, released(C0, K, R, w, a)]),
        (check_bridge, lambda C0, K, R, w, a: (a * w, solve(C0, K, R, a * w).numpy())),
        (check_filter, filtered_update),
        (check_filter, solve),
        (check_filter, by_pinv),
        (check_filter, with_filter(lambda s, lam: 1 / (s + lam / s))),
        (check_frontier, both_errors),
        (check_frontier, without_delta),
        (check_frontier, changed(lambda P, M: torch.stack([P, M]))),
    ],
    ids=range(11),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


def ridged(f: Callable[[float, float], float]) -> Callable[..., tuple[float, Tensor]]:
    """A right Delta with another lambda beside it."""
    return lambda C0, K, R, w, a: (f(w, a), by_bracket(C0, K, R, a * w))


def bracketed(f: Callable[[Tensor, Tensor, float, float], Tensor]) -> Callable[..., Any]:
    """A right lambda with another bracket in Delta."""

    def as_memit(C0: Tensor, K: Tensor, R: Tensor, w: float, a: float) -> tuple[float, Tensor]:
        return a * w, torch.linalg.solve(f(C0, K @ K.T, w, a), K @ R.T).T

    return as_memit


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_bridge, None, "was given nothing"),
        (check_bridge, lambda C0, K, R, w, a: None, "returned nothing"),
        (check_bridge, lambda C0, K, R, w, a: by_bracket(C0, K, R, a * w), "two things are asked"),
        (check_bridge, lambda C0, K, R, w, a: (1, 2, 3), "a tuple of 3"),
        (check_bridge, ridged(lambda w, a: w / a), "you divided w by lam_G"),
        (check_bridge, ridged(lambda w, a: a / w), "you divided lam_G by w"),
        (check_bridge, ridged(lambda w, a: w), "this is w alone"),
        (check_bridge, ridged(lambda w, a: a), "this is lam_G alone"),
        (check_bridge, lambda C0, K, R, w, a: (a * w * K.shape[1], R), "factor E too many"),
        (check_bridge, lambda C0, K, R, w, a: (a * w / K.shape[1], R), "you divided by E"),
        (check_bridge, lambda C0, K, R, w, a: (a * w, solve(C0, K, R, 0.0)), "holds the equality"),
        (check_bridge, bracketed(lambda C0, new, w, a: a * w * w * C0 + new), "contains w already"),
        (check_bridge, bracketed(lambda C0, new, w, a: a * C0 + new), "lam_G was used in place"),
        (check_bridge, bracketed(lambda C0, new, w, a: w * C0 + new), "w was used in place"),
        (check_bridge, bracketed(lambda C0, new, w, a: a * w * eye(4) + new), "at the identity"),
        (check_bridge, bracketed(lambda C0, new, w, a: C0 + a * w * new), "stands at K K'"),
        (check_bridge, lambda C0, K, R, w, a: (a * w, by_gram(C0, K, R, a * w).T), "its transpose"),
        (check_filter, None, "was given nothing"),
        (check_filter, lambda C0, K, R, lam: ..., "returned nothing"),
        (check_filter, by_gram, "raised|enormous"),
        (check_filter, whitened, "acts on whitened keys"),
        (
            check_filter,
            lambda C0, K, R, lam: filtered_update(C0, K, R, lam) @ C0,
            "its entries differ",
        ),
        (
            check_filter,
            lambda C0, K, R, lam: whitened(C0, K, R, lam) @ torch.linalg.cholesky(C0),
            "multiplied by L",
        ),
        (check_filter, wrong_side, "the transpose of L"),
        (check_filter, with_filter(lambda s, lam: s**2 / (s**2 + lam)), "is the share"),
        (check_filter, with_filter(lambda s, lam: s / (s + lam)), "the square of s below"),
        (check_filter, with_filter(lambda s, lam: 1 / (s + lam)), "was added to s"),
        (check_filter, with_filter(lambda s, lam: 1 / (s**2 + lam)), "the numerator s"),
        (check_filter, with_filter(lambda s, lam: s / (s**2 + lam**2)), "lam was squared"),
        (check_filter, with_filter(lambda s, lam: 1 / s), "lam is missing"),
        (
            check_filter,
            lambda C0, K, R, lam: filtered_update(eye(len(K)), K, R, lam),
            "made with C0 = I",
        ),
        (check_filter, transposed, "returns V'"),
        (check_filter, with_filter(lambda s, lam: s / (s**2 + lam), cut=0.0), "is enormous"),
        (check_filter, with_filter(lambda s, lam: s / (s**2 + lam), cut=1e-3), "taken for equal"),
        (
            check_filter,
            with_filter(lambda s, lam: s / (s**2 + (lam or 1e-9 * (s[-1] < 1e-4)))),
            "this is the update for lam = 1e-09, and not for the lam = 0",
        ),
        (check_frontier, None, "was given nothing"),
        (check_frontier, lambda C0, K, R, lams: None, "returned nothing"),
        (check_frontier, changed(lambda P, M: P), "two things are asked for"),
        (check_frontier, changed(lambda P, M: (M, P)), "this is M"),
        (check_frontier, changed(lambda P, M: (P.sqrt(), M)), "the root of P"),
        (check_frontier, changed(lambda P, M: (P, M.sqrt())), "the root of M"),
        (check_frontier, changed(lambda P, M: (P[:1], M)), r"must have shape \(4,\)"),
        (
            check_frontier,
            lambda C0, K, R, lams: (
                both_errors(C0, K, R, lams)[0],
                both_errors(C0, K, R, lams)[1] / R.square().sum(),
            ),
            r"divided by \|R\|",
        ),
        (check_frontier, thin, "are left out"),
        (check_frontier, in_a_loop, "the numbers are right. But `in_a_loop` computes Delta"),
        (
            check_filter,
            lambda C0, K, R, lam: by_bracket(C0, K, R, 2 * lam),
            "2 times the lam = 0.7",
        ),
        (check_frontier, terms(P=lambda s, lam, w: w * (s / (s + lam)) ** 2), "what is written"),
        (check_frontier, terms(P=lambda s, lam, w: w * s / (s + lam)), "the filter is not squared"),
        (check_frontier, terms(P=lambda s, lam, w: w / (s + lam) ** 2), "numerator sigma_i"),
        (check_frontier, terms(P=lambda s, lam, w: s / (s + lam) ** 2), r"\|R v_i\|\^2 is missing"),
        (check_frontier, terms(M=lambda s, lam, w: w * (s / (s + lam)) ** 2), "what is written"),
        (check_frontier, terms(M=lambda s, lam, w: w * lam / (s + lam)), "is not squared"),
        (check_frontier, terms(M=lambda s, lam, w: (lam / (s + lam)) ** 2), "is missing"),
    ],
    ids=range(53),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
