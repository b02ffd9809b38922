"""Checks for the exercises of the chapter "Hook layers"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, right, tensor

Solution = Callable[..., Any]


def gated(W0: Tensor, W_h: Tensor, K0: Tensor, q: float, K: Tensor) -> Tensor:
    """What a hook layer with the gate of :eq:`hooks-causal` gives for each column of K.

    The threshold is the 1 - q quantile over the columns of K0. Returns (d_out x n).
    """
    D = W_h - W0
    tau = torch.quantile((D @ K0).norm(dim=0), 1 - q)
    return torch.where((D @ K).norm(dim=0) >= tau, W_h @ K, W0 @ K)


def _opened_where(W0: Tensor, W_h: Tensor, K: Tensor, is_open: Tensor) -> Tensor:
    return torch.where(is_open, W_h @ K, W0 @ K)


def check_gated(gated_: Solution) -> str:
    """Check ``gated(W0, W_h, K0, q, K) -> outputs``.

    W0 and W_h are (d_out x d_k), K0 is (d_k x tokens), K is (d_k x n). Column i is W_h k_i where
    norm((W_h - W0) k_i) is at least the 1 - q quantile of the same over the columns of K0, and
    W0 k_i elsewhere. Raises ExerciseError.
    """
    for seed, n, q in ((8, 7, 0.25), (2, 9, 0.4), (5, 8, 0.3)):
        d, d_out = 4, 3
        W0, W_h = draw(seed, d_out, d), draw(seed, d_out, d) + draw(seed + 10, d_out, d)
        K0, K = draw(seed + 20, d, 33), 1.2 * draw(seed + 30, d, n)
        D = W_h - W0
        score, known = (D @ K).norm(dim=0), (D @ K0).norm(dim=0)
        what = f"the outputs for {n} keys with q = {q:g}"
        found = tensor(call(gated_, W0, W_h, K0, q, K), (d_out, n), what)
        z = (score - score.mean()) / score.std()
        z0 = (known - known.mean()) / known.std()
        agree(
            found,
            gated(W0, W_h, K0, q, K),
            what,
            {
                "the gate is open at every key": W_h @ K,
                "the gate is shut at every key": W0 @ K,
                "these are the differences (W_h - W0) k of the open keys; the hook gives W_h k": (
                    torch.where(score >= torch.quantile(known, 1 - q), D @ K, 0 * D @ K)
                ),
                "the gate is open below the threshold, and shut above it": (
                    _opened_where(W0, W_h, K, score < torch.quantile(known, 1 - q))
                ),
                "the threshold is the q quantile; a share q of the ordinary keys is to be above "
                "it, so it is the 1 - q quantile": (
                    _opened_where(W0, W_h, K, score >= torch.quantile(known, q))
                ),
                "the threshold is made from the keys that are asked, K; make it from K0": (
                    _opened_where(W0, W_h, K, score >= torch.quantile(score, 1 - q))
                ),
                "the score is the length of W_h k; it is that of (W_h - W0) k": (
                    _opened_where(
                        W0, W_h, K,
                        (W_h @ K).norm(dim=0) >= torch.quantile((W_h @ K0).norm(dim=0), 1 - q),
                    )
                ),
                "the score is the length of the key; it is that of (W_h - W0) k": (
                    _opened_where(
                        W0, W_h, K, K.norm(dim=0) >= torch.quantile(K0.norm(dim=0), 1 - q)
                    )
                ),
                "the score compares a key with the others of K, as the published gate does; "
                "take the length alone": (
                    _opened_where(W0, W_h, K, z >= torch.quantile(z0, 1 - q))
                ),
            },
        )  # fmt: skip
    return right("A key is given what its own score says, whoever else is asked.")
