"""The singular values of whitened keys: what is asked of them, from as little as will tell it.

Whether an equality can be held, and how well, is a matter of the largest and the smallest singular
value of A (n x E). For a few facts all of them are found, from the triangle S of A = Q S, which
does not square the condition. For many that costs as much as the solution does. There the Gram
matrix G = A^T A, which a solution needs anyhow, is looked at first: 40 steps of Lanczos find the
largest eigenvalues of G and of its inverse (by the Cholesky factor of G) to six digits and more,
in a hundredth of the time. Rounding changes an eigenvalue of G by EPS of the largest, so that
digits are lost with the square of the condition; where that is too many, and where G has no
factor, S it is again.

The same factor gives the orthonormal basis that an equality is solved in, Q = A S^-1 ("Cholesky
QR"; Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2
algorithm", ETNA 44, 2015): its columns are orthogonal to EPS times the square of the condition.
Beyond a condition of a thousand the basis is that of Householder reflections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

# Up to so many facts all singular values are found, whose cost is nothing beside the metric's then.
_FEW = 256

# The condition of A up to which its smallest singular value is read off G: six digits are left.
_GRAM_LIMIT = 1e5

# That up to which A S^-1 is orthonormal enough: to 1e-10.
_BASIS_LIMIT = 1e3

# Dimensions of the Krylov space.
_STEPS = 40


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The extreme singular values of A (n x E), and what they were found from.

    - largest, smallest: the first and the min(n, E)-th; zero where n = 0.
    - rank: number of those above the cutoff that was given, relative to the largest.
    - gram: A^T A, or A A^T where that is smaller; None if it did not tell.
    - triangle: S, upper, with S^T S = A^T A (A A^T). basis: Q of A = Q S; None if not made.
    """

    largest: float
    smallest: float
    rank: int
    gram: Tensor | None
    triangle: Tensor
    basis: Tensor | None

    @property
    def condition(self) -> float:
        """The ratio of the two; inf if the smallest is zero."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf


def spectrum_of(A: Tensor, cutoff: float, *, basis: bool = False) -> Spectrum:
    """The `Spectrum` of A (n x E, float64).

    basis: an orthonormal basis is wanted; it is made here where Householder reflections make both.
    """
    n, E = A.shape
    tall = A if n >= E else A.mT
    if min(n, E) > _FEW and (found := _from_gram(tall, cutoff)) is not None:
        return found
    Q, S = torch.linalg.qr(tall, mode="reduced" if basis and n >= E else "r")
    s = torch.linalg.svdvals(S)
    largest, smallest = float(s[:1].sum()), float(s[-1:].sum())
    rank = int((s > cutoff * largest).sum())
    return Spectrum(largest, smallest, rank, None, S, Q if basis and n >= E else None)


def orthonormal_rows(A: Tensor, found: Spectrum) -> tuple[Tensor, Tensor]:
    """Q^T (E x n) and S (E x E) of A = Q S, for a spectrum of A (n x E <= n)."""
    if found.basis is not None:
        return found.basis.mT, found.triangle
    if found.gram is not None and found.condition <= _BASIS_LIMIT:
        return solve_triangular(found.triangle.mT, A.mT, upper=False), found.triangle
    Q, S = torch.linalg.qr(A)
    return Q.mT, S


def _from_gram(A: Tensor, cutoff: float) -> Spectrum | None:
    """The spectrum of A (n x E <= n) of full rank from A^T A; None if that does not tell."""
    gram = A.mT @ A
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return None
    S = factor.mT

    def inverse(v: Tensor) -> Tensor:
        return solve_triangular(S, solve_triangular(factor, v, upper=False), upper=True)

    ends = torch.stack([_largest(gram.matmul, gram), _largest(inverse, gram)])
    largest, smallest = float(ends[0].sqrt()), float(ends[1].rsqrt())
    # written so that it is false where something overflowed
    if not (0 < largest <= _GRAM_LIMIT * smallest and cutoff * _GRAM_LIMIT < 1):
        return None
    return Spectrum(largest, smallest, A.shape[1], gram, S, None)


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The largest eigenvalue of a symmetric positive definite map of len(like) dimensions.

    Lanczos with full orthogonalisation, from the same vector every time. Nothing waits for a
    number: on a GPU all steps are queued.
    """
    size, steps = len(like), min(len(like), _STEPS)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, 1, generator=generator, dtype=torch.float64).to(like.device)
    space = like.new_zeros(steps, size)
    tiny = torch.finfo(like.dtype).tiny
    for step in range(steps):
        for _ in range(2):  # once leaves rounding
            vector = vector - space[:step].mT @ (space[:step] @ vector)
        # where the space is exhausted what is left is zero, and stays so: it adds nothing
        vector = vector / vector.norm().clamp_min(tiny)
        space[step] = vector[:, 0]
        vector = apply(vector)
    projected = space @ apply(space.mT)
    return torch.linalg.eigvalsh((projected + projected.mT) / 2)[-1]
