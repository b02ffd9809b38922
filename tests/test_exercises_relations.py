"""The chapter about a relation as a matrix: its equations, and the check of its exercise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unified_edit.relations import FewShot, Relation, low_rank_inverse
from unified_edit.teaching.exercises import ExerciseError, check_object_state, check_subject_step
from unified_edit.teaching.exercises.checking import draw, relative_error
from unified_edit.teaching.exercises.relations import object_state, subject_step


@pytest.mark.equation("relations-matrix")
def test_the_librarys_relation_reads_what_the_exercise_reads() -> None:
    jacobians, H, out, h = draw(1, 3, 4, 4), draw(2, 4, 3), draw(3, 4, 3), draw(4, 4)
    b = torch.stack([out[:, i] - jacobians[i] @ H[:, i] for i in range(3)]).mean(0)
    relation = Relation("r", 0, jacobians.mean(0), b, FewShot("{} is"), beta=1.7)
    expected = object_state(jacobians, H, out, h, 1.7)
    assert relative_error(relation.outputs(h[None])[0], expected) < 1e-12


@pytest.mark.equation("relations-inverse")
def test_the_inverse_moves_o_by_what_was_asked() -> None:
    J, wanted = draw(1, 5, 5), draw(2, 5)
    assert relative_error(J @ low_rank_inverse(J, None) @ wanted, wanted) < 1e-10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda j, H, Y, h, beta: beta * object_state(j, H, Y, h, 1.0), "beta scales b too"),
        (lambda j, H, Y, h, beta: object_state(j, H, Y, h, 1.0), "beta does not enter"),
        (lambda j, H, Y, h, beta: beta * j.mean(0) @ h, "b is missing"),
        (lambda j, H, Y, h, beta: beta * j.mean(0) @ h + Y.mean(1), "b is the mean of o"),
        (lambda j, H, Y, h, beta: beta * j.mean(0) @ h + (Y - j.mean(0) @ H).mean(1),
         "own, then the mean"),
        (lambda j, H, Y, h, beta: object_state(j.mT, H, Y, h, beta), "differ from the right"),
    ],
)  # fmt: skip
def test_mistakes_are_named(wrong: object, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_object_state(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda J, o, o_new, q: subject_step(J, o_new, o, q), "sign"),
        (lambda J, o, o_new, q: subject_step(J, o, o_new, len(J)), "q does not enter"),
        (lambda J, o, o_new, q: subject_step(J.T, o, o_new, q), "have changed places"),
        (lambda J, o, o_new, q: J.T @ (o_new - o), "differ from the right"),
    ],
)
def test_mistakes_with_the_step_are_named(wrong: object, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_subject_step(wrong)  # type: ignore[arg-type]


@pytest.mark.equation("relations-inverse")
def test_the_step_is_the_librarys() -> None:
    def librarys(J: Tensor, o: Tensor, o_new: Tensor, q: int) -> Tensor:
        return low_rank_inverse(J, q) @ (o_new - o)

    assert check_subject_step(librarys).startswith("Right.")


def test_another_way_is_right_too() -> None:
    def tangents(jacobians: Tensor, H: Tensor, out: Tensor, h: Tensor, beta: float) -> Tensor:
        each = [out[:, i] + jacobians[i] @ (beta * h - H[:, i]) for i in range(len(jacobians))]
        return torch.stack(each).mean(0)

    assert check_object_state(tangents).startswith("Right.")
