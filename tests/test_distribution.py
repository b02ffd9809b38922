"""Shares of the residual: their values, what they add up to, and what is refused."""

from __future__ import annotations

import math

import pytest

from unified_edit.editing import shares
from unified_edit.errors import MethodError

EPS = 2.0**-52


def test_values_for_four_layers() -> None:
    assert shares(4) == (1 / 4, 1 / 3, 1 / 2, 1.0)
    assert shares(4, "memit") == shares(4)
    assert shares(4, "pmet") == (1 / 2, 1 / math.sqrt(3), 1 / math.sqrt(2), 1.0)
    assert shares(4, "full") == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["memit", "pmet", "full"])
def test_the_last_layer_takes_all_that_is_missing(kind: str) -> None:
    for n in range(1, 9):
        spread = shares(n, kind)
        assert isinstance(spread, tuple)
        assert len(spread) == n
        assert spread[-1] == 1.0
        assert list(spread) == sorted(spread)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_memit_stores_equal_parts_where_shares_arrive_undiminished(n: int) -> None:
    remaining, stored = 1.0, []
    for share in shares(n, "memit"):
        stored.append(share * remaining)
        remaining -= stored[-1]
    # n additions of numbers below 1, each rounded once.
    assert stored == pytest.approx([1 / n] * n, rel=0, abs=n * EPS)
    assert remaining == pytest.approx(0, abs=n * EPS)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None, "3"])
def test_a_wrong_number_of_layers_is_refused(n: object) -> None:
    with pytest.raises(
        MethodError, match=r"must be a whole number of at least 1\. A residual is spread"
    ):
        shares(n)  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused_and_the_known_ones_named() -> None:
    known = r"\('memit', 'pmet', 'full', 'replay'\)"
    with pytest.raises(MethodError, match=f"'linear'; choose one of {known}"):
        shares(3, "linear")  # type: ignore[arg-type]
