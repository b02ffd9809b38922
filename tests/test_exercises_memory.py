"""Checks of the chapter "The MLP as an associative memory", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.memory import (
    check_add_association,
    check_associative_memory,
    check_crosstalk,
    crosstalk_of,
    smallest_memory,
    with_association,
)

Check = Callable[[Any], str]


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("memory-outer", "memory-crosstalk")
def test_what_an_outer_product_memory_recalls() -> None:
    K, V = draw(0, 5, 4), draw(1, 3, 4)
    W = sum(torch.outer(v, k) for k, v in zip(K.T, V.T, strict=True))
    own = V * K.square().sum(dim=0)
    # sums of a handful of products of numbers of order one, in float64
    assert torch.allclose(W @ K, own + crosstalk_of(K, V), rtol=1e-12, atol=1e-12)
    orthonormal = torch.linalg.qr(K).Q
    assert crosstalk_of(orthonormal, V).norm() < 1e-12


@pytest.mark.equation("memory-normal", "memory-pinv")
@pytest.mark.parametrize("count", [3, 5, 9])
def test_the_pseudoinverse_memory_is_the_smallest_of_the_best(count: int) -> None:
    K, V = draw(0, 5, count), draw(1, 3, count)
    W = smallest_memory(K, V)
    assert torch.allclose(W @ K @ K.T, V @ K.T, atol=1e-10)
    best = (W @ K - V).norm()
    assert (best < 1e-10) == (count <= 5)
    for seed in range(20):
        other = W + draw(10 + seed, 3, 5)
        assert (other @ K - V).norm() > best
        free = (other - W) @ (eye(5) - K @ torch.linalg.pinv(K))  # does nothing to the keys
        if count < 5:
            assert torch.allclose((W + free) @ K, W @ K, atol=1e-10)
            assert (W + free).norm() > W.norm()


@pytest.mark.equation("memory-pinv", "memory-add")
def test_the_library_with_an_identity_for_c0_adds_associations() -> None:
    W0, K, V = draw(0, 3, 6), draw(1, 6, 2), draw(2, 3, 2)
    delta = ue.objective.solve(eye(6), K, V - W0 @ K).delta
    assert torch.allclose(delta, smallest_memory(K, V - W0 @ K), atol=1e-12)
    one = ue.objective.solve(eye(6), K[:, :1], (V - W0 @ K)[:, :1]).delta
    assert torch.allclose(W0 + one, with_association(W0, K[:, 0], V[:, 0]), atol=1e-12)


@pytest.mark.equation("memory-add", "memory-disturb")
def test_adding_disturbs_by_the_product_of_the_keys() -> None:
    W, k, v, x = draw(0, 3, 6), draw(1, 6), draw(2, 3), draw(3, 6)
    new = with_association(W, k, v)
    assert torch.allclose(new @ k, v)
    assert torch.allclose(new @ x - W @ x, (k @ x) / (k @ k) * (v - W @ k))
    orthogonal = x - (x @ k) / (k @ k) * k
    assert torch.allclose(new @ orthogonal, W @ orthogonal)


@pytest.mark.equation("memory-noise", "memory-beyond")
def test_errors_of_random_memories_are_as_the_theorems_say() -> None:
    d_k, count, repeats = 12, 20, 400
    K = draw(0, repeats, d_k, count)
    K = K / K.norm(dim=1, keepdim=True)
    V = draw(1, repeats, 3, count)
    outer = (V @ K.mT @ K - V).square().sum() / V.square().sum()
    # 24,000 squares of about 19/12, dependent within a memory: a few percent
    assert float(outer) == pytest.approx((count - 1) / d_k, rel=0.05)
    least = (V @ torch.linalg.pinv(K) @ K - V).square().sum() / V.square().sum()
    assert float(least) == pytest.approx(1 - d_k / count, rel=0.05)


# --- checks ---------------------------------------------------------------------------------------


def by_loop(K: Tensor, V: Tensor) -> Tensor:
    columns = []
    for j in range(K.shape[1]):
        columns.append(sum(K[:, i] @ K[:, j] * V[:, i] for i in range(K.shape[1]) if i != j))
    return torch.stack(columns, dim=1)  # type: ignore[arg-type]


def recalled_minus_own(K: Tensor, V: Tensor) -> Tensor:
    return V @ K.T @ K - V * K.square().sum(dim=0)


def by_lstsq(K: Tensor, V: Tensor) -> Tensor:
    return torch.linalg.lstsq(K.T, V.T, driver="gelsd").solution.T


def by_gram(K: Tensor, V: Tensor) -> Tensor:
    return V @ torch.linalg.inv(K.T @ K) @ K.T


def with_more(K: Tensor, V: Tensor) -> Tensor:
    free = eye(len(K)) - K @ torch.linalg.pinv(K)
    return smallest_memory(K, V) + torch.ones(len(V), len(K), dtype=torch.float64) @ free


def by_solve(W: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return W + ue.objective.solve(eye(len(k)), k[:, None], (v - W @ k)[:, None]).delta


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_crosstalk, crosstalk_of),
        (check_crosstalk, by_loop),
        (check_crosstalk, recalled_minus_own),
        (check_crosstalk, lambda K, V: crosstalk_of(K, V).numpy()),
        (check_associative_memory, smallest_memory),
        (check_associative_memory, by_lstsq),
        (check_associative_memory, lambda K, V: (torch.linalg.pinv(K.T) @ V.T).T),
        (check_add_association, with_association),
        (check_add_association, by_solve),
        (check_add_association, lambda W, k, v: W @ (eye(len(k)) - torch.outer(k, k) / (k @ k))
         + torch.outer(v, k) / k.norm() ** 2),
    ],
    ids=range(10),
)  # fmt: skip
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_crosstalk, None, "was given nothing"),
        (check_crosstalk, lambda K, V: None, "returned nothing"),
        (check_crosstalk, lambda K, V: V @ K.T @ K, "leave out the pair's own part"),
        (check_crosstalk, lambda K, V: V @ K.T @ K - V, "not of length one"),
        (
            check_crosstalk,
            lambda K, V: crosstalk_of(K / K.norm(dim=0), V),
            "you took the cosines",
        ),
        (check_crosstalk, lambda K, V: -crosstalk_of(K, V), "its sign is the wrong way round"),
        (
            check_crosstalk,
            lambda K, V: crosstalk_of(K, V).sum(1, keepdim=True).repeat(1, V.shape[1]),
            "every column is the same",
        ),
        (
            check_crosstalk,
            lambda K, V: V @ ((K.T @ K).square() - torch.diag((K.T @ K).diagonal() ** 2)),
            "were squared",
        ),
        (check_crosstalk, lambda K, V: crosstalk_of(K, V).T, "the shape of its transpose"),
        (check_crosstalk, lambda K, V: K.T @ K, "must have shape"),
        (check_associative_memory, None, "was given nothing"),
        (check_associative_memory, lambda K, V: ..., "returned nothing"),
        (check_associative_memory, lambda K, V: V @ K.T, "these are outer products alone"),
        (
            check_associative_memory,
            lambda K, V: V @ (K / K.norm(dim=0)).T,
            "with keys of length one",
        ),
        (
            check_associative_memory,
            lambda K, V: V @ (K / K.square().sum(0)).T,
            "only where keys are orthogonal",
        ),
        (check_associative_memory, with_more, "W is not the smallest such matrix"),
        (
            check_associative_memory,
            by_gram,
            r"for 6 keys with 3 entries, `by_gram` inverts a 6 x 6 matrix that has no inverse",
        ),
        (
            check_associative_memory,
            lambda K, V: V @ torch.linalg.solve(K.T @ K, K.T),
            "6 x 6 matrix that has no inverse",
        ),
        (
            check_associative_memory,
            lambda K, V: V @ K.T @ torch.linalg.inv(K @ K.T),
            "for 3 keys with 5 entries, your function inverts a 5 x 5 matrix",
        ),
        (
            check_associative_memory,
            lambda K, V: by_gram(K, V) if K.shape[1] < 4 else smallest_memory(K, V),
            "of which two are the same, your function inverts a 3 x 3 matrix",
        ),
        (
            check_associative_memory,
            lambda K, V: V @ K.T @ torch.linalg.inv(K @ K.T + 0.25 * eye(len(K))),
            "a ridge of 0.25 was added",
        ),
        (
            check_associative_memory,
            lambda K, V: smallest_memory(K, V) + 1.0,
            "W K can be V here, and misses it by",
        ),
        (check_associative_memory, lambda K, V: smallest_memory(K, V).T, "of its transpose"),
        (
            check_associative_memory,
            lambda K, V: V @ K.T @ torch.linalg.inv(K @ K.T + 1e-9 * eye(len(K))),
            "differ by a millionth, is not right: a ridge of 1.0e-09 was",
        ),
        (
            check_associative_memory,
            lambda K, V: V @ torch.linalg.pinv(K, rtol=1e-4),
            "the singular value that tells the two apart was cut off",
        ),
        (check_add_association, None, "was given nothing"),
        (check_add_association, lambda W, k, v: None, "returned nothing"),
        (
            check_add_association,
            lambda W, k, v: W + torch.outer(v, k) / (k @ k),
            "add v - W k, what is missing",
        ),
        (
            check_add_association,
            lambda W, k, v: W + torch.outer(v - W @ k, k),
            "it is not divided by k'k",
        ),
        (
            check_add_association,
            lambda W, k, v: W + torch.outer(v - W @ k, k) / k.norm(),
            "divide by its square",
        ),
        (check_add_association, lambda W, k, v: W + torch.outer(v, k), "neither what is stored"),
        (
            check_add_association,
            lambda W, k, v: torch.outer(v - W @ k, k) / (k @ k),
            "this is the change alone",
        ),
        (
            check_add_association,
            lambda W, k, v: W + torch.outer(W @ k - v, k) / (k @ k),
            "the residual has the wrong sign",
        ),
        (
            check_add_association,
            lambda W, k, v: torch.outer(v, k) / (k @ k),
            "holds the new pair only",
        ),
        (check_add_association, lambda W, k, v: W.add_(1.0), "changed its argument `W`"),
    ],
    ids=range(35),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
