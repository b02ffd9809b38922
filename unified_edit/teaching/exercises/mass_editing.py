"""Checks for the exercises of the chapter "Mass editing"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, number, right
from unified_edit.teaching.exercises.updates import moment

Solution = Callable[..., Any]


def one_more(C0: Tensor, K: Tensor, R: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """By how much the equality's cost grows with the fact (k, r), :eq:`mass-one-more`."""
    surprise, left = _parts(C0, K, R, k, r)
    return surprise @ surprise / left


def _parts(C0: Tensor, K: Tensor, R: Tensor, k: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """r - Delta k, and the rarity of what k has outside of K."""
    A = torch.linalg.solve_triangular(
        torch.linalg.cholesky(C0), torch.cat([K, k[:, None]], 1), upper=False
    )
    S = torch.linalg.qr(A).R
    seen = torch.linalg.solve_triangular(S[:-1, :-1], S[:-1, -1:], upper=True)[:, 0]
    return r - R @ seen, S[-1, -1] ** 2


def check_one_more(one_more_: Solution) -> str:
    """Check ``one_more(C0, K, R, k, r)``: what a batch costs more with one more fact, a number.

    C0 is (d_k x d_k), K is (d_k x E), R is (d_out x E), k is (d_k,), r is (d_out,). Raises
    ExerciseError.
    """
    for seed, d, E, d_out in ((5, 6, 3, 4), (6, 5, 1, 2), (7, 7, 6, 3)):
        C0, K, R = moment(200 + seed, d), draw(210 + seed, d, E), draw(220 + seed, d_out, E)
        k = draw(230 + seed, d) + 0.8 * K[:, 0]
        r = draw(240 + seed, d_out)
        surprise, left = _parts(C0, K, R, k, r)
        rho = k @ torch.linalg.solve(C0, k)
        g = K.T @ torch.linalg.solve(C0, k)
        G = K.T @ torch.linalg.solve(C0, K)
        before = torch.trace(R @ torch.linalg.solve(G, R.T))
        expected = one_more(C0, K, R, k, r)
        x = torch.linalg.solve(K.T @ K, K.T @ k)
        plain = r - R @ x
        what = "the price"
        agree(
            number(call(one_more_, C0, K, R, k, r), what),
            expected,
            what,
            {
                "this is what the fact costs alone, without a batch": r @ r / rho,
                "the surprise is missing: the batch already says Delta k of the new fact, and "
                "only r - Delta k is left to write": r @ r / left,
                "the whole key pays here; only what it has outside of the batch's keys can be "
                "used": surprise @ surprise / rho,
                "the surprise has to be squared": surprise.norm() / left,
                "the price is divided by a squared length, and you divided by the length": (
                    surprise @ surprise / left.sqrt()
                ),
                "this is what all facts cost together; take away what the batch cost before": (
                    before + expected
                ),
                "the sign of Delta k is the wrong way round in the surprise": (
                    (2 * r - surprise) @ (2 * r - surprise) / left
                ),
                "g' g stands where g' G^-1 g belongs": (
                    surprise @ surprise / (rho - g @ g) if float(rho - g @ g) else ()
                ),
                "C0 does not enter; the inner products are x' C0^-1 y": (
                    plain @ plain / (k @ k - (K.T @ k) @ x)
                ),
            },
        )
    return right("A surprise at what is new in the key: that is the price of one more fact.")
