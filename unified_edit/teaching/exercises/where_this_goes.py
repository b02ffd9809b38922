"""Checks for the exercises of the chapter "Where this goes"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import Mistakes, agree, draw, right, tensor

Solution = Callable[..., Any]


def gradient_update(K: Tensor, gradients: Tensor, eta: float) -> Tensor:
    """The Delta of :eq:`goes-ultraedit` with nothing normalised: (d_out x d_k)."""
    return _ridge(-eta * K.square().sum(dim=0) * gradients, K)


def _ridge(R: Tensor, K: Tensor, identity: float = 1.0) -> Tensor:
    """R K' (identity I + K K')^-1, by the small matrix."""
    gram = identity * torch.eye(K.shape[1], dtype=K.dtype) + K.T @ K
    solved: Tensor = torch.linalg.solve(gram, K.T)
    return R @ solved


def low_curvature(G: Tensor, C0: Tensor, Omega: Tensor, theta: float) -> Tensor:
    """The projection of :eq:`goes-low-curvature`: (d_out x d_k)."""
    of_keys, U = torch.linalg.eigh(C0)
    of_values, Q = torch.linalg.eigh(Omega)
    return _masked(G, U, Q, torch.outer(of_values, of_keys) < theta)


def _masked(G: Tensor, U: Tensor, Q: Tensor, mask: Tensor) -> Tensor:
    """G with the coordinates outside of the mask set to zero; Q' G U are the coordinates."""
    return Q @ (mask * (Q.T @ G @ U)) @ U.T


def check_gradient_update(gradient_update_: Solution) -> str:
    """Check ``gradient_update(K, gradients, eta) -> Delta``.

    K is (d_k x E), the columns of `gradients` (d_out x E) are those of the loss at the output; the
    Delta of :eq:`goes-ultraedit` with R from K and `gradients` as they are. Raises ExerciseError.
    """
    d, d_out = 6, 3
    for seed, E, eta in ((3, 2, 0.37), (4, 3, 0.21), (5, 4, 1.7)):
        K, gradients = draw(seed, d, E), draw(seed + 10, d_out, E)
        what = f"Delta of {E} facts"
        found = tensor(call(gradient_update_, K, gradients, eta), (d_out, d), what)
        squares = K.square().sum(dim=0)
        R = -eta * squares * gradients
        mistakes: Mistakes = {
            "the squared lengths of the keys do not enter R": _ridge(-eta * gradients, K),
            "a key enters R with its length; it is the square": (
                _ridge(-eta * squares.sqrt() * gradients, K)
            ),
            "this is the gradient step, the sum of -eta g k': there is no inverse": (
                -eta * gradients @ K.T
            ),
            "this is R K': the inverse of I + K K' is missing": R @ K.T,
            "this is the equality, without I in the bracket": _ridge(R, K, 0.0),
            "eta does not enter": gradient_update(K, gradients, 1.0),
            "eta enters twice, in R and in the bracket": _ridge(R, K, eta),
        }
        agree(found, gradient_update(K, gradients, eta), what, mistakes)
    return right("It is MEMIT's update for the metric I, and the gradients are its residual.")


def check_low_curvature(low_curvature_: Solution) -> str:
    """Check ``low_curvature(G, C0, Omega, theta) -> projected``.

    G is (d_out x d_k), C0 is (d_k x d_k), Omega is (d_out x d_out), both positive definite; the
    part of G on the pairs of eigenvectors with a product of eigenvalues below theta, of
    :eq:`goes-low-curvature`. Raises ExerciseError.
    """
    d, d_out = 6, 4
    of_keys = torch.tensor([0.02, 0.1, 0.3, 0.7, 1.6, 5.0], dtype=torch.float64)
    of_values = torch.tensor([0.05, 0.3, 1.4, 3.0], dtype=torch.float64)
    for seed, theta in ((3, 0.13), (4, 0.45), (5, 0.8)):
        U, Q = (torch.linalg.qr(draw(seed + 10 * n, n, n)).Q for n in (d, d_out))
        C0, Omega = (U * of_keys) @ U.T, (Q * of_values) @ Q.T
        C0, Omega = (C0 + C0.T) / 2, (Omega + Omega.T) / 2
        G = draw(seed + 20, d_out, d)
        what = f"the projection of G for theta = {theta:g}"
        found = tensor(call(low_curvature_, G, C0, Omega, theta), (d_out, d), what)
        products = torch.outer(of_values, of_keys)
        rows = torch.ones(d_out, 1, dtype=torch.bool)
        mistakes: Mistakes = {
            "it keeps the pairs from theta on; those below are asked for": (
                _masked(G, U, Q, products >= theta)
            ),
            "Omega does not enter: this is G times AlphaEdit's projector": (
                _masked(G, U, Q, rows & (of_keys < theta))
            ),
            "C0 does not enter": (
                _masked(G, U, Q, (of_values < theta)[:, None].expand(products.shape))
            ),
            "each eigenvalue is compared with theta by itself; their product is": (
                _masked(G, U, Q, (of_values < theta)[:, None] & (of_keys < theta))
            ),
            "the eigenvalues are added; they are multiplied": (
                _masked(G, U, Q, of_values[:, None] + of_keys < theta)
            ),
            "these are the coordinates in the eigenvectors; turn them back": (
                (products < theta) * (Q.T @ G @ U)
            ),
            "entries of G were set to zero; those of its coordinates in the eigenvectors are": (
                (products < theta) * G
            ),
        }
        agree(found, low_curvature(G, C0, Omega, theta), what, mistakes)
    return right("It keeps the pairs of directions with little curvature, and nothing else.")
