"""Unified Concept Editing as the objective of this library (arXiv 2308.14761, eq. 7).

A matrix W0 of cross-attention gives W0 c for the key c of a concept. Concepts C (d x E) are to give
V, preserved ones P what they give, and W is to stay near W0:

    min  lam ||W - W0||^2  +  a ||W C - V||^2  +  b ||W P - W0 P||^2

which the authors solve as W = (lam W0 + a V C^T + b W0 P P^T) (lam I + a C C^T + b P P^T)^-1. With
Delta = W - W0 it is the least squares of `objective.solve`: what is preserved has the second moment
lam I + b P P^T in the place of C0, the facts are (C, V - W0 C), and the ridge is 1/a.

In the released methods V = W0 G: a concept is to give what its guide gives. Then W0 can be drawn
out to the left, V - W0 C = W0 (G - C), and

    W = W0 (I + D),    D = solve(lam I + b P P^T, C, G - C, ridge = 1/a)

is the same D (d x d) for *all* matrices that read the text: it is found once, and an edit is one
linear map of what the encoder says, put into W0. Where earlier edits are in force, W0 (I + D1)
reads the text, and the residual is (I + D1) (G - C).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from unified_edit.arguments import real_number
from unified_edit.errors import MethodError, NotPositiveDefiniteError
from unified_edit.objective import Metric, Update, solve


def preserved_metric(P: Tensor, *, lam: float = 0.5, weight: float = 1.0) -> Metric:
    """The metric of lam I + weight P P^T: what it costs to change what concepts P (d x n) give.

    Made once and shared by all matrices. Raises MethodError for a lam that is not positive or a
    negative weight, ObjectiveError for a P that is not finite.
    """
    lam = real_number(lam, "lam", MethodError, above=0.0)
    weight = real_number(weight, "the weight of preserved concepts", MethodError, least=0.0)
    P = P.detach().cpu().double()
    moment = weight * (P @ P.mT)
    moment.diagonal().add_(lam)
    try:
        return Metric(moment)
    except NotPositiveDefiniteError as problem:
        raise MethodError(
            f"lam = {lam:g} is nothing beside the preserved concepts (their second moment is up "
            f"to {float(moment.diagonal().max()):.1e}): give a larger one"
        ) from problem


def solve_concepts(metric: Metric, C: Tensor, R: Tensor, *, weight: float = 1.0) -> Update:
    """D (d x d, as factors) that moves the keys C (d x E) by R (d x E), and others little.

    It is the D of :eq:`concepts-map`. metric: of `preserved_metric`. R: G - C, where G are the
    keys of the guides. weight: a, of an edited concept, beside that of the preserved ones. Raises
    what `objective.solve` raises, and MethodError for a weight that is not positive.
    """
    weight = real_number(weight, "the weight of edited concepts", MethodError, above=0.0)
    return solve(metric, C, R, ridge=1.0 / weight)


def through(maps: Iterable[Update], X: Tensor) -> Tensor:
    """(I + the sum of some D) X: what W0 is given for X where these edits are in force."""
    result = X
    for one in maps:
        result = result + one.left @ (one.right @ X)
    return result
