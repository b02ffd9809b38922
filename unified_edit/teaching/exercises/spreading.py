"""Checks for the exercises of the chapter "Spreading over layers"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.editing.spreading import shares
from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import TOLERANCE, agree, right, tensor


def parts_of_shares(given: Tensor) -> Tensor:
    """What part of the first residual each layer gets, :eq:`spread-parts`: (n,) from (n,)."""
    left = torch.cumprod(1 - given, dim=0)
    return given * torch.cat([torch.ones_like(left[:1]), left[:-1]])


def shares_by_rarity(rho: Tensor) -> Tensor:
    """Shares whose parts are proportional to `rho`, those of :eq:`spread-optimal`: (n,)."""
    return rho / rho.flip(0).cumsum(0).flip(0)


def check_parts(parts: Callable[[Tensor], Any]) -> str:
    """Check ``parts(shares)``: the part of the first residual that each of n layers gets.

    `shares` is (n,), and so is the result. Raises ExerciseError.
    """
    for given in (
        torch.tensor([0.2, 0.5, 0.4, 1.0], dtype=torch.float64),
        torch.tensor(shares(5, "pmet"), dtype=torch.float64),
        torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64),
    ):
        n, what = len(given), f"the parts of {len(given)} layers"
        left = torch.cumprod(1 - given, dim=0)
        found = tensor(call(parts, given), (n,), what)
        agree(
            found,
            parts_of_shares(given),
            what,
            {
                "these are the shares themselves; a share is taken of what is left, and the "
                "layers before have written some of it": given,
                "these are the shares over their sum; a share is taken of what the layers before "
                "have left": given / given.sum(),
                "this is what is left after each layer; the part is what the layer itself "
                "writes": left,
                "this is what is left before each layer; multiply it by the layer's share": (
                    torch.cat([torch.ones_like(left[:1]), left[:-1]])
                ),
                "what is left was counted after the layer itself; take the layers before it "
                "only": given * left,
                "only the layer just before was taken off; the product runs over all layers "
                "before": given * torch.cat([torch.ones_like(left[:1]), 1 - given[:-1]]),
                "the layers behind were taken off instead of those before; layers are ascending": (
                    parts_of_shares(given.flip(0)).flip(0)
                ),
            },
            otherwise=(
                f"The last share is 1, so they have to add up to 1, and yours to {found.sum():.3g}"
                if abs(float(found.sum()) - 1) > 1e-2
                else ""
            ),
        )
    return right("Each layer takes its share of what the layers before it have left.")


def check_best_shares(best_shares: Callable[[Tensor], Any]) -> str:
    """Check ``best_shares(rho)``: shares with which each part is proportional to the rarity.

    `rho` is (n,), and so is the result. Raises ExerciseError.
    """
    for rho in (
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64),
        torch.tensor([500.0, 4000.0, 2500.0, 1000.0, 7000.0], dtype=torch.float64),
    ):
        n = len(rho)
        what = f"the shares of {n} layers"
        got = tensor(call(best_shares, rho), (n,), what)
        tails = rho.flip(0).cumsum(0).flip(0)
        agree(
            got,
            shares_by_rarity(rho),
            what,
            {
                "these are the parts; the share is multiplied by what is *left*, so divide each "
                "part by the part that is left before its layer": rho / rho.sum(),
                "you divided by the rarities of the layers up to this one; what is left is for "
                "this one and those behind it": rho / rho.cumsum(0),
                "these are MEMIT's shares, equal parts; here a rare key gets more": (
                    1 / torch.arange(n, 0, -1).double()
                ),
                "the parts are proportional to one over the rarity: a rare key is cheap and "
                "should get more": shares_by_rarity(1 / rho),
                "the parts are proportional to the square of the rarity": shares_by_rarity(rho**2),
                "the parts are proportional to the root of the rarity": shares_by_rarity(
                    rho.sqrt()
                ),
                "these are ratios to the layer itself, upside down": tails / rho,
            },
            otherwise=(
                "The last layer has to take all that is left: its share is 1"
                if abs(float(got[-1]) - 1) > TOLERANCE
                else ""
            ),
        )
    what = "the shares of 4 layers of equal rarity"
    equal = tensor(call(best_shares, torch.full((4,), 7.0).double()), (4,), what)
    memit = torch.tensor(shares(4), dtype=torch.float64)
    agree(equal, memit, what, otherwise="They must be MEMIT's, 1/4, 1/3, 1/2 and 1")
    return right("Each part is proportional to its layer's rarity, and the last share is 1.")
