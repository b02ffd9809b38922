"""Checks for the exercises of the chapter "The bridge"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import (
    FEW_DIGITS,
    TOLERANCE,
    ExerciseError,
    Mistakes,
    agree,
    draw,
    name_of,
    number,
    pair,
    refuse_rounded,
    right,
    single,
    tensor,
)
from unified_edit.teaching.exercises.updates import (
    lam_said,
    moment,
    other_lam,
    ridge_of,
)

#: A singular value below this part of the largest counts as zero.
CUT = 1e-8


def from_released(C0: Tensor, K: Tensor, R: Tensor, w: float, lam_G: float) -> tuple[float, Tensor]:
    """lam and Delta (d_out x d_k) of MEMIT for the released EMMET, :eq:`bridge-released`."""
    lam = lam_G * w
    return lam, _by_bracket(K, R, lam * C0 + K @ K.T)


def filtered_update(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """R V f(S) U' L^-1, :eq:`bridge-svd`; for lam = 0 the limit, :eq:`bridge-pseudoinverse`."""
    return _filtered(C0, K, R, lambda s: s / (s.square() + lam))


def both_errors(C0: Tensor, K: Tensor, R: Tensor, lams: Tensor) -> tuple[Tensor, Tensor]:
    """The preservation and the memorization error for each of `lams`, :eq:`bridge-errors`."""
    squares, weights = _spectrum(C0, K, R)
    total = squares + lams[:, None]
    return (weights * squares / total**2).sum(1), (weights * (lams[:, None] / total) ** 2).sum(1)


