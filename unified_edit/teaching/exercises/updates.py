"""What the checks of updates share: examples, and what can be said of a wrong one."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_edit.teaching.exercises.checking import TOLERANCE, Mistakes, draw


def moment(seed: int, d: int) -> Tensor:
    """A well-conditioned C0 (d x d), of 3 d keys."""
    K0 = draw(seed, d, 3 * d)
    return K0 @ K0.T / (3 * d)


def cost(Delta: Tensor, C0: Tensor) -> float:
    """tr(Delta C0 Delta')."""
    return float(((Delta @ C0) * Delta).sum())


def lam_of(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor) -> float | None:
    """The mu for which Delta (d_out x d_k) is R K' (mu C0 + K K')^-1; None without one.

    It solves Delta C0 mu = (R - Delta K) K', more equations than the one unknown.
    """
    pull, row = (R - Delta @ K) @ K.T, Delta @ C0
    square = float(row.square().sum())
    if not square:
        return None
    mu = float((pull * row).sum()) / square
    rest = float((pull - mu * row).norm())
    return mu if rest <= TOLERANCE * float(pull.norm()) else None


def ridge_of(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor) -> float | None:
    """The same for keys that are nearly dependent and a small mu, to three digits.

    It is read off the combination of facts that is hardest to write. None, too, where mu is as
    small as what rounding does to K' C0^-1 K.
    """
    L = torch.linalg.cholesky(C0)
    U, s, Vt = torch.linalg.svd(torch.linalg.solve(L, K), full_matrices=False)
    B, asked = Delta @ L, R @ Vt.T
    written = float((B @ U[:, -1]) @ asked[:, -1] * s[-1] / asked[:, -1].square().sum())
    mu = float(s[-1]) ** 2 * (1 / written - 1) if written else 0.0
    if mu < 1e3 * torch.finfo(torch.float64).eps * float(s[0]) ** 2:
        return None
    damped = (asked * s / (s.square() + mu)) @ U.T
    done = (B - damped) @ U * s  # to the combinations of facts, which are all of one size
    other = (B - (B @ U) @ U.T).norm()
    fits = float(done.norm()) <= 1e-3 * float(asked.norm()) and float(other) <= 1e-6 * float(
        B.norm()
    )
    return mu if fits else None


def other_lam(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Mistakes:
    """The right formula with a wrong number for lam, which is read off the result itself."""
    mu = lam_of(Delta, C0, K, R)
    return {} if mu is None else {lam_said(mu, lam, "this is the update"): Delta}


def lam_said(mu: float, lam: float, what: str) -> str:
    """That a result belongs to another lam than the one that was given."""
    if lam and abs(mu / lam - 1) < 1e-2:
        return f"{what} for a lam that is off by {abs(mu / lam - 1):.1e} of itself"
    times = f", {mu / lam:.3g} times the lam = {lam:g}" if lam else ", and not for the lam = 0"
    return f"{what} for lam = {mu:.3g}{times} that you were given"


def more_than(ratio: float, least: str) -> str:
    """A ratio above one for a sentence: "12 % more than the least", "3.1 times the least"."""
    return (
        f"{ratio:.3g} times {least}"
        if ratio > 1.5
        else f"{100 * max(ratio - 1, 0):.2g} % more than {least}"
    )


def equality_said(Delta: Tensor, best: Tensor, C0: Tensor, K: Tensor, equality: str = "") -> str:
    """Whether Delta does to K what the `best` update does, and what it costs if so.

    equality: what is asked for, as the exercise writes it, "Delta k = r"; without it, to do what
    the Delta of the exercise does.
    """
    fails = (
        f"{equality} does not hold: it is"
        if equality
        else "It must do to K what Delta does, and is"
    )
    holds = f"{equality} holds, and the update" if equality else "It does to K what Delta does, and"
    asked = best @ K
    missed = float((Delta @ K - asked).norm() / asked.norm())
    if missed > TOLERANCE:
        return f"{fails} off by {missed:.2g} relative"
    return f"{holds} costs {more_than(cost(Delta, C0) / cost(best, C0), 'the least')}"
