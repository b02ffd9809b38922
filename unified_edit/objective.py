"""The objective behind ROME, EMMET and MEMIT, and its solution: tensors in, tensors out.

A weight W0 (d_out x d_in) maps keys to values. E new facts have the keys K (d_in x E), one column
a fact, and need R (d_out x E) added to their values. The update Delta is to

    preserve:  ||Delta K0||^2 / N = tr(Delta C0 Delta^T)        C0 = mean of k k^T over N other keys
    memorize:  Delta K = R  (equality)    or    ||Delta K - R||_F^2 small  (least squares)

These are :eq:`objective-equality` and :eq:`objective-least-squares` of the book. Whatever solves
either has the form M K^T C0^-1, :eq:`objective-row-space`.

**Equality.** Minimise 1/2 tr(Delta C0 Delta^T) subject to Delta K = R. With multipliers Lambda
(d_out x E) the Lagrangian is 1/2 tr(Delta C0 Delta^T) - tr(Lambda^T (Delta K - R)). Its gradient in
Delta vanishes where Delta C0 = Lambda K^T: the update answers to combinations of the new keys and
to nothing else. So Delta = Lambda K^T C0^-1; put into the constraint, Lambda (K^T C0^-1 K) = R:

    Delta = R (K^T C0^-1 K)^-1 K^T C0^-1        EMMET (arXiv 2403.14236), any E
          = r k^T C0^-1 / (k^T C0^-1 k)         ROME (arXiv 2202.05262, eq. 2), E = 1

The cost is strictly convex, the constraint linear: the stationary point is the minimum. It exists
for every R only if the columns of K are linearly independent, so E <= d_in at least.

**Least squares.** Minimise lam tr(Delta C0 Delta^T) + ||Delta K - R||_F^2. The gradient vanishes
where lam Delta C0 + (Delta K - R) K^T = 0, the normal equations:

    Delta = R K^T (lam C0 + K K^T)^-1           MEMIT (arXiv 2210.07229, eq. 14; there lam is in C0)

**The bridge.** (lam I + K^T C0^-1 K) K^T = K^T C0^-1 (lam C0 + K K^T): both sides are
lam K^T + K^T C0^-1 K K^T. The inverse of each bracket, applied from its own side, pushes K^T
through:

    R K^T (lam C0 + K K^T)^-1  =  R (lam I + K^T C0^-1 K)^-1 K^T C0^-1

MEMIT is EMMET with a ridge lam on its E x E Gram matrix; EMMET is MEMIT's limit lam -> 0. Where K
has dependent columns the limit is R G^+ K^T C0^-1 (G = K^T C0^-1 K, ^+ the pseudoinverse): of all
updates that violate Delta K = R least, the one that costs least.

**In whitened coordinates.** C0 = L L^T (Cholesky), A = L^-1 K. Then G = A^T A, the cost is
||Delta L||_F^2, and Delta L is found from A alone, in three ways that are the same mathematics:

    equality         A = Q S (thin QR)    Delta = (R S^-1) (Q^T L^-1)
    least squares    by Cholesky          Delta = (R (lam I + A^T A)^-1) (A^T L^-1)     E <= d_in
                                          Delta = (R A^T (lam I + A A^T)^-1) L^-1       E > d_in
    limit lam -> 0   A = U s V^T (SVD)    Delta = (R V s^-1) (U^T L^-1), tiny s left out

QR does not square the condition number, as the Gram matrix does: with cond(A) = 1e7 it holds the
equality to 1e-9 or better, where a Cholesky factor of G misses it by 1e-3. Nothing is ever added to
the diagonal to make the equality solvable: that would be the other problem. The book derives these
ways as :eq:`emmet-qr` and :eq:`bridge-svd`, and measures the digits, :eq:`emmet-digits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.errors import InfeasibleError, ObjectiveError
from unified_edit.metric import Metric, check_facts, closest_columns, fact_label
from unified_edit.reproducible import is_identity, matmul

CONDITION_LIMIT = 1e8
"""Largest condition number of the whitened keys A up to which `Delta K = R` is held.