def _spectrum(C0: Tensor, K: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """sigma_i^2 and |R v_i|^2 for all E combinations, ascending."""
    A = solve_triangular(torch.linalg.cholesky(C0), K, upper=False)
    squares, V = torch.linalg.eigh(A.T @ A)
    return squares.clamp(min=0), (R @ V).square().sum(dim=0)


def _by_bracket(K: Tensor, R: Tensor, bracket: Tensor) -> Tensor:
    """R K' bracket^-1, for a symmetric bracket."""
    return torch.linalg.solve(bracket, K @ R.T).T


def _filtered(
    C0: Tensor, K: Tensor, R: Tensor, f: Callable[[Tensor], Tensor], cut: float = CUT
) -> Tensor:
    """R V f(S) U' L^-1 without the singular values that count as zero."""
    left, U, L = _parts(C0, K, R, f, cut)
    return solve_triangular(L, left @ U.T, upper=False, left=False)


def _parts(
    C0: Tensor, K: Tensor, R: Tensor, f: Callable[[Tensor], Tensor], cut: float = CUT
) -> tuple[Tensor, Tensor, Tensor]:
    """R V f(S), U and L."""
    L = torch.linalg.cholesky(C0)
    U, s, Vt = torch.linalg.svd(solve_triangular(L, K, upper=False), full_matrices=False)
    keep = s > cut * s[0]
    return (R @ Vt[keep].T) * f(s[keep]), U[:, keep], L


def check_bridge(as_memit: Callable[..., Any]) -> str:
    """Check ``as_memit(C0, K, R, w, lam_G) -> (lam, Delta)``: the released EMMET as MEMIT.

    C0 (d_k x d_k) is the plain mean, before it is multiplied by w. Raises ExerciseError.
    """
    for w, lam_G, E in ((20.0, 0.1, 3), (0.7, 4.0, 5)):
        C0, K, R = moment(0, 4), draw(1, 4, E), draw(2, 3, E)
        expected, update = from_released(C0, K, R, w, lam_G)
        case = f"for w = {w:g} and lam_G = {lam_G:g}"
        lam, delta = pair(call(as_memit, C0, K, R, w, lam_G), "lambda and Delta")
        agree(
            number(lam, "lambda"),
            expected,
            f"lambda {case}",
            {
                "you divided w by lam_G; K' (w C0)^-1 K is G / w, and lam_G I + G / w is "
                "(lam_G w I + G) / w": w / lam_G,
                "you divided lam_G by w; K' (w C0)^-1 K is G / w, and lam_G I + G / w is "
                "(lam_G w I + G) / w": lam_G / w,
                "this is w alone; without lam_G nothing is damped": w,
                "this is lam_G alone, which stands on the Gram matrix of w C0; on that of C0 it is "
                "w times as large": lam_G,
                "there is a factor E too many; the sum over facts is not a mean": expected * E,
                "you divided by E; the sum over facts is not a mean": expected / E,
            },
        )
        new, identity = K @ K.T, torch.eye(4, dtype=torch.float64)
        delta = tensor(delta, (3, 4), f"Delta {case}")
        agree(
            delta,
            update,
            f"Delta {case}",
            {
                "it holds the equality; the released code does not for more than one fact": (
                    filtered_update(C0, K, R, 0.0)
                ),
                "C0 was multiplied by w and by lambda; lambda contains w already": (
                    _by_bracket(K, R, expected * w * C0 + new)
                ),
                "lam_G was used in place of lambda": _by_bracket(K, R, lam_G * C0 + new),
                "w was used in place of lambda": _by_bracket(K, R, w * C0 + new),
                "lambda stands at the identity; it belongs to C0": (
                    _by_bracket(K, R, expected * identity + new)
                ),
                "lambda stands at K K'; it belongs to C0": _by_bracket(K, R, C0 + expected * new),
                **other_lam(delta, C0, K, R, expected),
            },
        )
    return right("lambda is lam_G times w, and Delta is MEMIT's.")


def check_filter(filtered: Callable[..., Any]) -> str:
    """Check ``filtered(C0, K, R, lam) -> Delta``, also for lam = 0 and dependent keys.

    Raises ExerciseError.
    """
    for d, E, lam, twice in (
        (4, 3, 0.7, False),
        (4, 3, 0.0, False),
        (4, 3, 2.0, True),
        (4, 3, 0.0, True),
        (3, 5, 0.7, False),
        (3, 5, 0.0, False),
    ):
        C0, K, R = moment(3, d), draw(4, d, E), draw(5, 2, E)
        if twice:
            K[:, 2] = K[:, 0]
        case = f"Delta for {E} facts, keys of {d} entries" + ", two of them equal," * twice
        _check_filtered(filtered, C0, K, R, lam, f"{case} and lam = {lam:g}")

    _check_close(filtered)
    return right("The filter s / (s^2 + lam), and the limit also where keys are dependent.")


def _check_close(filtered: Callable[..., Any]) -> None:
    """Two keys that differ by a hundred-thousandth are still two keys."""
    C0, K, R = moment(3, 4), draw(4, 4, 3), draw(5, 2, 3)
    K[:, 2] = K[:, 0] + 1e-5 * draw(6, 4)
    what = "Delta for two keys that are close and lam = 0"
    delta = tensor(call(filtered, C0, K, R, 0.0), (2, 4), what)
    refuse_rounded(delta, filtered_update(C0, K, R, 0.0), what)
    ridge = ridge_of(delta, C0, K, R)
    mistakes: Mistakes = {
        "two keys that differ by a hundred-thousandth were taken for equal: count a singular value "
        f"as zero below {CUT:g} of the largest, and not earlier": (
            _filtered(C0, K, R, lambda s: 1 / s, cut=1e-4) @ K
        ),
        **({} if ridge is None else {lam_said(ridge, 0.0, "this is the update"): delta @ K}),
    }
    said = FEW_DIGITS if single(delta) else ""
    agree(delta @ K, R, f"Delta K, with {what},", mistakes, tolerance=1e-4, otherwise=said)
    L = torch.linalg.cholesky(C0)
    other = L @ torch.linalg.svd(torch.linalg.solve(L, K)).U[:, 3]  # has k' C0^-1 x = 0
    if float((delta @ other).norm()) > TOLERANCE * float(delta.norm() * other.norm()):
        raise ExerciseError(
            f"{what} is not the cheapest with Delta K = R: it moves an x with K' C0^-1 x = 0"
        )


def _check_filtered(
    filtered: Callable[..., Any], C0: Tensor, K: Tensor, R: Tensor, lam: float, what: str
) -> None:
    d = len(C0)
    delta = tensor(call(filtered, C0, K, R, lam), (2, d), what)
    expected = filtered_update(C0, K, R, lam)
    left, U, L = _parts(C0, K, R, lambda s: s / (s.square() + lam))
    _, s, Vt = torch.linalg.svd(solve_triangular(L, K, upper=False), full_matrices=False)
    mistakes: dict[str, Tensor | float | tuple[Tensor, ...]] = {
        "this acts on whitened keys; L^-1 is missing on the right": left @ U.T,
        "it was multiplied by L; Delta = B L^-1": left @ U.T @ L,
        "you solved with the transpose of L; it is U' L^-1": torch.linalg.solve(L, U @ left.T).T,
        "this is made with C0 = I; whiten the keys first": filtered_update(
            torch.eye(d, dtype=torch.float64), K, R, lam
        ),
    }
    if Vt.shape[0] == Vt.shape[1] and bool((s > CUT * s[0]).all()):
        mistakes["`torch.linalg.svd` returns V', so R V is `R @ Vt.T`"] = solve_triangular(
            L, ((R @ Vt) * (s / (s.square() + lam))) @ U.T, upper=False, left=False
        )
    if lam:
        mistakes.update(_other_filters(C0, K, R, lam))
    mistakes.update(other_lam(delta, C0, K, R, lam))
    ratio = float(delta.norm() / expected.norm())
    enormous = (
        f"It is enormous, {ratio:.0e} times as large as it should be: was a singular value "
        "inverted that is zero but for rounding? Leave it out, with its columns of U and V"
    )
    agree(delta, expected, what, mistakes, otherwise=enormous if ratio > 1e4 else "")


def _other_filters(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Mistakes:
    """What other filters give; for lam = 0 they would be the same, or the right one."""
    return {
        "s^2 / (s^2 + lam) is the share that is written; the filter of Delta is s / (s^2 + lam)": (
            _filtered(C0, K, R, lambda s: s.square() / (s.square() + lam))
        ),
        "the filter is s / (s^2 + lam), with the square of s below": (
            _filtered(C0, K, R, lambda s: s / (s + lam))
        ),
        "lam was added to s; the filter is s / (s^2 + lam)": (
            _filtered(C0, K, R, lambda s: 1 / (s + lam))
        ),
        "the numerator s is missing in s / (s^2 + lam)": (
            _filtered(C0, K, R, lambda s: 1 / (s.square() + lam))
        ),
        "lam was squared; the filter is s / (s^2 + lam)": (
            _filtered(C0, K, R, lambda s: s / (s.square() + lam**2))
        ),
        "this is the limit for lam = 0; lam is missing": filtered_update(C0, K, R, 0.0),
    }


def check_frontier(frontier: Callable[..., Any]) -> str:
    """Check ``frontier(C0, K, R, lams)``: two tensors as long as lams, the two errors.

    Raises ExerciseError.
    """
    watch = Watch(frontier)
    lams = torch.tensor([0.01, 0.5, 3.0, 200.0], dtype=torch.float64)
    for d, E, twice in ((4, 3, False), (4, 3, True), (3, 6, False)):
        C0, K, R = moment(7, d), draw(8, d, E), draw(9, 2, E)
        if twice:
            K[:, 2] = K[:, 0]
        case = f"for {E} facts and keys of {d} entries" + ", two of them equal," * twice
        given = pair(watch(C0, K, R, lams), "the two errors for each lambda")
        preserve = tensor(given[0], (4,), f"P {case}")
        memorise = tensor(given[1], (4,), f"M {case}")
        P, M = both_errors(C0, K, R, lams)
        squares, weights = _spectrum(C0, K, R)
        total = squares + lams[:, None]
        whole = R.square().sum()
        agree(
            preserve,
            P,
            f"P {case}",
            {
                "this is M; the preservation error comes first": M,
                "this is the squared norm of Delta K, what is written; for P divide each term by "
                "sigma_i^2": (weights * (squares / total) ** 2).sum(1),
                "the filter is not squared": (weights * squares / total).sum(1),
                "the numerator sigma_i^2 is missing": (weights / total**2).sum(1),
                "|R v_i|^2 is missing": (squares / total**2).sum(1).expand(4),
                "this is the root of P": P.sqrt(),
            },
        )
        seen = squares > CUT**2 * squares.max()
        agree(
            memorise,
            M,
            f"M {case}",
            {
                "combinations with sigma_i = 0 are left out; none of what they ask for is written, "
                "so it is all missing": (weights * seen * (lams[:, None] / total) ** 2).sum(1),
                "this is the root of M": M.sqrt(),
                "this is divided by |R|^2; M is the sum itself": M / whole,
                "this is what is written; the missing share is lam / (sigma_i^2 + lam)": (
                    weights * (squares / total) ** 2
                ).sum(1),
                "the share lam / (sigma_i^2 + lam) is not squared": (
                    weights * lams[:, None] / total
                ).sum(1),
                "|R v_i|^2 is missing": ((lams[:, None] / total) ** 2).sum(1),
            },
        )
        if any(watch.has_made(filtered_update(C0, K, R, float(lam))) for lam in lams):
            raise ExerciseError(
                f"the numbers are right. But {name_of(frontier)} computes Delta on the way, and "
                "the exercise asks for both errors without it: sigma_i^2 and |R v_i|^2 are enough, "
                "for every lambda"
            )
    return right("Both errors for every lambda, also where some combination cannot be written.")
