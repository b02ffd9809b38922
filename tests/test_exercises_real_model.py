"""Checks of the chapter "From atlas to a model that read the world", and its equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from unified_edit.objective import solve
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.real_model import (
    TABLES,
    check_smallest_strength,
    on_the_path,
    smallest_strength,
)

Lead = Callable[[float], float]

# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("real-path", "real-linear", "real-share")
def test_what_a_layer_gives_moves_linearly_with_the_strength() -> None:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W0, k, r, x = normal(4, 7), normal(7), normal(4), normal(7)
    keys = normal(7, 30)
    C0 = keys @ keys.T / 30
    delta = solve(C0, k[:, None], r[:, None]).delta
    share = k @ torch.linalg.solve(C0, x) / (k @ torch.linalg.solve(C0, k))
    for strength in (0.0, 0.3, 1.0, 1.5):
        W = on_the_path(W0, delta, strength)
        assert torch.allclose(W @ k, W0 @ k + strength * r, rtol=1e-9)
        assert torch.allclose(W @ x, W0 @ x + strength * share * r, rtol=1e-9)


# --- checks ---------------------------------------------------------------------------------------


def by_bisect(strengths: Sequence[float], lead: Lead) -> float:
    low, high = 0, len(strengths)
    while low < high:
        middle = (low + high) // 2
        if lead(strengths[middle]) > 0:
            high = middle
        else:
            low = middle + 1
    return strengths[low]


def careful(strengths: Sequence[float], lead: Lead) -> torch.Tensor:
    """Asks at both ends as well, and returns a tensor."""
    assert lead(strengths[0]) <= 0 < lead(strengths[-1])
    return torch.tensor(smallest_strength(strengths, lead), dtype=torch.float64)


@pytest.mark.parametrize("solution", [smallest_strength, by_bisect, careful])
def test_right_solutions_pass(solution: Callable[..., Any]) -> None:
    assert check_smallest_strength(solution).startswith("Right. ")


@pytest.mark.parametrize(("strengths", "leads"), TABLES)
def test_tables_ascend_and_cross_once(strengths: Sequence[float], leads: Sequence[float]) -> None:
    assert list(strengths) == sorted(set(strengths))
    assert list(leads) == sorted(set(leads))
    assert leads[0] <= 0 < leads[-1]


def one_by_one(strengths: Sequence[float], lead: Lead) -> float:
    return next(t for t in strengths if lead(t) > 0)


def just_before(strengths: Sequence[float], lead: Lead) -> float:
    return strengths[strengths.index(smallest_strength(strengths, lead)) - 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda strengths, lead: None, "returned nothing"),
        (lambda strengths: 1, "must take 2 arguments"),
        (lambda strengths, lead: (0.1, 0.2), "one strength, and returned a tuple"),
        (lambda strengths, lead: "0.3", "must be one number"),
        (one_by_one, "asked the model 12 times about 17 strengths.*5 questions"),
        (lambda s, lead: lead(0.123), "none of the strengths"),
        (lambda s, lead: lead(3), "not a place in the list"),
        (just_before, "a lead of 0 was counted"),
        (lambda s, lead: next(t for t in s if lead(t) >= 0), "a lead of 0 was counted"),
        (lambda s, lead: s.index(smallest_strength(s, lead)), "this is the place in the list"),
        (lambda s, lead: s[-1], "this is the last strength"),
        (
            lambda s, lead: (just_before(s, lead) + smallest_strength(s, lead)) / 2,
            "between two strengths",
        ),
        (
            lambda s, lead: s[-2] if len(s) == 17 else smallest_strength(s, lead),
            "you have 1, it should be 0.6",
        ),
    ],
    ids=range(14),
)
def test_wrong_solutions_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_smallest_strength(wrong)


def test_a_strength_that_does_not_win_is_told_so_where_there_is_no_tie() -> None:
    def late(strengths: Sequence[float], lead: Lead) -> float:
        answer = just_before if len(strengths) == 8 else smallest_strength
        return answer(strengths, lead)

    with pytest.raises(ExerciseError, match=r"\*not\* yet the likelier"):
        check_smallest_strength(late)
