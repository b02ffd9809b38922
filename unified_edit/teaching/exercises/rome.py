"""Checks for the exercises of the chapter "Equality: ROME"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import (
    ExerciseError,
    agree,
    draw,
    name_of,
    number,
    refuse_rounded,
    right,
    tensor,
)
from unified_edit.teaching.exercises.updates import equality_said, moment


def rank_one_update(C0: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """r k' C0^-1 / (k' C0^-1 k), :eq:`rome-update`: (d_out x d_k), of k (d_k,) and r (d_out,)."""
    solved = torch.linalg.solve(C0, k)
    return torch.outer(r, solved) / (k @ solved)


def errors_after(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """Delta K - R (d_out x E) of the sum of the E rank-one updates, :eq:`rome-disturbance`."""
    G = _gram(C0, K)
    return (R / G.diagonal()) @ G - R


def two_key_cost(C0: Tensor, k: Tensor, k_star: Tensor, r: Tensor) -> Tensor:
    """tr(Delta C0 Delta') of r k_*' C0^-1 / (k_*' C0^-1 k), :eq:`rome-mixed-norm`: a number."""
    solved = torch.linalg.solve(C0, k_star)
    return (r @ r) * (k_star @ solved) / (k @ solved) ** 2


def _gram(C0: Tensor, K: Tensor) -> Tensor:
    return K.T @ torch.linalg.solve(C0, K)


def check_rank_one(rank_one: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``rank_one(C0, k, r) -> Delta``: (d_out x d_k), the cheapest with Delta k = r.

    C0 is (d_k x d_k), k is (d_k,), r is (d_out,). Raises ExerciseError.
    """
    watch = Watch(rank_one)
    for d, d_out in ((4, 3), (3, 3)):
        C0, k, r = moment(d, d), draw(10 + d, d), draw(20 + d, d_out)
        solved = torch.linalg.solve(C0, k)
        whitened = torch.linalg.solve(torch.linalg.cholesky(C0), k)
        expected = rank_one_update(C0, k, r)
        delta = tensor(watch(C0, k, r), (d_out, d), "Delta")
        agree(
            delta,
            expected,
            "Delta",
            {
                "this is r k' / (k' k), which holds Delta k = r and ignores C0": (
                    torch.outer(r, k) / (k @ k)
                ),
                "the divisor is missing: divide by k' C0^-1 k, so that Delta k = r": (
                    torch.outer(r, solved)
                ),
                "you divided by k' k; the divisor that gives Delta k = r is k' C0^-1 k": (
                    torch.outer(r, solved) / (k @ k)
                ),
                "you divided by the squared norm of C0^-1 k; the divisor is k' times that "
                "vector": torch.outer(r, solved) / (solved @ solved),
                "you used C0 where C0^-1 belongs: the row must be small where text is large": (
                    torch.outer(r, C0 @ k) / (k @ C0 @ k)
                ),
                "the row is that of the whitened key L^-1 k; it still has to be multiplied by "
                "L^-1 from the right": torch.outer(r, whitened) / (whitened @ whitened),
                "it is the transpose of the right one: r is the column, k' C0^-1 the row": (
                    expected.T
                ),
            },
            otherwise=equality_said(delta, expected, C0, k[:, None], "Delta k = r"),
        )
    _check_graded(watch)
    watch.refuse_inverses("solve with C0 and k (`torch.linalg.solve(C0, k)`)")
    return right("Delta k = r, and Delta C0 is a column times k', so no other update is cheaper.")


def _check_graded(rank_one: Callable[..., Any]) -> None:
    """For C0 = diag(1, 1e-6, 1e-13), where the smallest eigenvalue does most of the work."""
    C0 = torch.diag(torch.tensor([1.0, 1e-6, 1e-13]).double())
    k, r = torch.tensor([1.0, 1e-3, 1e-6]).double(), torch.tensor([2.0, -1.0]).double()
    delta = tensor(rank_one(C0, k, r), (2, 3), "Delta for C0 = diag(1, 1e-6, 1e-13)")
    expected, root = rank_one_update(C0, k, r), C0.sqrt()
    refuse_rounded(delta, expected, "Delta for C0 = diag(1, 1e-6, 1e-13)")
    cut = {
        "a small eigenvalue of C0 was cut off, as a pseudoinverse does: that takes what is rare "
        "for what is common. Solve with C0 as it is": tuple(
            _with_inverse(values, k, r) @ root for values in ([1.0, 1e6, 0.0], [1.0, 0.0, 0.0])
        )
    }
    agree(
        delta @ root,  # where all three columns count
        expected @ root,
        "Delta L, for C0 = L L' = diag(1, 1e-6, 1e-13),",
        cut,
        otherwise=equality_said(delta, expected, C0, k[:, None], "Delta k = r"),
    )


def _with_inverse(values: list[float], k: Tensor, r: Tensor) -> Tensor:
    """The update where C0^-1 is the diagonal matrix of these values."""
    row = torch.tensor(values, dtype=torch.float64) * k
    return torch.outer(r, row) / (k @ row)


def check_errors_in_turn(errors_in_turn: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``errors_in_turn(C0, K, R)``: (d_out x E), Delta K - R after E rank-one writes.

    C0 is (d_k x d_k), K (d_k x E), R (d_out x E); every residual is kept as it is in R. Raises
    ExerciseError.
    """
    for d, d_out, E in ((5, 2, 3), (4, 3, 3)):
        C0, K, R = moment(30 + d, d), draw(40 + d, d, E), draw(50 + d, d_out, E)
        G, plain = _gram(C0, K), K.T @ K
        expected = errors_after(C0, K, R)
        reread = torch.zeros_like(R)
        for i in range(E):
            reread[:, i] = (R[:, i] - reread @ G[:, i]) / G[i, i]
        what = f"Delta K - R of {E} facts with {d} entries a key"
        agree(
            tensor(call(errors_in_turn, C0, K, R), (d_out, E), what),
            expected,
            what,
            {
                "this is Delta K; take R away": expected + R,
                "this is R - Delta K; the sign is the wrong way round": -expected,
                "zero is what a solution for all facts together gives; here each one is written "
                "without regard to the others": torch.zeros_like(R),
                "r_i is divided by the rarity of its own key k_i; you divided by that of the key "
                "that is disturbed": R @ (G / G.diagonal()) - R,
                "the rarities are missing: column i of R is divided by k_i' C0^-1 k_i": R @ G - R,
                "you read the residuals again before each write; here they are kept as they "
                "are in R": reread @ G - R,
                "you used K' K where K' C0^-1 K belongs": (R / plain.diagonal()) @ plain - R,
                "this is what the last fact alone does to the others; all of them count": (
                    R[:, -1:] * (G[-1:] / G[-1, -1]) - R
                ),
            },
        )
    return right("Every fact leaves the share G_ij / G_ii of its residual at key j.")


def check_mixed_cost(mixed_cost: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``mixed_cost(C0, k, k_star, r)``: what r k_*' C0^-1 / (k_*' C0^-1 k) costs, a number.

    C0 is (d_k x d_k), k and k_star are (d_k,), r is (d_out,). Raises ExerciseError.
    """
    for d, d_out, length in ((4, 3, 1.0), (3, 2, 2.5)):
        C0, k, r = moment(60 + d, d), draw(70 + d, d), draw(80 + d, d_out)
        k_star = length * (k + 0.7 * draw(90 + d, d))
        rho = float(k @ torch.linalg.solve(C0, k))
        rho_star = float(k_star @ torch.linalg.solve(C0, k_star))
        between = float(k_star @ torch.linalg.solve(C0, k))
        square = float(r @ r)
        cosine = between / (rho * rho_star) ** 0.5
        ordinary = float(k @ k_star / (k.norm() * k_star.norm()))
        watch = Watch(mixed_cost)
        agree(
            number(watch(C0, k, k_star, r), "the cost"),
            two_key_cost(C0, k, k_star, r),
            "the cost",
            {
                "this is the least cost, of the update with k alone; the second key makes it "
                "1/c^2 times as large": square / rho,
                "this is the cost of the update with k_star alone": square / rho_star,
                "the cosine must be squared": square / rho / abs(cosine),
                "the cosine must be squared, which also takes away its sign": (
                    square / rho / cosine if cosine < 0 else ()
                ),
                "you multiplied by c^2 where it divides; a second key never makes it cheaper": (
                    square / rho * cosine**2
                ),
                "you took the ordinary cosine; it is that of the inner product x' C0^-1 y": (
                    square / rho / ordinary**2
                ),
                "rho is that of k, which was asked to move by r, not of k_star": (
                    square / rho_star / cosine**2
                ),
                "this is half the cost; the half was only put in for the derivation": (
                    float(two_key_cost(C0, k, k_star, r)) / 2
                ),
                "you used the norm of r; square it": (
                    float(two_key_cost(C0, k, k_star, r)) / square**0.5
                ),
                "this is the squared norm of Delta; the cost has C0 in it": square
                * float(torch.linalg.solve(C0, k_star).square().sum())
                / between**2,
            },
        )
        if any(sorted(made.shape) == [d_out, d] for made in watch.made):
            raise ExerciseError(
                f"the number is right. But on the way {name_of(mixed_cost)} makes a matrix of "
                f"{d_out} x {d}, and the exercise asks for the cost without one: it is |r|^2 "
                "times a number that k, k_star and C0 give"
            )
    return right("It is 1/c^2 times the least cost, whatever the length of k_star.")
