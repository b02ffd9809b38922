"""Checks of the chapter "What to preserve", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.objective import Metric
from unified_edit.statistics.key_statistics import KeyStatistics, Source
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.preserving import (
    check_rarities,
    check_second_moment,
    check_shrink,
    key_rarities,
    mean_second_moment,
    shrunk_moment,
)

Check = Callable[[Any], str]


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def keys(d: int, count: int) -> Tensor:
    return torch.from_numpy(rng().standard_normal((d, count)))


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("preserve-c0", "preserve-error")
def test_the_preservation_error_is_the_mean_over_keys() -> None:
    K0, left, right = keys(5, 12), keys(3, 2), keys(2, 5)
    C0 = mean_second_moment(K0)
    assert torch.allclose(C0, sum(torch.outer(k, k) for k in K0.T) / 12)
    changes = [float((left @ right @ k).square().sum()) for k in K0.T]
    # the cost is a sum of 15 squares of numbers of order one, all in float64
    assert Metric(C0).cost(left, right) == pytest.approx(np.mean(changes), rel=1e-12)


@pytest.mark.equation("preserve-price")
def test_no_update_is_cheaper_than_the_price() -> None:
    C0, k = mean_second_moment(keys(5, 12)), keys(5, 1)
    r = torch.tensor([[1.0], [2.0], [-1.0]]).double()
    (rarity,) = key_rarities(C0, k)
    inverse = torch.linalg.inv(C0)
    assert float(rarity) == pytest.approx(float(k.T @ inverse @ k), rel=1e-10)
    best = ue.objective.solve(C0, k, r)
    assert best.diagnosis.preservation_error == pytest.approx(float(r.square().sum() / rarity))
    for seed in range(20):
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 5)))
        other = best.delta + noise - (noise @ k) @ k.T / (k.T @ k)
        assert torch.allclose(other @ k, r)
        cost = Metric(C0).cost(other, torch.eye(5, dtype=torch.float64))
        assert cost > best.diagnosis.preservation_error


@pytest.mark.equation("preserve-shrinkage")
def test_shrinkage_lifts_every_eigenvalue() -> None:
    C0 = mean_second_moment(keys(6, 4))  # of rank 4
    source = Source("f", "m", None, "float32", "c", 1, 4, 96, "0")
    shrunk = KeyStatistics(source, {0: C0}, {0: 0.0}).shrunk(0.1).C0(0)
    assert torch.allclose(shrunk, shrunk_moment(C0, 0.1))
    lifted, old = torch.linalg.eigvalsh(shrunk), torch.linalg.eigvalsh(C0)
    assert torch.allclose(lifted, old + 0.1 * C0.trace() / 6)
    assert lifted[-1] / lifted[0] <= 1 + 6 / 0.1


@pytest.mark.equation("preserve-inflation")
def test_rarity_is_overestimated_as_the_theorem_says() -> None:
    d, n, repeats = 6, 15, 4000
    draws = torch.from_numpy(rng().standard_normal((repeats, d, n)))
    k = keys(d, 1)
    found = k.T @ torch.linalg.solve(draws @ draws.mT / n, k.expand(repeats, d, 1))
    ratio = float(found.mean() / (k.T @ k))
    # n / chi2 with 10 degrees of freedom: relative standard deviation 0.58, over sqrt(4000) 0.01
    assert ratio == pytest.approx(n / (n - d - 1), rel=0.04)


# --- checks ---------------------------------------------------------------------------------------


def cholesky_rarities(C0: Tensor, K: Tensor) -> Tensor:
    return (K * torch.cholesky_solve(K, torch.linalg.cholesky(C0))).sum(dim=0)


def eye(C0: Tensor) -> Tensor:
    return torch.eye(len(C0), dtype=C0.dtype)


def in_place(C0: Tensor, eps: float) -> Tensor:
    C0.diagonal().add_(eps * C0.diagonal().mean())
    return C0


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_second_moment, mean_second_moment),
        (check_second_moment, lambda K: torch.einsum("in,jn->ij", K, K) / K.shape[1]),
        (check_second_moment, lambda K: (K.numpy() @ K.numpy().T) / K.numpy().shape[1]),
        (check_rarities, key_rarities),
        (check_rarities, cholesky_rarities),
        (check_rarities, lambda C0, K: [float(k @ torch.linalg.solve(C0, k)) for k in K.T]),
        (check_shrink, shrunk_moment),
        (check_shrink, lambda C0, eps: C0 + torch.diag(eps * C0.diagonal().mean().expand(len(C0)))),
    ],
    ids=range(8),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_second_moment, None, "was given nothing"),
        (check_second_moment, lambda K: None, "returned nothing"),
        (check_second_moment, lambda K: K.T @ K / K.shape[1], r"must have shape \(3, 3\)"),
        (check_second_moment, lambda K: K @ K.T, "divide by N"),
        (check_second_moment, lambda K: K @ K.T / len(K), "you divided by d_k"),
        (check_second_moment, lambda K: K @ K.T / (K.shape[1] - 1), "you divided by N - 1;"),
        (check_second_moment, lambda K: torch.cov(K, correction=0), "subtracted the mean key"),
        (check_second_moment, torch.cov, "this is a covariance"),
        (check_rarities, None, "was given nothing"),
        (check_rarities, lambda C0, K: ..., "returned nothing"),
        (check_rarities, lambda C0, K: K.T @ torch.linalg.solve(C0, K), "are its diagonal"),
        (check_rarities, lambda C0, K: (K * (C0 @ K)).sum(0), "this is k' C0 k"),
        (check_rarities, lambda C0, K: 1 / key_rarities(C0, K), "this is the price"),
        (check_rarities, lambda C0, K: key_rarities(C0, K).sqrt(), "square it"),
        (
            check_rarities,
            lambda C0, K: torch.linalg.solve(C0, K).square().sum(0),
            "squared norm of C0",
        ),
        (check_rarities, lambda C0, K: torch.linalg.solve(C0, K).sum(0), "by those of k first"),
        (
            check_rarities,
            lambda C0, K: torch.linalg.solve(torch.linalg.cholesky(C0).T, K).square().sum(0),
            "the transpose of L",
        ),
        (check_rarities, lambda C0, K: key_rarities(C0, K)[:, None], "an axis of length one"),
        (
            check_rarities,
            lambda C0, K: (K * (torch.linalg.pinv(C0, rtol=1e-9) @ K)).sum(0),
            "a small eigenvalue of C0 was cut off",
        ),
        (
            check_rarities,
            lambda C0, K: key_rarities(C0 + 1e-9 * eye(C0), K),
            "1.0e-09 was added to the diagonal of C0",
        ),
        (check_rarities, lambda C0, K: K.square().sum(0), "C0 does not enter"),
        (check_rarities, lambda C0, K: K.T @ K, r"must have shape \(3,\), yours has \(3, 3\)"),
        (check_rarities, lambda C0, K: -key_rarities(C0, K), "their sign is the wrong way round"),
        (check_shrink, None, "was given nothing"),
        (check_shrink, lambda C0, eps: None, "returned nothing"),
        (check_shrink, in_place, "changed its argument `C0`"),
        (check_shrink, lambda C0, eps: C0 + eps * eye(C0), "scale it by the mean eigenvalue"),
        (check_shrink, lambda C0, eps: C0 + eps * C0.trace() * eye(C0), "the whole trace"),
        (check_shrink, lambda C0, eps: C0 + eps * C0.trace() / len(C0), "to every entry"),
        (
            check_shrink,
            lambda C0, eps: (1 - eps) * C0 + eps * C0.trace() / len(C0) * eye(C0),
            "scaled down",
        ),
        (check_shrink, lambda C0, eps: C0 + eps * C0.mean() * eye(C0), "mean of all entries"),
        (
            check_shrink,
            lambda C0, eps: torch.diag(C0.diagonal() * 1 + eps * C0.trace() / len(C0)),
            "only the diagonal",
        ),
    ],
    ids=range(32),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)


@pytest.mark.parametrize(
    ("inverse", "word"),
    [
        (torch.linalg.inv, "torch.linalg.inv"),
        (torch.inverse, "inverse"),
        (lambda C0: C0.inverse(), "inverse"),
        (lambda C0: torch.linalg.inv_ex(C0).inverse, "torch.linalg.inv_ex"),
        (lambda C0: torch.linalg.pinv(C0, rtol=0.0), "torch.linalg.pinv"),
        (lambda C0: torch.linalg.matrix_power(C0, -1), "matrix_power"),
        (lambda C0: torch.cholesky_inverse(torch.linalg.cholesky(C0)), "torch.cholesky_inverse"),
        (lambda C0: torch.linalg.solve(C0, eye(C0)), "solve with the identity"),
        (
            lambda C0: torch.cholesky_solve(eye(C0), torch.linalg.cholesky(C0)),
            "cholesky_solve with the identity",
        ),
    ],
    ids=range(9),
)
def test_an_inverse_is_noticed_and_said_kindly(inverse: Any, word: str) -> None:
    def rarities(C0: Tensor, K: Tensor) -> Tensor:
        return (K * (inverse(C0) @ K)).sum(dim=0)

    message = rf"^the numbers are right. But `rarities` makes an inverse \(`{word}.*`\).*solve with"
    with pytest.raises(ExerciseError, match=message):
        check_rarities(rarities)


def test_an_inverse_by_numpy_is_noticed_by_its_name() -> None:
    def rarities(C0: Tensor, K: Tensor) -> Any:
        return (K.numpy() * (np.linalg.inv(C0.numpy()) @ K.numpy())).sum(axis=0)

    with pytest.raises(ExerciseError, match=r"the numbers are right.*`inv`"):
        check_rarities(rarities)


def test_wrong_numbers_are_told_before_an_inverse() -> None:
    with pytest.raises(ExerciseError, match="square it"):
        check_rarities(lambda C0, K: (K * (C0.inverse() @ K)).sum(dim=0).sqrt())
