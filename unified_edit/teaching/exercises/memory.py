"""Checks for the exercises of the chapter "The MLP as an associative memory"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import (
    FEW_DIGITS,
    TOLERANCE,
    ExerciseError,
    Mistakes,
    agree,
    apart,
    draw,
    name_of,
    refuse_rounded,
    relative_error,
    right,
    single,
    tensor,
)
from unified_edit.teaching.exercises.updates import lam_of, ridge_of

#: Relative error of W K that is allowed where two keys differ by a millionth only: with the
#: pseudoinverse it is 1e-10.
NEAR = 1e-4


def crosstalk_of(K: Tensor, V: Tensor) -> Tensor:
    """What other pairs add to each recalled value, :eq:`memory-crosstalk`: (d_out x E)."""
    gram = K.T @ K
    return V @ (gram - torch.diag(gram.diagonal()))


def smallest_memory(K: Tensor, V: Tensor) -> Tensor:
    """V K^+ (d_out x d_k), :eq:`memory-pinv`: of all minimisers of ||W K - V||, the smallest."""
    return V @ torch.linalg.pinv(K)


def with_association(W: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """W + (v - W k) k' / (k'k) (d_out x d_k), :eq:`memory-add`, for k (d_k,) and v (d_out,)."""
    return W + torch.outer(v - W @ k, k) / (k @ k)


def check_crosstalk(crosstalk: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``crosstalk(K, V)``: column j is the sum over i != j of (k_i'k_j) v_i.

    K is (d_k x E), V is (d_out x E); the result has the shape of V. Raises ExerciseError.
    """
    for seed, (d_k, d_out, count) in enumerate(((4, 3, 5), (6, 2, 3))):
        K, V = draw(seed, d_k, count), draw(10 + seed, d_out, count)
        gram, unit = K.T @ K, K / K.norm(dim=0)
        cosines = unit.T @ unit
        what = f"the crosstalk of {count} pairs"
        agree(
            tensor(call(crosstalk, K, V), (d_out, count), what),
            crosstalk_of(K, V),
            what,
            {
                "this is all that comes out, W k_j; leave out the pair's own part, i = j": V @ gram,
                "you took v_j off; the pair's own part is (k_j'k_j) v_j, and these keys are not of "
                "length one": V @ gram - V,
                "you took the cosines of the keys; the memory multiplies the keys as they are": (
                    V @ (cosines - torch.eye(count, dtype=torch.float64))
                ),
                "every column is the same: the products k_i'k_j belong to key j": (
                    crosstalk_of(K, V).sum(dim=1, keepdim=True).expand(-1, count)
                ),
                "the products were squared": V @ (gram.square() - torch.diag(gram.diagonal() ** 2)),
            },
        )
    orthogonal = torch.linalg.qr(draw(3, 5, 3)).Q * torch.tensor([1.0, 2.0, 3.0]).double()
    V = draw(4, 2, 3)
    rest = tensor(call(crosstalk, orthogonal, V), (2, 3), "the crosstalk of orthogonal keys")
    agree(rest, torch.zeros(2, 3), "the crosstalk of orthogonal keys")
    return right("The sum over all other pairs, and nothing where keys are orthogonal.")


