"""Checks for the exercises of the chapter "A relation is (sometimes) a matrix"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, right, tensor

Solution = Callable[..., Any]


def object_state(jacobians: Tensor, H: Tensor, out: Tensor, h: Tensor, beta: float) -> Tensor:
    """beta J h + b, with J and b the means of :eq:`relations-matrix`: (d,).

    jacobians: (n x d x d); H, out: states of the n examples, (d x n) each; h: (d,).
    """
    J = jacobians.mean(0)
    b = (out - torch.einsum("nij,jn->in", jacobians, H)).mean(1)
    return beta * J @ h + b


def check_object_state(object_state_: Solution) -> str:
    """Check ``object_state(jacobians, H, O, h, beta) -> beta J h + b``.

    jacobians is (n x d x d), one for each example, H and O are (d x n), h is (d,); the result has d
    entries. Raises ExerciseError.
    """
    for seed, n, d, beta in ((3, 3, 5, 2.0), (4, 5, 4, 0.7), (5, 2, 6, 1.0)):
        jacobians, H = draw(seed, n, d, d), draw(seed + 10, d, n)
        out, h = draw(seed + 20, d, n), draw(seed + 30, d)
        what = f"the state of the object, read by {n} examples"
        found = tensor(call(object_state_, jacobians, H, out, h, beta), (d,), what)
        expected = object_state(jacobians, H, out, h, beta)
        J = jacobians.mean(0)
        b = expected - beta * J @ h
        agree(
            found,
            expected,
            what,
            {
                "beta scales b too; it belongs to J h alone": beta * (J @ h + b),
                "beta does not enter": J @ h + b,
                "b is missing": beta * J @ h,
                "b is the mean of o; what J h gives at the examples is to be taken off": (
                    beta * J @ h + out.mean(1)
                ),
                "b is made with the mean Jacobian; take each example's own, then the mean": (
                    beta * J @ h + (out - J @ H).mean(1)
                ),
                "the Jacobians are added up; take their mean": beta * n * J @ h + b,
                "J is transposed": beta * J.T @ h + b,
            },
        )
    return right("That is the mean of the tangents, with beta on its slope.")


def subject_step(J: Tensor, o: Tensor, o_new: Tensor, q: int) -> Tensor:
    """The step of :eq:`relations-inverse` (d,): J's pseudo-inverse of rank q times o_new - o."""
    U, sizes, Vt = torch.linalg.svd(J)
    return Vt[:q].T @ ((U[:, :q].T @ (o_new - o)) / sizes[:q])


def check_subject_step(subject_step_: Solution) -> str:
    """Check ``subject_step(J, o, o_new, q) -> J_q^+ (o_new - o)``.

    J is (d x d), o and o_new are (d,); the result has d entries. Raises ExerciseError.
    """
    for seed, d, q in ((3, 6, 2), (4, 5, 5), (5, 8, 1)):
        J, o, o_new = draw(seed, d, d), draw(seed + 10, d), draw(seed + 20, d)
        what = f"the step for a matrix of {d} rows and q = {q}"
        found = tensor(call(subject_step_, J, o, o_new, q), (d,), what)
        expected = subject_step(J, o, o_new, q)
        U, sizes, Vt = torch.linalg.svd(J)
        asked = o_new - o
        agree(
            found,
            expected,
            what,
            {
                "q does not enter; the small singular values are inverted, too": (
                    torch.linalg.solve(J, asked)
                ),
                "the smallest singular values are taken; take the q largest": (
                    Vt[-q:].T @ ((U[:, -q:].T @ asked) / sizes[-q:])
                ),
                "the singular values multiply; a pseudo-inverse divides by them": (
                    Vt[:q].T @ ((U[:, :q].T @ asked) * sizes[:q])
                ),
                "U and V have changed places: J goes from h to o, its inverse back": (
                    subject_step(J.T, o, o_new, q)
                ),
            },
        )
    return right("No small singular value makes the step long.")