float64 carries 16 digits and the solution loses as many as the condition has; half of them are kept
for the facts. A direction of the keys whose singular value is below 1 / CONDITION_LIMIT of the
largest counts as absent: `rank` is the number of the others, and the limit lam -> 0 leaves it out.
"""

EQUALITY_TOLERANCE = 1e-8
"""Relative error ||Delta K - R|| / ||R|| within which the stored factors hold an equality."""

# The condition is measured from rounded numbers: one that is 1e8 by construction may come out as
# 1.00001e8 when C0 is ill-conditioned too.
_CUTOFF = 1 / (1.01 * CONDITION_LIMIT)

# Cholesky of lam I + A^T A loses as many digits as that matrix's condition has. Beyond this, the
# singular values of A itself are used, which have half as many digits to lose.
_CHOLESKY_LIMIT = 1e6

_EPS = torch.finfo(torch.float64).eps

Form = Literal["equality", "ridge", "least_violation"]
Infeasible = Literal["raise", "least_violation"]


@dataclass(frozen=True)
class Diagnosis:
    """What a solution is worth.

    - condition: of the whitened keys A = L^-1 K, largest over E-th singular value; inf if E > d_in.
    - rank: number of singular values of A above 1 / CONDITION_LIMIT of the largest.
    - memorization_error: ||Delta K - R|| / ||R||, the root of :eq:`objective-memorize` relative to
      what was asked; ||Delta K|| where R = 0.
    - preservation_error: tr(Delta C0 Delta^T), the mean squared change of a preserved key's value;
      for an equality it is :eq:`emmet-price`.
    - form: the problem solved: "equality", "ridge", or "least_violation", the limit lam -> 0 where
      the equality cannot be held.
    """

    condition: float
    rank: int
    memorization_error: float
    preservation_error: float
    form: Form


@dataclass(frozen=True, eq=False)
class Update:
    """Delta (d_out x d_in) as two float64 factors: Delta = left @ right.

    left: (d_out, r); right: (r, d_in). Where a dense matrix takes fewer numbers than the factors,
    one of them is Delta itself and the other an identity (`is_dense`); to store one, `delta` is
    enough then. Either way `reproducible.matmul(left, right)` is `delta`, bit for bit.
    """

    left: Tensor
    right: Tensor
    diagnosis: Diagnosis

    @property
    def rank(self) -> int:
        """r, the number of columns of `left`."""
        return self.left.shape[1]

    @cached_property
    def is_dense(self) -> bool:
        """Whether one factor is the identity and the other is Delta."""
        return is_identity(self.left) or is_identity(self.right)

    @cached_property
    def delta(self) -> Tensor:
        """Delta, dense (d_out x d_in), float64; the same bits on every machine."""
        return matmul(self.left, self.right)


@torch.no_grad()
def solve(
    metric: Metric | Tensor,
    K: Tensor,
    R: Tensor,
    *,
    ridge: float = 0.0,
    infeasible: Infeasible = "raise",
    names: Sequence[str] | None = None,
) -> Update:
    """The update that stores the facts (K, R) and changes the preserved keys' values least.

    metric: a `Metric`, or C0 (d_in, d_in). K: (d_in, E) keys, R: (d_out, E) what to add to their
    values, columns are facts; any floating type, computed in float64 on the metric's device.

    - ridge = 0, the equality Delta K = R: EMMET (arXiv 2403.14236), :eq:`emmet-update`, and ROME
      (arXiv 2202.05262, eq. 2) for E = 1, :eq:`first-rank-one` and :eq:`rome-update`. Held to
      EQUALITY_TOLERANCE up to CONDITION_LIMIT.
    - ridge = lam > 0, least squares: MEMIT (arXiv 2210.07229, eq. 14), :eq:`memit-update`, lam
      being the weight of the *mean* C0, :eq:`memit-mean-sum`. With C0 multiplied by w and a number
      alpha on the Gram matrix, as in EMMET's released code, it is lam = alpha * w,
      :eq:`bridge-released`.
    - infeasible = "least_violation": where the equality cannot be held, its least-squares solution
      of least cost, which is the limit lam -> 0, :eq:`bridge-pseudoinverse`. Otherwise it changes
      nothing.

    names: what to call the facts in errors (E strings; their indices otherwise).

    Raises InfeasibleError for ridge = 0 if the whitened keys have a condition above
    CONDITION_LIMIT or there are more facts than the rank of K, :eq:`emmet-feasible`, naming the two
    facts with the most collinear keys; ObjectiveError for shapes that do not fit, entries that are
    not finite, no facts, a zero key, or a ridge that is negative or not finite; and what `Metric`
    raises.
    """
    metric = metric if isinstance(metric, Metric) else Metric(metric)
    lam = _check_ridge(ridge)
    if infeasible not in get_args(Infeasible):
        raise ObjectiveError(
            f"infeasible must be one of {', '.join(get_args(Infeasible))}, not {infeasible!r}"
        )
    K, R = check_facts(metric, K, R, names)
    d_in, E = K.shape

    A = metric.whiten(K)
    _require_no_overflow(A)
    tall = d_in >= E
    Q, S = torch.linalg.qr(A if tall else A.mT, mode="reduced" if tall and lam == 0 else "r")
    singular_values = torch.linalg.svdvals(S)
    largest, smallest = float(singular_values[0]), float(singular_values[-1])
    condition = largest / smallest if tall and smallest > 0 else math.inf
    rank = int((singular_values > _CUTOFF * largest).sum())

    basis, target = _row_basis(R, d_in)
    form: Form
    if lam > 0:
        form = "ridge"
        left, right = _ridge(metric, K, A, target, lam, singular_values)
    elif rank == E:
        form = "equality"

        def times_inverse(X: Tensor) -> Tensor:
            product: Tensor = solve_triangular(S, X, upper=True, left=False)
            return product

        left, right = _hold(metric, K, target, Q.mT, times_inverse)
    elif infeasible == "raise":
        raise InfeasibleError(_infeasible_message(A, condition, rank, names))
    else:
        form = "least_violation"
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        U, s, V = U[:, :rank], s[:rank], Vh[:rank].mT
        left, right = _hold(metric, K, target, U.mT, lambda X: (X @ V) / s)

    _require_no_overflow(left, right)
    left, right = _fewest_numbers(K, R, left, right, basis, form)
    size = float(R.norm())
    return Update(
        left=left.contiguous(),
        right=right.contiguous(),
        diagnosis=Diagnosis(
            condition=condition,
            rank=rank,
            memorization_error=_violation(K, R, left, right, form) / (size if size > 0 else 1.0),
            preservation_error=metric.cost(left, right),
            form=form,
        ),
    )


def _hold(
    metric: Metric,
    K: Tensor,
    R: Tensor,
    rows: Tensor,
    times_inverse: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """left and right of Delta = (R S^-1) (rows L^-1), where `rows` A = S.

    `times_inverse` multiplies by S^-1 (a pseudoinverse in the limit lam -> 0) from the right.
    """
    right = metric.unwhiten_rows(rows)
    left = times_inverse(R)
    _require_no_overflow(left, right)
    # Rounding in L makes right @ K differ from S. What that and the solution with S miss is found
    # from the factors as they are, in products accurate enough to see it, and taken out.
    left = left + times_inverse(R - matmul(left, matmul(right, K)))
    return left, right


def _ridge(
    metric: Metric, K: Tensor, A: Tensor, R: Tensor, lam: float, singular_values: Tensor
) -> tuple[Tensor, Tensor]:
    """left and right of the least-squares solution with weight `lam` > 0."""
    d_in, E = A.shape
    squares = singular_values.square()
    if float(squares[0]) + lam > _CHOLESKY_LIMIT * (float(squares[-1]) + lam):
        # The filter s / (s^2 + lam), without squaring A. A singular value that is rounding would
        # be passed on as 1/s by a lam that is smaller still: it is left out. How much rounding K
        # changes A is seen by changing K that much, with signs drawn at random.
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        signs = torch.randint(0, 2, K.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        rounding = _EPS * (max(A.shape) * s[0] + metric.whiten(signs.to(K.device) * K).norm())
        keep = int((s > rounding).sum())
        U, s, V = U[:, :keep], s[:keep], Vh[:keep].mT
        return (R @ V) * (s / (s.square() + lam)), metric.unwhiten_rows(U.mT)
    if d_in >= E:
        factor = torch.linalg.cholesky(_plus_diagonal(A.mT @ A, lam))
        return torch.cholesky_solve(R.mT, factor).mT, metric.unwhiten_rows(A.mT)
    factor = torch.linalg.cholesky(_plus_diagonal(A @ A.mT, lam))
    # The right factor would be L^-1 itself: the product is made instead, by triangular solution.
    return _dense(metric.unwhiten_rows(torch.cholesky_solve(A @ R.mT, factor).mT))


def _violation(K: Tensor, R: Tensor, left: Tensor, right: Tensor, form: Form) -> float:
    """||Delta K - R||.

    With a ridge it is far above rounding; an equality's is rounding and nothing else, and an
    ordinary product would measure its own.
    """
    product = torch.matmul if form == "ridge" else matmul
    return float((product(left, product(right, K)) - R).norm())


def _fewest_numbers(
    K: Tensor, R: Tensor, left: Tensor, right: Tensor, basis: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """The factors to store of Delta = (basis) left right: as they are, merged, or dense.

    Merged or dense, entries of Delta are rounded that cancel in Delta K. Where keys and C0 are
    both so ill-conditioned that this would break an equality, the factors stay as they are.
    """
    d_out, d_in = R.shape[0], K.shape[0]
    if basis is not None:
        smaller = basis, matmul(left, right)
        left = matmul(basis, left)
    elif left.shape[1] * (d_out + d_in) > d_out * d_in:
        smaller = _dense(matmul(left, right))
    else:
        return left, right
    allowed = EQUALITY_TOLERANCE * float(R.norm())
    if form == "equality" and _violation(K, R, *smaller, form) > allowed:
        return left, right
    return smaller


def _row_basis(R: Tensor, d_in: int) -> tuple[Tensor | None, Tensor]:
    """R = basis @ target, where that makes an update of many facts smaller; else (None, R).

    Delta = R (...) has no more rank than R. The rank is cut here and not on Delta's own factors:
    an error of eps in R stays one of eps in Delta K, on Delta the condition would multiply it.
    """
    d_out, E = R.shape
    r = min(E, d_in)
    if 2 * r <= min(d_out, d_in):
        return None, R
    U, s, Vh = torch.linalg.svd(R, full_matrices=False)
    rank = max(1, int((s > max(R.shape) * _EPS * s[0]).sum()))
    if rank * (d_out + d_in) >= min(r * (d_out + d_in), d_out * d_in):
        return None, R
    return U[:, :rank], s[:rank, None] * Vh[:rank]


def _dense(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A dense Delta as two factors, one of them an identity of the smaller side."""
    identity = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    return (identity, delta) if delta.shape[0] <= delta.shape[1] else (delta, identity)


