"""Numbers and paths as users write them."""

from __future__ import annotations

import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from unified_edit.arguments import as_path, is_flag, real_number, whole_number
from unified_edit.errors import FactError, MethodError

TEN = [10, np.int64(10), np.uint8(10), np.array(10), torch.tensor(10), torch.tensor([10])]


@pytest.mark.parametrize("value", TEN)
def test_whole_numbers_of_every_library(value: object) -> None:
    number = whole_number(value, "n", FactError, least=10, below=11)
    assert number == 10
    assert type(number) is int


@pytest.mark.parametrize(
    "value",
    [
        None, "10", b"10", 10.0, np.float64(10), torch.tensor(10.0), [10], True, np.True_, object(),
        torch.tensor(True), torch.tensor([1, 2]), np.array([1, 2]), Decimal(10), 10j, np.nan,
        torch.empty((), dtype=torch.int64, device="meta"),
    ],
)  # fmt: skip
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(MethodError, match=r"^n is .*; it must be a whole number$"):
        whole_number(value, "n", MethodError)


@pytest.mark.parametrize(
    ("value", "bounds", "wanted"),
    [
        (0, {"least": 1}, "0; it must be a whole number of at least 1"),
        (5, {"below": 5}, "5; it must be a whole number below 5"),
        (-1, {"least": 0, "below": 9}, "-1; it must be a whole number of at least 0 and below 9"),
        (9, {"least": 0, "below": 9}, "9; it must be a whole number of at least 0 and below 9"),
        (0, {"least": 123456789}, "0; it must be a whole number of at least 123456789"),
        ("x", {"least": 1, "advice": "Do."}, "'x'; it must be a whole number of at least 1. Do."),
    ],
)  # fmt: skip
def test_whole_numbers_out_of_bounds(value: object, bounds: dict, wanted: str) -> None:
    with pytest.raises(FactError) as caught:
        whole_number(value, "n", FactError, **bounds)
    assert str(caught.value) == f"n is {wanted}"


@pytest.mark.parametrize(
    "value",
    [
        2.5, np.float32(2.5), np.array([2.5]), torch.tensor(2.5), torch.tensor([[2.5]]),
        torch.tensor(2.5, requires_grad=True), torch.tensor(2.5, dtype=torch.bfloat16),
        Fraction(5, 2), Decimal("2.5"),
    ],
)  # fmt: skip
def test_real_numbers_of_every_library(value: object) -> None:
    number = real_number(value, "x", FactError, above=0, least=2.5)
    assert number == 2.5
    assert type(number) is float


def test_a_whole_number_is_a_real_one() -> None:
    assert [real_number(value, "x", FactError) for value in TEN] == [10.0] * len(TEN)


@pytest.mark.parametrize(
    "value",
    [
        None, "1", np.str_("1"), b"1", bytearray(b"1"), np.array("1"), [1.0], True,
        np.False_, torch.tensor(True),
        float("nan"), float("inf"), -np.inf, torch.tensor(float("nan")), 10**400, 1j,
        np.complex64(1), torch.tensor(1j), torch.tensor([1.0, 2.0]), np.array([]), object(),
        torch.empty((), device="meta"),
    ],
)  # fmt: skip
def test_what_is_no_finite_number(value: object) -> None:
    with pytest.raises(MethodError, match=r"(?s)^x is .*; it must be a finite number$"):
        real_number(value, "x", MethodError)


@pytest.mark.parametrize(
    ("value", "bounds", "wanted"),
    [
        (-1, {"least": 0}, "x is -1; it must be a finite number >= 0"),
        (0.0, {"above": 0}, "x is 0.0; it must be a finite number > 0"),
        (0.5, {"least": 1.0, "above": 0.2}, "x is 0.5; it must be a finite number >= 1 and > 0.2"),
        ("a", {"above": 0.0, "advice": "Do."}, "x is 'a'; it must be a finite number > 0. Do."),
    ],
)  # fmt: skip
def test_real_numbers_out_of_bounds(value: object, bounds: dict, wanted: str) -> None:
    with pytest.raises(FactError) as caught:
        real_number(value, "x", FactError, **bounds)
    assert str(caught.value) == wanted


def test_truth_values() -> None:
    for flag in (True, False, np.True_, np.array([True]), torch.tensor(False)):
        assert is_flag(flag)
    for other in (1, 0.0, np.int64(1), torch.tensor(1), "True", None):
        assert not is_flag(other)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    class Entry:
        def __fspath__(self) -> str:
            return "~/a"

    for written in ("~/a", Path("~/a"), Entry(), tmp_path / "a", np.str_("~/a")):
        assert as_path(written, "file", FactError) == tmp_path / "a"
    assert as_path("a/~", "file", FactError) == Path("a/~")
    assert as_path("~", "file", FactError) == tmp_path
    assert as_path(Path(), "file", FactError) == Path()


@pytest.mark.parametrize("value", [None, 5, "", [], ["a"], b"a", "a\0", "a\ud800b", os.stat])
def test_what_is_no_path(value: object) -> None:
    with pytest.raises(MethodError, match=r"^file is "):
        as_path(value, "file", MethodError)


def test_advice_about_a_path() -> None:
    with pytest.raises(FactError, match=r"^file is None; give the path of a file or folder$"):
        as_path(None, "file", FactError)
    with pytest.raises(FactError, match=r"^file is 5; give a name$"):
        as_path(5, "file", FactError, advice="give a name")
    with pytest.raises(
        FactError, match=r"^file is '~nobody-of-this-name/a'.*; write the path out$"
    ):
        as_path("~nobody-of-this-name/a", "file", FactError)
