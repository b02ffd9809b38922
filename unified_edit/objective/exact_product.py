"""A matrix product with the same bits on every machine.

An edit is kept as two factors and applied as a dense `Delta = left @ right`, rounded once into the
model's precision. A BLAS library adds the terms of an inner product in an order that depends on
its version, the processor and the number of threads, and floating-point addition is not
associative: the same two factors can give, in another process with another number of threads, a
`Delta` that differs in its last bit, and then weights that differ after rounding. An edit file
would not reproduce the weights whose hash it carries.

The remedy is to let the library multiply only what it cannot round (the splitting of Ozaki, Ogita,
Oishi and Rump, "Error-free transformations of matrix multiplication by using fast routines of
matrix multiplication and its applications", Numerical Algorithms 59, 2012):

1. Scale by powers of two, which is exact: each inner index so that its column of `left` and its row
   of `right` are equally large, then each row of `left` and each column of `right` so that its
   entries lie in (-2, 2).
2. Cut every entry into slices of at most `beta = (53 - ceil(log2 r)) // 2` bits, r being the inner
   dimension. A product of two slices has at most `2 beta` bits, a sum of r of them at most
   `2 beta + ceil(log2 r) <= 53`: every partial sum is an integer multiple of one unit and fits the
   53 bits of a float64. Nothing is rounded, so no order of summation matters.
3. Add the slice products entry by entry, in one fixed order. This rounds, always in the same way.

Three slices a factor hold `3 beta + 2` bits below the largest entry of a row or column (62 for
r = 4096). Of the nine products, those of slices i + j <= 4 (counted from 1) are kept; the others
are below the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unified_edit.errors import ObjectiveError

_SLICES = 3
# Numbers of the right factor that are cut into slices at a time.
_AT_ONCE = 2**25


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in float64, bit-identical for any BLAS, thread count or summation order.

    left: (m, r); right: (r, n); any floating type, converted to float64 (which is exact). Returns
    (m, n) float64 on the device of `left`. An entry's error is at most one unit in its last place
    plus `r * 2**(3 - 3*beta) * max|its row of left| * max|its column of right|`, the maxima taken
    after the scaling of the inner indices (the factor is below 2**-53 for r up to 2**15). It costs
    six ordinary products. A product with an identity is the other factor, exactly.

    Raises ObjectiveError for shapes that do not fit and for entries that are not finite.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ObjectiveError(
            f"cannot multiply shapes {tuple(left.shape)} and {tuple(right.shape)}: "
            "expected (m, r) and (r, n)"
        )
    left = left.detach().to(torch.float64)
    right = right.detach().to(device=left.device, dtype=torch.float64)
    for name, matrix in (("left", left), ("right", right)):
        if not bool(torch.isfinite(matrix).all()):
            raise ObjectiveError(f"the {name} factor of a product has entries that are not finite")
    total = left.new_zeros(left.shape[0], right.shape[1])
    if left.numel() == 0 or right.numel() == 0:
        return total
    for one, other in ((left, right), (right, left)):
        if is_identity(one):
            return other.clone()
    left, right = _balanced(left, right)
    beta = (53 - (left.shape[1] - 1).bit_length()) // 2
    row_scale = _power_of_two_scale(left, dim=1)
    left_slices = _slices(left / row_scale, beta)
    # Columns are independent of each other: some at a time, so that the slices take little memory.
    together = max(1, _AT_ONCE // right.shape[0])
    for start in range(0, right.shape[1], together):
        some = right[:, start : start + together]
        column_scale = _power_of_two_scale(some, dim=0)
        right_slices = _slices(some / column_scale, beta)
        part = total[:, start : start + together]
        # Smallest products first: the last addition, of the largest, is the one whose rounding
        # shows.
        for order in reversed(range(_SLICES)):
            for i in range(order + 1):
                # A product that the library adds itself might be added in several parts.
                part += left_slices[i] @ right_slices[order - i]
        part *= row_scale
        part *= column_scale
    return total


def is_identity(matrix: Tensor) -> bool:
    """Whether a matrix is square with ones on the diagonal and zeros elsewhere."""
    return matrix.shape[0] == matrix.shape[1] and torch.equal(
        matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    )


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose inner indices are, on both sides, of one size each.

    What is small on one side and large on the other would else be cut off with the small bits.
    """
    largest_left, largest_right = left.abs().amax(dim=0), right.abs().amax(dim=1)
    exponent_left, exponent_right = torch.frexp(largest_left)[1], torch.frexp(largest_right)[1]
    half = torch.div(exponent_right - exponent_left, 2, rounding_mode="floor").clamp(-1000, 1000)
    # An index that is zero on one side contributes nothing, however large it is on the other.
    used = ((largest_left > 0) & (largest_right > 0)).to(left.dtype)
    return left * (_power_of_two(half) * used), right * (_power_of_two(-half) * used)[:, None]


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent for integers in (-1023, 1024), put together from bits.

    A vectorised exp2 or pow may be off by one.
    """
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _power_of_two_scale(matrix: Tensor, dim: int) -> Tensor:
    """The power of two s with s <= max|x| < 2 s along `dim` (kept as an axis); 1 if all are 0."""
    largest = matrix.abs().amax(dim=dim, keepdim=True)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    # largest = m * 2**e with m in [1/2, 1): the quotient 2**(e-1) is a float64, hence exact.
    mantissa, _ = torch.frexp(largest)
    return largest / (2 * mantissa)


def _slices(matrix: Tensor, beta: int) -> list[Tensor]:
    """Cut entries in (-2, 2) into slices of at most `beta` bits, largest first."""
    slices = []
    bound = 1  # entries are at most 2**bound in magnitude
    for _ in range(_SLICES):
        # x + sigma lies between 2**p and 2**(p+1), p = 52 + bound - beta, where float64 numbers
        # are 2**(bound - beta) apart: adding sigma rounds x to that unit, taking it away is exact.
        sigma = 1.5 * 2.0 ** (52 + bound - beta)
        piece = (matrix + sigma) - sigma
        matrix = matrix - piece  # exact, and at most half a unit
        slices.append(piece)
        bound -= beta + 1
    return slices
