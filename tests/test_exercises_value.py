"""Checks of the chapter "Choosing the value v*", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.value import (
    check_kl,
    check_project,
    check_value_loss,
    divergence,
    projected,
    target_loss,
)

Check = Callable[[Any], str]


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("value-clamp")
def test_no_point_of_the_ball_is_nearer_than_the_projection() -> None:
    deltas, inits = 3 * draw(0, 4, 6), draw(1, 4, 6)
    found = projected(deltas, inits, 0.75)
    limits = 0.75 * inits.norm(dim=0)
    assert (found.norm(dim=0) <= limits * (1 + 1e-12)).all()
    assert (deltas.norm(dim=0) > limits).any()
    distance = (found - deltas).norm(dim=0)
    for seed in range(50):
        other = draw(seed + 2, 4, 6)
        other = (
            other
            / other.norm(dim=0)
            * limits
            * torch.from_numpy(np.random.default_rng(seed).random(6))
        )
        # up to rounding of a difference of numbers of order ten
        assert ((other - deltas).norm(dim=0) >= distance - 1e-12).all()


@pytest.mark.equation("value-kl")
def test_the_divergence_is_that_of_torch_and_flat_where_nothing_changed() -> None:
    initial = draw(0, 8).log_softmax(0)
    logits = initial.clone().requires_grad_()
    flat = divergence(logits.log_softmax(0), initial)
    flat.backward()
    assert logits.grad is not None
    assert float(logits.grad.norm()) < 1e-12
    now = draw(1, 8).log_softmax(0)
    expected = torch.nn.functional.kl_div(initial, now, reduction="sum", log_target=True)
    assert torch.isclose(divergence(now, initial), expected)
    assert float(expected) > 0


# --- checks ---------------------------------------------------------------------------------------


def project_column_by_column(deltas: Tensor, inits: Tensor, clamp: float) -> Tensor:
    columns = []
    for delta, init in zip(deltas.T, inits.T, strict=True):
        limit = clamp * init.norm()
        columns.append(delta * limit / delta.norm() if delta.norm() > limit else delta)
    return torch.stack(columns, dim=1)


def by_kl_div(now: Tensor, initial: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(initial, now, reduction="sum", log_target=True)


def loss(logps: Any, targets: Any, kl: Any, delta: Any, h: Any, a: float, b: float) -> Any:
    decay = b * delta.norm() / h.square().sum()
    return target_loss(logps, targets) + a * kl + decay


def by_cross_entropy(
    logps: Any, targets: Any, kl: Any, delta: Any, h: Any, a: float, b: float
) -> float:
    entropies = [
        torch.nn.functional.cross_entropy(logp, ids)
        for logp, ids in zip(logps, targets, strict=True)
    ]
    return float(sum(entropies) / len(entropies) + a * kl + b * delta.norm() / (h @ h))


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_project, projected),
        (check_project, project_column_by_column),
        (
            check_project,
            lambda d, h, c: d * (c * h.norm(dim=0) / d.norm(dim=0).clamp(min=1e-30)).clamp(max=1),
        ),
        (check_project, lambda d, h, c: d / (d.norm(dim=0) / (c * h.norm(dim=0))).clamp(min=1)),
        (check_kl, divergence),
        (check_kl, by_kl_div),
        (check_kl, lambda now, initial: float(now.exp() @ now - now.exp() @ initial)),
        (check_value_loss, loss),
        (check_value_loss, by_cross_entropy),
    ],
    ids=range(9),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


def wrong_loss(said: Callable[[list[Tensor]], Any]) -> Callable[..., Any]:
    """A loss whose first term is made from the chosen log-probabilities of each context."""

    def made(logps: Any, targets: Any, kl: Any, delta: Any, h: Any, a: float, b: float) -> Any:
        pairs = zip(logps, targets, strict=True)
        chosen = [logp[range(len(ids)), ids] for logp, ids in pairs]
        return said(chosen) + a * kl + b * delta.norm() / h.norm() ** 2

    return made


def wrong_rest(rest: Callable[[Any, Any, Any, float, float], Any]) -> Callable[..., Any]:
    """A loss with other penalties, made from kl, norm(delta), norm(h) and the weights."""

    def made(logps: Any, targets: Any, kl: Any, delta: Any, h: Any, a: float, b: float) -> Any:
        return target_loss(logps, targets) + rest(kl, delta.norm(), h.norm(), a, b)

    return made


def mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean()


def shrink(factor: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Columns times a factor made from their norms and the limits."""
    return lambda d, h, c: d * factor(d.norm(dim=0), c * h.norm(dim=0))


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_project, None, "was given nothing"),
        (check_project, lambda d, h, c: None, "returned nothing"),
        (check_project, lambda d, h, c: d, "were not changed"),
        (check_project, lambda d, h, c: projected(d, h, c).T, "must have shape"),
        (check_project, lambda d, h, c: d.mul_(0.5), "changed its argument"),
        (check_project, shrink(lambda n, limit: limit / n), "inside the ball were stretched"),
        (
            check_project,
            shrink(lambda n, limit: torch.where(n > limit, torch.ones_like(n), limit / n)),
            "wrong way round",
        ),
        (check_project, shrink(lambda n, limit: (1 / n).clamp(max=1)), "a unit vector"),
        (
            check_project,
            lambda d, h, c: d * (c / d.norm(dim=0)).clamp(max=1),
            "taken for clamp alone",
        ),
        (check_project, lambda d, h, c: projected(d, h, 1.0), "clamp was left out"),
        (
            check_project,
            lambda d, h, c: d * (c * h.square().sum(0) / d.norm(dim=0)).clamp(max=1),
            "not its square",
        ),
        (
            check_project,
            lambda d, h, c: d * (c * h.norm() / d.norm()).clamp(max=1),
            "the whole matrix",
        ),
        (check_project, lambda d, h, c: projected(d.T, h.T, c).T, "along the rows"),
        (
            check_project,
            lambda d, h, c: torch.maximum(torch.minimum(d, c * h.norm(dim=0)), -c * h.norm(dim=0)),
            "cut off one by one",
        ),
        (check_project, shrink(lambda n, limit: (n <= limit).double()), "set to zero"),
        (check_project, shrink(lambda n, limit: torch.minimum(n, limit) / n), "must be finite"),
        (check_kl, None, "was given nothing"),
        (check_kl, lambda now, initial: None, "returned nothing"),
        (check_kl, lambda now, initial: divergence(initial, now), r"KL\(initial \|\| now\)"),
        (check_kl, lambda now, initial: now.exp() * (now - initial), "one number"),
        (check_kl, lambda now, initial: (now.exp() * (now - initial)).mean(), "it is a sum"),
        (check_kl, lambda now, initial: divergence(now, initial) / np.log(2), "in bits"),
        (check_kl, lambda now, initial: (now - initial).sum(), "without weights"),
        (check_kl, lambda now, initial: (now * (now / initial).log()).sum(), "take no logarithm"),
        (check_kl, lambda now, initial: (now * (now - initial)).sum(), "must be probabilities"),
        (check_kl, lambda now, initial: -(now.exp() * initial).sum(), "the cross entropy"),
        (
            check_kl,
            lambda now, initial: (now.exp() * (now - initial).exp()).sum(),
            "the logarithm is missing",
        ),
        (
            check_kl,
            lambda now, initial: divergence(now, initial) + divergence(initial, now),
            "both directions",
        ),
        (check_value_loss, None, "was given nothing"),
        (check_value_loss, lambda *a: None, "returned nothing"),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: a * k + b * n**2 / s**2), "squared;"),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: a * k + b * n / s), "must be squared"),
        (
            check_value_loss,
            wrong_rest(lambda k, n, s, a, b: a * k + b * s / n**2),
            "you divided by the norm of delta",
        ),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: b * n / s**2), "KL term is missing"),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: k + b * n / s**2), "by kl_weight"),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: a * k), "the decay is missing"),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: a * k + n / s**2), "by weight_decay"),
        (check_value_loss, wrong_rest(lambda k, n, s, a, b: b * k + a * n / s**2), "exchanged"),
        (check_value_loss, wrong_loss(lambda c: -torch.cat(c).mean()), "count the same"),
        (check_value_loss, wrong_loss(lambda c: -mean([p.sum() for p in c])), "take their mean"),
        (
            check_value_loss,
            wrong_loss(lambda c: -torch.stack([p.mean() for p in c]).sum()),
            "the contexts were added",
        ),
        (check_value_loss, wrong_loss(lambda c: -mean([p[0] for p in c])), "only the first token"),
        (check_value_loss, wrong_loss(lambda c: -mean([p[-1] for p in c])), "only the last token"),
        (
            check_value_loss,
            wrong_loss(lambda c: -mean([p.exp().mean() for p in c]).log()),
            "of the mean probability",
        ),
        (
            check_value_loss,
            wrong_loss(lambda c: mean([p.exp().mean() for p in c])),
            "the mean of probabilities",
        ),
        (check_value_loss, wrong_loss(lambda c: mean([p.mean() for p in c])), "the sign"),
    ],
    ids=range(46),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
