"""The product with the same bits everywhere: order, threads, and its error against fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unified_edit.errors import ObjectiveError
from unified_edit.objective.exact_product import matmul

examples = settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],  # a seed has nothing to shrink
)
seeds = st.integers(0, 2**32 - 1)


def ranged(generator: torch.Generator, rows: int, columns: int, decades: float) -> Tensor:
    """Normal entries times 10**uniform(-decades, decades)."""
    size = (rows, columns)
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    exponents = (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1) * decades
    return normal * 10.0**exponents


def bound(left: Tensor, right: Tensor, exact: Fraction, i: int, j: int) -> Fraction:
    """What the docstring promises for entry (i, j)."""
    r = left.shape[1]
    beta = (53 - (r - 1).bit_length()) // 2
    row, column = Fraction(0), Fraction(0)
    for k in range(r):
        largest = left[:, k].abs().max().item(), right[k].abs().max().item()
        if all(largest):
            half = (math.frexp(largest[1])[1] - math.frexp(largest[0])[1]) // 2
            row = max(row, abs(Fraction(left[i, k].item())) * Fraction(2) ** half)
            column = max(column, abs(Fraction(right[k, j].item())) / Fraction(2) ** half)
    return abs(exact) * Fraction(1, 2**52) + r * Fraction(8, 2 ** (3 * beta)) * row * column


@examples
@given(
    seed=seeds,
    m=st.integers(1, 4),
    r=st.integers(1, 40),
    n=st.integers(1, 4),
    decades=st.sampled_from([0, 3, 12, 60]),
)
def test_error_against_exact_fractions(seed: int, m: int, r: int, n: int, decades: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = ranged(generator, m, r, decades), ranged(generator, r, n, decades)
    left[torch.rand(m, r, generator=generator) < 0.2] = 0.0
    product = matmul(left, right)
    for i in range(m):
        for j in range(n):
            exact = sum(
                (Fraction(left[i, k].item()) * Fraction(right[k, j].item()) for k in range(r)),
                Fraction(0),
            )
            error = abs(Fraction(product[i, j].item()) - exact)
            assert error <= bound(left, right, exact, i, j)


def test_cancellation_that_an_ordinary_product_does_not_survive() -> None:
    # 1 + 2**-60 needs 61 bits; the sum of the first two products cancels but for 2**-60.
    left = torch.tensor([[1.0, 2.0**-30, 1.0]], dtype=torch.float64)
    right = torch.tensor([[1.0], [2.0**-30], [-1.0]], dtype=torch.float64)
    assert matmul(left, right).item() == 2.0**-60


def nearly_two(generator: torch.Generator, rows: int, columns: int, _: float) -> Tensor:
    """Entries in [1.5, 2): sums of products need every bit that the slices leave room for."""
    return 2 - torch.rand(rows, columns, generator=generator, dtype=torch.float64) / 2


@pytest.mark.parametrize(("make", "decades"), [(ranged, 0), (ranged, 12), (nearly_two, 0)])
def test_bits_do_not_depend_on_the_order_of_summation(
    make: Callable[[torch.Generator, int, int, float], Tensor], decades: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = make(generator, 30, 3000, decades), make(generator, 3000, 20, decades)
    product, ordinary = matmul(left, right), left @ right
    ordinary_differs = False
    for _ in range(5):
        order = torch.randperm(3000, generator=generator)
        assert torch.equal(matmul(left[:, order], right[order]), product)
        ordinary_differs |= not torch.equal(left[:, order] @ right[order], ordinary)
    assert ordinary_differs  # otherwise these matrices would prove nothing


def test_bits_do_not_depend_on_the_number_of_threads_or_the_layout() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = ranged(generator, 67, 2049, 2), ranged(generator, 2049, 130, 2)
    threads = torch.get_num_threads()
    try:
        products = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            products.append(matmul(left, right))
            products.append(matmul(left.T.contiguous().T, right.T.contiguous().T))
            # More rows of zeros: libraries choose other kernels for other shapes.
            taller = torch.cat([left, left.new_zeros(190, 2049)])
            products.append(matmul(taller, right)[:67])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(product, products[0]) for product in products)


def test_close_to_an_ordinary_product_on_ordinary_matrices() -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = ranged(generator, 50, 700, 0), ranged(generator, 700, 40, 0)
    # An ordinary product may be off by r eps |left| |right|.
    allowed = 700 * 2.0**-52 * (left.abs() @ right.abs())
    assert bool(((matmul(left, right) - left @ right).abs() <= allowed).all())


@pytest.mark.parametrize("scale", [2.0**-1060, 2.0**-500, 2.0**500, 1.5 * 2.0**1010])
def test_scales_near_the_ends_of_the_range(scale: float) -> None:
    left = torch.tensor([[1.0, -3.0], [0.0, 0.0]], dtype=torch.float64)
    right = torch.tensor([[5.0, 0.0], [7.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[-16.0 * scale, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(matmul(left * scale, right), expected)
    assert torch.equal(matmul(left, right * scale), expected)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_product_with_an_identity_is_exact(shape: tuple[int, int]) -> None:
    matrix = ranged(torch.Generator().manual_seed(4), *shape, 100)
    for product in (matmul(torch.eye(shape[0]), matrix), matmul(matrix, torch.eye(shape[1]))):
        assert product.dtype == torch.float64
        assert torch.equal(product, matrix)
        assert product.data_ptr() != matrix.data_ptr()  # the caller may change one of them


def test_units_of_the_inner_index_cancel() -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = ranged(generator, 5, 30, 0), ranged(generator, 30, 7, 0)
    units = 2.0 ** torch.linspace(-400, 400, 30, dtype=torch.float64).round()
    # Zero on one side, whatever stands on the other is without effect.
    left[:, 3], right[3] = 0.0, 2.0**300
    left[:, 8], right[8] = 2.0**-300, 0.0
    assert torch.equal(matmul(left * units, right / units[:, None]), matmul(left, right))
    kept = [k for k in range(30) if k not in (3, 8)]
    allowed = 30 * 2.0**-52 * (left[:, kept].abs() @ right[kept].abs())
    error = (matmul(left, right) - left[:, kept] @ right[kept]).abs()
    assert bool((error <= allowed).all())


def test_other_types_are_converted_exactly_and_inputs_left_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(3, 5, generator=generator).to(torch.bfloat16).requires_grad_()
    right = torch.randn(5, 2, generator=generator)
    before = left.detach().clone(), right.clone()
    product = matmul(left, right)
    assert product.dtype == torch.float64
    assert not product.requires_grad
    assert torch.equal(product, matmul(left.double(), right.double()))
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


def test_nothing_to_multiply() -> None:
    assert torch.equal(matmul(torch.zeros(2, 0), torch.zeros(0, 3)), torch.zeros(2, 3).double())
    assert matmul(torch.zeros(0, 4), torch.zeros(4, 3)).shape == (0, 3)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (3, 1)), ((1, 2, 3), (3, 1))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ObjectiveError, match=r"cannot multiply shapes"):
        matmul(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["left", "right"])
def test_entries_that_are_not_finite_are_refused(bad: float, which: str) -> None:
    factors = {"left": torch.ones(2, 2), "right": torch.ones(2, 2)}
    factors[which][1, 0] = bad
    with pytest.raises(ObjectiveError, match=rf"the {which} factor .* not finite"):
        matmul(factors["left"], factors["right"])