def check_associative_memory(associative_memory: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``associative_memory(K, V) -> W``: V K^+, also where E > d_k or keys depend.

    K is (d_k x E), V is (d_out x E), W is (d_out x d_k). Raises ExerciseError.
    """
    few, many = (draw(0, 5, 3), draw(1, 2, 3)), (draw(2, 3, 6), draw(3, 2, 6))
    repeated = torch.cat([draw(4, 5, 2), draw(4, 5, 2)[:, :1]], dim=1), draw(5, 2, 3)
    examples = {
        "3 keys with 5 entries": few,
        "6 keys with 3 entries": many,
        "3 keys with 5 entries, of which two are the same": repeated,
    }
    for name, (K, V) in examples.items():
        watch = Watch(associative_memory)
        what = f"W for {name}" + "," * ("," in name)
        try:
            W = tensor(watch(K, V), (V.shape[0], K.shape[0]), what)
        except ExerciseError as problem:
            noise = any(word in str(problem) for word in ("singular", "finite"))
            if noise and watch.singular():
                raise ExerciseError(_singular(watch, name)) from None
            raise
        expected, ordinary = smallest_memory(K, V), torch.eye(len(K), dtype=torch.float64)
        ridge = lam_of(W, ordinary, K, V)
        mistakes: Mistakes = {
            "these are outer products alone, V K'; their crosstalk has to go": V @ K.T,
            "these are outer products with keys of length one; their crosstalk is still there": (
                V @ (K / K.norm(dim=0)).T
            ),
            "these are outer products over the squared length of the keys; that is enough only "
            "where keys are orthogonal": V @ (K / K.square().sum(dim=0)).T,
            f"a ridge of {ridge or 0:.2g} was added, W = V K' (K K' + ridge I)^-1, and W K is not "
            "as near to V as it can be": () if ridge is None else (W,),
        }
        if relative_error(W, expected) > TOLERANCE and watch.singular():
            raise ExerciseError(_singular(watch, name))
        agree(W, expected, what, mistakes, otherwise=_said(W, expected, K, V))
    _check_nearly(associative_memory)
    return right("W K is V wherever that is possible, and W is the smallest such matrix.")


def _singular(watch: Watch, name: str) -> str:
    """What to say to somebody who has inverted a matrix that has no inverse."""
    n = watch.singular()
    return (
        f"for {name}, {name_of(watch.function)} inverts a {n} x {n} matrix that has no inverse, or "
        "solves with it: K'K has one only where no key depends on the others, K K' only where the "
        "keys span everything. The pseudoinverse exists always (`torch.linalg.pinv`)"
    )


def _said(W: Tensor, best: Tensor, K: Tensor, V: Tensor) -> str:
    """In which of the two respects W is not the best one."""
    misfit, least = float((W @ K - V).norm()), float((best @ K - V).norm())
    if misfit > least + TOLERANCE * float(V.norm()):
        have, can = apart(misfit, least)
        return (
            f"The norm of W K - V is {have}, and it can be as small as {can}"
            if least > TOLERANCE
            else f"W K can be V here, and misses it by {misfit / float(V.norm()):.2g} relative"
        )
    return (
        "W K is as near to V as it can be, but W is not the smallest such matrix: it answers "
        "vectors that are orthogonal to every key, and V K^+ gives 0 for them"
    )


def _check_nearly(associative_memory: Callable[[Tensor, Tensor], Any]) -> None:
    """Two keys that differ by a millionth are still two keys."""
    K = draw(7, 4, 3)
    K[:, 2] = K[:, 1] + 1e-6 * draw(8, 4)
    V, ordinary = draw(9, 2, 3), torch.eye(4, dtype=torch.float64)
    watch, what = Watch(associative_memory), "W for two keys that differ by a millionth"
    W = tensor(watch(K, V), (2, 4), what)
    refuse_rounded(W, smallest_memory(K, V), what)
    ridge = ridge_of(W, ordinary, K, V)
    mistakes: Mistakes = {
        "the singular value that tells the two apart was cut off, as if they were one": (
            V @ torch.linalg.pinv(K, rtol=1e-4) @ K
        ),
        f"a ridge of {ridge or 0:.1e} was added, too much for keys that are so close": (
            () if ridge is None else (W @ K,)
        ),
    }
    said = FEW_DIGITS if single(W) else ""
    if watch.hardest(3) > 1e11:
        said = (
            "You solve with K'K, whose condition is the square of that of K: there digits get lost"
        )
    agree(W @ K, V, f"W K, with {what},", mistakes, tolerance=NEAR, otherwise=said)
    orthogonal = torch.linalg.svd(K).U[:, 3]
    if float((W @ orthogonal).norm()) > TOLERANCE * float(W.norm()):
        raise ExerciseError(
            f"{what} is not the smallest such matrix: it answers a vector that is orthogonal to "
            "every key, and V K^+ gives 0 for it"
        )


def check_add_association(add_association: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``add_association(W, k, v) -> W'``: W'k = v, and W'x = W x for x orthogonal to k.

    W is (d_out x d_k), k is (d_k,), v is (d_out,). Raises ExerciseError.
    """
    for seed, (d_out, d_k) in enumerate(((2, 4), (3, 3))):
        W, k, v = draw(seed, d_out, d_k), draw(10 + seed, d_k), draw(20 + seed, d_out)
        r = v - W @ k
        new = tensor(call(add_association, W, k, v), (d_out, d_k), "the new W")
        missed = float((new @ k - v).norm() / v.norm())
        agree(
            new,
            with_association(W, k, v),
            f"the new W of {d_out} x {d_k}",
            {
                "v was added to what is stored already; add v - W k, what is missing": (
                    W + torch.outer(v, k) / (k @ k)
                ),
                "it is not divided by k'k: these keys are not of length one": W + torch.outer(r, k),
                "it is divided by the length of k; divide by its square": (
                    W + torch.outer(r, k) / k.norm()
                ),
                "neither what is stored is taken off nor the length of k divided out": (
                    W + torch.outer(v, k)
                ),
                "this is the change alone; add it to W": torch.outer(r, k) / (k @ k),
                "the residual has the wrong sign: it is v - W k": W - torch.outer(r, k) / (k @ k),
                "all that was stored is gone: this memory holds the new pair only": (
                    torch.outer(v, k) / (k @ k)
                ),
            },
            otherwise=(
                f"W'k misses v by {missed:.2g} relative"
                if missed > TOLERANCE
                else "W'k is v, but keys that are orthogonal to k do not keep their values"
            ),
        )
    return right("W'k is v, and every x that is orthogonal to k keeps its value.")
