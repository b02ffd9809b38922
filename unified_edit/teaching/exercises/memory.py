"""Checks for the exercises of the chapter "The MLP as an associative memory"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.checking import ExerciseError, agree, call, draw, right, tensor


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
        agree(
            tensor(call(crosstalk, K, V), (d_out, count), f"the crosstalk of {count} pairs"),
            crosstalk_of(K, V),
            "the crosstalk",
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
    if float(rest.norm()) > 1e-9 * float(V.norm()):
        raise ExerciseError("orthogonal keys have no crosstalk, and yours is not zero there")
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
        try:
            given = call(associative_memory, K, V)
        except ExerciseError as problem:
            if K is few[0] or "singular" not in str(problem).lower():
                raise
            raise ExerciseError(
                f"for {name} {problem}. K'K has no inverse there; the pseudoinverse exists always "
                "(`torch.linalg.pinv`)"
            ) from None
        W = tensor(given, (V.shape[0], K.shape[0]), f"W for {name}")
        mistakes = {
            "these are outer products alone, V K'; their crosstalk has to go": V @ K.T,
            "these are outer products with keys of length one; their crosstalk is still there": (
                V @ (K / K.norm(dim=0)).T
            ),
            "these are outer products over the squared length of the keys; that is enough only "
            "where keys are orthogonal": V @ (K / K.square().sum(dim=0)).T,
        }
        if K is few[0]:
            residual = V - W @ K
            own = smallest_memory(K, V)
            if float(residual.norm()) < 1e-6 * float(V.norm()) and float(
                (W - own).norm()
            ) > 1e-6 * float(own.norm()):
                raise ExerciseError(
                    f"W K is V for {name}, but W is not the smallest such matrix: it answers "
                    "vectors that are orthogonal to every key, and V K^+ gives 0 for them"
                )
        agree(W, smallest_memory(K, V), f"W for {name}", mistakes)
    nearly = draw(7, 4, 3)
    nearly[:, 2] = nearly[:, 1] + 1e-6 * draw(8, 4)
    V = draw(9, 2, 3)
    W = tensor(call(associative_memory, nearly, V), (2, 4), "W for two nearly equal keys")
    if float((W @ nearly - V).norm()) > 1e-3 * float(V.norm()):
        raise ExerciseError(
            "for two keys that differ by a millionth W K is not V any more: something small was "
            "cut off, or a ridge was added"
        )
    return right("W K is V wherever that is possible, and W is the smallest such matrix.")


def check_add_association(add_association: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``add_association(W, k, v) -> W'``: W'k = v, and W'x = W x for x orthogonal to k.

    W is (d_out x d_k), k is (d_k,), v is (d_out,). Raises ExerciseError.
    """
    for seed, (d_out, d_k) in enumerate(((2, 4), (3, 3))):
        W, k, v = draw(seed, d_out, d_k), draw(10 + seed, d_k), draw(20 + seed, d_out)
        r = v - W @ k
        new = tensor(call(add_association, W, k, v), (d_out, d_k), "the new W")
        agree(
            new,
            with_association(W, k, v),
            "the new W",
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
        )
    return right("W'k is v, and every x that is orthogonal to k keeps its value.")
