"""Checks of the chapter "Spreading over layers", and its equations in the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_edit.editing.spreading import shares
from unified_edit.objective import Metric, solve
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.spreading import (
    check_best_shares,
    check_parts,
    parts_of_shares,
    shares_by_rarity,
)

Check = Callable[[Any], str]
KINDS = ("memit", "pmet", "full")


def metric(seed: int, d: int = 6) -> Metric:
    keys = draw(seed, d, 3 * d)
    return Metric(keys @ keys.T / (3 * d))


def rarity(of: Metric, k: Tensor) -> float:
    return float(of.whiten(k).square().sum())


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("spread-parts", "spread-share", "spread-residual")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_each_layer_gets_its_part(kind: Any, n: int) -> None:
    """The loop itself, with keys that stay and writes that arrive as they are."""
    R = draw(0, 4, 3)
    target, now, written = R.clone(), torch.zeros_like(R), []
    for place, share in enumerate(shares(n, kind)):
        K = draw(10 + place, 6, 3)
        written.append(solve(metric(20 + place), K, share * (target - now)).delta @ K)
        now = now + written[-1]
    for part, of_layer in zip(
        parts_of_shares(torch.tensor(shares(n, kind), dtype=torch.float64)), written, strict=True
    ):
        # n solutions, each held to 1e-8 of its residual at worst
        assert torch.allclose(of_layer, part * R, rtol=0, atol=1e-6)
    assert torch.allclose(now, R, rtol=0, atol=1e-6)


@pytest.mark.equation("spread-equal-parts")
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_shares_of_the_layers_left_are_equal_parts(n: int) -> None:
    parts = parts_of_shares(torch.tensor(shares(n), dtype=torch.float64))
    assert parts.tolist() == pytest.approx([1 / n] * n, rel=1e-12)


def test_pmet_gives_more_to_the_early_layers_and_full_all_to_the_first() -> None:
    for n in (2, 3, 5, 8):
        pmet = parts_of_shares(torch.tensor(shares(n, "pmet"), dtype=torch.float64))
        assert pmet.tolist() == sorted(pmet.tolist(), reverse=True)
        assert pmet[0] == pytest.approx(1 / math.sqrt(n))
        full = parts_of_shares(torch.tensor(shares(n, "full"), dtype=torch.float64))
        assert full.tolist() == [1.0] + [0.0] * (n - 1)


@pytest.mark.equation("spread-left")
@pytest.mark.parametrize("kind", KINDS)
def test_a_ridge_leaves_the_product(kind: Any) -> None:
    lam, r = 2.0, draw(1, 4, 1)
    left, product = r.clone(), 1.0
    for place, share in enumerate(shares(4, kind)):
        of, k = metric(30 + place), draw(40 + place, 6, 1)
        left = left - solve(of, k, share * left, ridge=lam).delta @ k
        product *= 1 - share * rarity(of, k) / (lam + rarity(of, k))
    assert torch.allclose(left, product * r, rtol=1e-9)


@pytest.mark.equation("spread-optimal")
def test_shares_by_rarity_cost_least() -> None:
    metrics = [metric(50 + i) for i in range(3)]
    keys = [draw(60 + i, 6, 1) for i in range(3)]
    rho = torch.tensor(
        [rarity(m, k) for m, k in zip(metrics, keys, strict=True)], dtype=torch.float64
    )
    r = draw(2, 4, 1)

    def cost(parts: Tensor) -> float:
        updates = [
            solve(m, k, p * r) for m, k, p in zip(metrics, keys, parts.tolist(), strict=True)
        ]
        return sum(update.diagnosis.preservation_error for update in updates)

    best = parts_of_shares(shares_by_rarity(rho))
    assert best.tolist() == pytest.approx((rho / rho.sum()).tolist(), rel=1e-12)
    least = cost(best)
    assert least == pytest.approx(float(r.square().sum() / rho.sum()), rel=1e-9)
    for seed in range(20):
        other = best + 0.1 * draw(seed, 3)
        assert cost(other / other.sum()) > least
    # the same as one edit of the stacked key under the block-diagonal second moment
    factor = torch.block_diag(*(m.factor for m in metrics))
    stacked = solve(factor @ factor.T, torch.cat(keys), r)
    assert stacked.diagnosis.preservation_error == pytest.approx(least, rel=1e-9)


# --- checks ---------------------------------------------------------------------------------------


def loop_parts(given: Tensor) -> list[float]:
    left, parts = 1.0, []
    for share in given.tolist():
        parts.append(share * left)
        left -= parts[-1]
    return parts


def loop_shares(rho: Tensor) -> Tensor:
    return torch.stack([rho[i] / rho[i:].sum() for i in range(len(rho))])


def by_parts_left(rho: Tensor) -> np.ndarray:
    part = (rho / rho.sum()).numpy()
    return part / (1 - np.concatenate([[0.0], np.cumsum(part)[:-1]]))


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_parts, parts_of_shares),
        (check_parts, loop_parts),
        (
            check_parts,
            lambda s: torch.stack([s[i] * (1 - s[:i]).prod() for i in range(len(s))]),
        ),
        (check_best_shares, shares_by_rarity),
        (check_best_shares, loop_shares),
        (check_best_shares, by_parts_left),
    ],
    ids=range(6),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


def before(s: Tensor) -> Tensor:
    return torch.stack([(1 - s[:i]).prod() for i in range(len(s))])


def in_place(s: Tensor) -> Tensor:
    s[1:] *= (1 - s).cumprod(0)[:-1]
    return s


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_parts, None, "was given nothing"),
        (check_parts, lambda s: None, "returned nothing"),
        (check_parts, lambda s: s, "the shares themselves"),
        (check_parts, lambda s: s / s.sum(), "shares over their sum"),
        (check_parts, lambda s: (1 - s).cumprod(0), "what is left after each layer"),
        (check_parts, before, "what is left before each layer"),
        (check_parts, lambda s: s * (1 - s).cumprod(0), "counted after the layer itself"),
        (
            check_parts,
            lambda s: s * torch.cat([torch.ones(1).double(), 1 - s[:-1]]),
            "only the layer just before",
        ),
        (check_parts, lambda s: parts_of_shares(s.flip(0)).flip(0), "layers are ascending"),
        (check_parts, lambda s: parts_of_shares(s).sum(), r"must have shape \(4,\)"),
        (check_parts, in_place, "changed its argument `s`"),
        (check_best_shares, None, "was given nothing"),
        (check_best_shares, lambda rho: ..., "returned nothing"),
        (check_best_shares, lambda rho: rho / rho.sum(), "these are the parts"),
        (check_best_shares, lambda rho: rho / rho.cumsum(0), "layers up to this one"),
        (check_best_shares, lambda rho: shares(len(rho)), "MEMIT's shares, equal parts"),
        (check_best_shares, lambda rho: shares_by_rarity(1 / rho), "one over the rarity"),
        (check_best_shares, lambda rho: shares_by_rarity(rho**2), "square of the rarity"),
        (check_best_shares, lambda rho: shares_by_rarity(rho**0.5), "root of the rarity"),
        (check_best_shares, lambda rho: 1 / shares_by_rarity(rho), "upside down"),
        (
            check_best_shares,
            lambda rho: shares_by_rarity(rho) if rho.std() else rho / rho.sum(),
            "They must be MEMIT's",
        ),
    ],
    ids=range(21),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
