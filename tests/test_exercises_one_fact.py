"""The chapter "One fact, three algorithms": its equation of the library, and the check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unified_edit.teaching.exercises import ExerciseError, check_apart
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.one_fact import apart
from unified_edit.teaching.exercises.updates import moment


def literal(C0: Tensor, y: Tensor, k: Tensor, z: Tensor, m: Tensor) -> Tensor:
    """tr(D C0 D') with the two updates written out."""
    inverse = torch.linalg.inv(C0)
    D = torch.outer(y, inverse @ k) - torch.outer(z, inverse @ m)
    return torch.trace(D @ C0 @ D.T)


@pytest.mark.equation("one-fact-distance")
def test_how_far_two_updates_are_apart() -> None:
    for seed in range(5):
        C0, y, z = moment(seed, 6), draw(10 + seed, 4), draw(20 + seed, 4)
        k, m = draw(30 + seed, 6), draw(40 + seed, 6)
        cost = apart(C0, y, k, z, m)
        assert torch.isclose(cost, literal(C0, y, k, z, m), rtol=1e-10)
        first, second = (literal(C0, a, b, 0 * z, m) for a, b in ((y, k), (z, m)))
        inner = [k @ torch.linalg.solve(C0, other) for other in (k, m)]
        inner.append(m @ torch.linalg.solve(C0, m))
        q = (second / first).sqrt()
        columns = y @ z / (y.norm() * z.norm())
        rows = inner[1] / (inner[0] * inner[2]).sqrt()
        assert torch.isclose(cost / first, 1 + q**2 - 2 * q * columns * rows, rtol=1e-10)


def test_the_matrices_written_out_pass() -> None:
    assert check_apart(literal).startswith("Right.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda C0, y, k, z, m: literal(C0, y, k, z, m).sqrt(), "its root"),
        (lambda C0, y, k, z, m: literal(C0, y, k, -z, m), "cost of the sum"),
        (
            lambda C0, y, k, z, m: literal(C0, y, k, 0 * z, m) + literal(C0, z, m, 0 * z, m),
            "mixed term is missing",
        ),
        (
            lambda C0, y, k, z, m: literal(torch.eye(len(C0)).double(), y, k, z, m),
            "ordinary product of the keys",
        ),
    ],
)
def test_what_is_wrong_is_said(wrong, message) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_apart(wrong)