def _plus_diagonal(matrix: Tensor, lam: float) -> Tensor:
    matrix.diagonal().add_(lam)
    return matrix


def _infeasible_message(A: Tensor, condition: float, rank: int, names: Sequence[str] | None) -> str:
    d_in, E = A.shape
    i, j, cosine = closest_columns(A)
    first, second = fact_label(i, names), fact_label(j, names)
    many = f"there are more than the {d_in} dimensions of a key, and " if d_in < E else ""
    return (
        f"Delta K = R cannot be held for these {E} facts: {many}their whitened keys have rank "
        f"{rank} and condition {condition:.2g} (limit {CONDITION_LIMIT:.0e}). The most collinear "
        f"keys are those of {first} and {second}, |cosine| {cosine:.12g}. Set a ridge (least "
        'squares), drop one of the two, or pass infeasible="least_violation" (the limit ridge -> 0)'
    )


def _require_no_overflow(*matrices: Tensor) -> None:
    if not all(bool(torch.isfinite(matrix).all()) for matrix in matrices):
        raise ObjectiveError(
            "the update overflows float64: K, R and C0 are of scales too different to solve for"
        )


def _check_ridge(ridge: float) -> float:
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)):
        raise ObjectiveError(f"ridge must be a number, not {ridge!r}")
    if not 0 <= ridge < math.inf:
        raise ObjectiveError(
            f"ridge must be 0 (equality) or a positive finite number (least squares), not {ridge!r}"
        )
    return float(ridge)
