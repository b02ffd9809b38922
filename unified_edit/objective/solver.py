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
    least squares    by Cholesky          Delta = (R (lam I + A^T A)^-1) (A^T L^-1)     E <= n
                                          Delta = (R A^T (lam I + A A^T)^-1) L^-1       E > n
    limit lam -> 0   A = U Sigma V^T      Delta = (R V Sigma^-1) (U^T L^-1), tiny ones left out

Nothing but A (n x E), and rows times L^-1, is asked of the metric: n is d_in here, and any other
linear map in the place of L^-1 is as good (`metric.MetricProtocol`). With the coordinates of a
null space of the preserved keys, n of them, the same lines solve AlphaEdit (arXiv 2410.02355).

QR does not square the condition number, as the Gram matrix does: with cond(A) = 1e7 it holds the
equality to 1e-9 or better, where a Cholesky factor of G misses it by 1e-3. Nothing is ever added to
the diagonal to make the equality solvable: that would be the other problem. The book derives these
ways as :eq:`emmet-qr` and :eq:`bridge-svd`, and measures the digits, :eq:`emmet-digits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.arguments import real_number
from unified_edit.errors import ObjectiveError
from unified_edit.objective.exact_product import is_identity, matmul
from unified_edit.objective.feasibility import examine, require_no_overflow, whitened
from unified_edit.objective.inputs import check_facts
from unified_edit.objective.metric import MetricProtocol, as_metric
from unified_edit.objective.spectrum import Spectrum, orthonormal_rows
from unified_edit.objective.update import Diagnosis, Form, Update

EQUALITY_TOLERANCE = 1e-8
"""Relative error ||Delta K - R|| / ||R|| within which the stored factors hold an equality."""

# Cholesky of lam I + A^T A loses as many digits as that matrix's condition has. Beyond this, the
# singular values of A itself are used, which have half as many digits to lose.
_CHOLESKY_LIMIT = 1e6

_EPS = torch.finfo(torch.float64).eps

# An accurate product costs six ordinary ones. Where a product has more terms than this, ordinary
# ones do as long as their rounding is at most this much of an equality.
_MANY_TERMS, _ROUNDING = 2**24, 1e-10

_Product = Callable[[Tensor, Tensor], Tensor]

Infeasible = Literal["raise", "least_violation"]


@torch.no_grad()
def solve(
    metric: MetricProtocol | Tensor,
    K: Tensor,
    R: Tensor,
    *,
    ridge: float = 0.0,
    infeasible: Infeasible = "raise",
    names: Sequence[str] | None = None,
) -> Update:
    """The update that stores the facts (K, R) and changes the preserved keys' values least.

    metric: a `Metric` or any other `MetricProtocol`, or C0 (d_in, d_in). K: (d_in, E) keys, R:
    (d_out, E) what to add to their values, columns are facts; any floating type, computed in
    float64 on the metric's device.

    - ridge = 0, the equality Delta K = R: EMMET (arXiv 2403.14236), :eq:`emmet-update`, and ROME
      (arXiv 2202.05262, eq. 2) for E = 1, :eq:`first-rank-one` and :eq:`rome-update`. Held to
      EQUALITY_TOLERANCE up to CONDITION_LIMIT.
    - ridge = lam > 0, least squares: MEMIT (arXiv 2210.07229, eq. 14), :eq:`memit-update`, lam
      being the weight of the *mean* C0, :eq:`memit-mean-sum`. With C0 multiplied by w and a number
      lam_G on the Gram matrix, as in EMMET's released code, it is lam = lam_G * w,
      :eq:`bridge-released`.
    - infeasible = "least_violation": where the equality cannot be held, its least-squares solution
      of least cost, which is the limit lam -> 0, :eq:`bridge-pseudoinverse`. Otherwise it changes
      nothing.

    names: what to call the facts in errors (E strings; their indices otherwise).

    Raises InfeasibleError for ridge = 0 if the whitened keys have a condition above
    CONDITION_LIMIT or there are more facts than the rank of K, :eq:`emmet-feasible`, naming the two
    facts with the most collinear keys; ObjectiveError for shapes that do not fit, entries that are
    not finite, no facts, a zero key, or a ridge that is negative or not finite; and what `Metric`
    raises, from its making or from keys in its dead coordinates (NullSpaceError).
    """
    metric = as_metric(metric)
    advice = "0 is the equality, a positive number least squares"
    lam = real_number(ridge, "ridge", ObjectiveError, least=0.0, advice=advice)
    if infeasible not in get_args(Infeasible):
        raise ObjectiveError(
            f"infeasible must be one of {', '.join(get_args(Infeasible))}, not {infeasible!r}"
        )
    K, R = check_facts(K, R, names, metric.dim, metric.device)
    A = whitened(metric, K, names)
    found, seen = examine(A, metric.dim, names, basis=lam == 0)
    form: Form
    if lam > 0:
        form = "ridge"
        made = _ridge(metric, K, A, R, lam, seen)
    elif found:
        form = "equality"
        rows, S = orthonormal_rows(A, seen)

        def times_inverse(X: Tensor) -> Tensor:
            product: Tensor = solve_triangular(S, X, upper=True, left=False)
            return product

        made = _hold(metric, K, R, rows, times_inverse)
    else:
        if infeasible == "raise":
            found.require()
        form = "least_violation"
        rank = found.rank
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        U, s, V = U[:, :rank], s[:rank], Vh[:rank].mT
        made = _hold(metric, K, R, U.mT, lambda X: (X @ V) / s)

    left, right, missed = made.left, made.right, made.missed
    require_no_overflow(left, right)
    size = float(R.norm()) or 1.0
    cost = made.cost if getattr(metric, "isometric", False) else metric.cost(left, right)
    if _kept_whole(left, right):
        whole = _whole(made)
        now = missed if form == "ridge" else float((made.product(whole, K) - R).norm())
        # Dense, entries of Delta are rounded that cancel in Delta K. Where keys and C0 are both so
        # ill-conditioned that this would break an equality, the factors stay as they are.
        if form != "equality" or now <= EQUALITY_TOLERANCE * size:
            (left, right), missed = _dense(whole), now
    return Update(
        left=left.contiguous(),
        right=right.contiguous(),
        diagnosis=Diagnosis(
            condition=found.condition,
            rank=found.rank,
            memorization_error=missed / size,
            preservation_error=cost,
            form=form,
        ),
    )


@dataclass(frozen=True)
class _Made:
    """Delta = left @ right; ||Delta K - R||, and ||X||_F^2 for Delta = X T in whitened keys.

    product: what multiplies factors of this size accurately enough.
    """

    left: Tensor
    right: Tensor
    missed: float
    cost: float
    product: _Product


def _hold(
    metric: MetricProtocol,
    K: Tensor,
    R: Tensor,
    rows: Tensor,
    times_inverse: Callable[[Tensor], Tensor],
) -> _Made:
    """Delta = (R S^-1) (rows L^-1), where the orthonormal `rows` A = S.

    `times_inverse` multiplies by S^-1 (a pseudoinverse in the limit lam -> 0) from the right.
    """
    right = metric.unwhiten(rows)
    left = times_inverse(R)
    require_no_overflow(left, right)
    # Rounding in L makes right @ K differ from S. What that and the solution with S miss is found
    # from the factors as they are, in products accurate enough to see it, and taken out.
    product = _product_for(R, left, right, K)
    reached = product(right, K)
    left = left + times_inverse(R - product(left, reached))
    missed = float((product(left, reached) - R).norm())
    return _Made(left, right, missed, float(left.square().sum()), product)


def _kept_whole(left: Tensor, right: Tensor) -> bool:
    """Whether an update is kept as Delta, not as its factors.

    It is where Delta takes fewer numbers, and for large products where it takes up to twice as
    many: factors have to be multiplied to the last bit whenever they are applied.
    """
    rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
    return (2 if _is_many(left, right) else 1) * inner * (rows + columns) > rows * columns


def _whole(made: _Made) -> Tensor:
    """Delta."""
    if is_identity(made.left):
        return made.right
    return made.left if is_identity(made.right) else made.product(made.left, made.right)


def _is_many(left: Tensor, right: Tensor) -> bool:
    return left.shape[0] * left.shape[1] * right.shape[1] > _MANY_TERMS


def _product_for(R: Tensor, left: Tensor, right: Tensor, K: Tensor) -> _Product:
    """The product that is accurate enough to hold left @ right @ K = R.

    An accurate one would take long where there are many terms, and would not be needed where one
    unit in the last place of |left| |right| |K| is little. The rounding of an ordinary product may
    be as many units as there are terms; but roundings cancel, and a hundredth of a unit was
    measured for a thousand terms. The norm is taken from the sums of the rows and of the columns,
    as if the matrix were of rank one, which products of positive ones nearly are.
    """
    if not _is_many(left, right):
        return matmul
    first, second, third = left.abs(), right.abs(), K.abs()
    rows = first @ (second @ third.sum(dim=1))
    columns = (first.sum(dim=0) @ second) @ third
    unit = _EPS * rows.norm() * columns.norm() / rows.sum()
    return torch.matmul if bool(unit <= _ROUNDING * R.norm()) else matmul


def _ridge(
    metric: MetricProtocol, K: Tensor, A: Tensor, R: Tensor, lam: float, seen: Spectrum
) -> _Made:
    """The least-squares solution with weight `lam` > 0.

    What it misses is far above rounding: ordinary products do where there are many terms.
    """
    (n, E), d_out = A.shape, R.shape[0]
    product: _Product = torch.matmul if _is_many(R, A.mT) else matmul
    if seen.largest**2 + lam > _CHOLESKY_LIMIT * (seen.smallest**2 + lam):
        # The filter s / (s^2 + lam), without squaring A. A singular value that is rounding would
        # be passed on as 1/s by a lam that is smaller still: it is left out. That of the direction
        # u is |u A| = |u L^-1 K|, which rounding K changes by at most eps |u L^-1| |K|.
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        right = metric.unwhiten(U.mT)
        rounding = _EPS * (max(A.shape) * s[0] + (right.abs() @ K.abs()).norm(dim=1))
        require_no_overflow(right, rounding)
        keep = s > rounding
        s, V = s[keep], Vh[keep].mT
        left, right = (R @ V) * (s / (s.square() + lam)), right[keep]
        missed = float((left @ (right @ K) - R).norm())
        return _Made(left, right, missed, float(left.square().sum()), product)
    gram = seen.gram
    if gram is None:
        gram = A.mT @ A if n >= E else A @ A.mT
    factor = torch.linalg.cholesky(_plus_diagonal(gram.clone(), lam))
    if n >= E:
        left = torch.cholesky_solve(R.mT, factor).mT
        reached = left @ gram  # Delta K, as K^T C0^-1 K is the Gram matrix
        missed, cost = float((reached - R).norm()), float((reached * left).sum())
        if d_out >= E:
            return _Made(left, metric.unwhiten(A.mT), missed, cost, product)
        X = left @ A.mT
        return _Made(_identity(d_out, X), metric.unwhiten(X), missed, cost, product)
    X = torch.cholesky_solve(A @ R.mT, factor).mT
    missed, cost = float((X @ A - R).norm()), float(X.square().sum())
    if n * (d_out + metric.dim) <= d_out * metric.dim:
        return _Made(X, metric.unwhiten(_identity(n, X)), missed, cost, product)
    # With all of L^-1 as a factor it would be large: the product is made by triangular solution.
    return _Made(_identity(d_out, X), metric.unwhiten(X), missed, cost, product)


def _dense(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A dense Delta as two factors, one of them an identity of the smaller side."""
    identity = _identity(min(delta.shape), delta)
    return (identity, delta) if delta.shape[0] <= delta.shape[1] else (delta, identity)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _plus_diagonal(matrix: Tensor, lam: float) -> Tensor:
    matrix.diagonal().add_(lam)
    return matrix
