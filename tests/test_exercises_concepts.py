"""The chapter "The same objective in a picture model": the checks of its exercises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_methods import uce_weight
from torch import Tensor

from unified_edit.concepts import preserved_metric, solve_concepts
from unified_edit.teaching.exercises import ExerciseError, check_concept_weight, check_spill
from unified_edit.teaching.exercises.checking import draw, relative_error
from unified_edit.teaching.exercises.concepts import concept_weight, spill


@pytest.mark.equation("concepts-published")
@pytest.mark.parametrize("n", [0, 3])
def test_the_exercise_has_the_published_weight(n: int) -> None:
    W0, K, V = draw(1, 4, 7), draw(2, 7, 2), draw(3, 4, 2)
    K_p = draw(4, 7, n) if n else torch.zeros(7, 0).double()
    edited = list(zip(K.unbind(1), V.unbind(1), strict=True))
    published = uce_weight(W0, edited, list(K_p.unbind(1)), 0.3, 2.0, 1.5)
    assert relative_error(concept_weight(W0, K, V, K_p, 0.3, 2.0, 1.5), published) < 1e-12


@pytest.mark.equation("concepts-spill")
@pytest.mark.parametrize("n", [0, 3])
def test_everything_moves_along_one_direction(n: int) -> None:
    k, r, X = draw(1, 7, 1), draw(2, 7, 1), draw(3, 7, 5)
    K_p = draw(4, 7, n) if n else torch.zeros(7, 0).double()
    D = solve_concepts(preserved_metric(K_p, lam=0.3, weight=1.5), k, r)
    assert relative_error(D.delta @ X, r * spill(k[:, 0], X, K_p, 0.3, 1.5)) < 1e-12


def test_right_answers_are_right() -> None:
    assert check_concept_weight(concept_weight).startswith("Right.")
    assert check_spill(spill).startswith("Right.")


def without_preserved(*given: Any) -> Tensor:
    W0, K, V, K_p, *rest = given
    return concept_weight(W0, K, V, K_p[:, :0], *rest)


WRONG: list[tuple[Any, Callable[..., Any], str]] = [
    (check_concept_weight, lambda W0, *rest: concept_weight(W0, *rest) - W0, "this is Delta"),
    (check_concept_weight, without_preserved, "preserved concepts do not enter"),
    (
        check_concept_weight,
        lambda W0, K, V, P, lam, a, b: concept_weight(W0, K, V, P, lam, b, a),
        "exchanged",
    ),
    (check_spill, lambda k, X, P, lam, b: spill(k, X, P[:, :0], lam, b), "do not enter"),
    (check_spill, lambda k, X, P, lam, b: spill(k, X, P, 1.0, b), "lam does not enter"),
    (check_spill, lambda k, X, P, lam, b: spill(k, X, P, lam, b) / spill(k, k, P, lam, b), "the 1"),
]


@pytest.mark.parametrize(("check", "answer", "said"), WRONG)
def test_what_is_wrong_is_said(check: Any, answer: Callable[..., Any], said: str) -> None:
    with pytest.raises(ExerciseError, match=said):
        check(answer)
