"""Checks for the exercises of the chapter "Choosing the value v*"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, number, right, tensor


def projected(deltas: Tensor, inits: Tensor, clamp: float) -> Tensor:
    """The point nearest to each column in the ball of radius clamp * norm(init): (d x E).

    :eq:`value-clamp`, for the columns of `deltas` and `inits` (both d x E).
    """
    limits, norms = clamp * inits.norm(dim=0), deltas.norm(dim=0)
    return torch.where(norms > limits, deltas * (limits / norms), deltas)


def divergence(now: Tensor, initial: Tensor) -> Tensor:
    """KL(now || initial), :eq:`value-kl`, of two vectors of log-probabilities: one number."""
    return (now.exp() * (now - initial)).sum()


def target_loss(logps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over contexts of the mean over target tokens of -log p, from :eq:`value-loss`.

    logps: for each context (tokens x vocabulary) log-probabilities, a row for each target token;
    targets: for each context the ids of these tokens.
    """
    return -torch.stack([chosen.mean() for chosen in _chosen(logps, targets)]).mean()


def _chosen(logps: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Log-probabilities of the target tokens, context by context."""
    pairs = zip(logps, targets, strict=True)
    return [logp.gather(1, ids[:, None]).squeeze(1) for logp, ids in pairs]


def check_project(project: Callable[[Tensor, Tensor, float], Any]) -> str:
    """Check ``project(deltas, inits, clamp)``: each column onto its ball, as (d x E).

    deltas and inits are (d x E); the radius of a ball is clamp * norm(init). Raises ExerciseError.
    """
    directions = draw(0, 5, 4)
    inits = draw(1, 5, 4) * torch.tensor([1.0, 4.0, 0.5, 2.0]).double()
    for clamp in (0.75, 1.6):
        limits = clamp * inits.norm(dim=0)
        # inside, outside, far outside, inside
        lengths = limits * torch.tensor([0.4, 1.5, 6.0, 0.9]).double()
        deltas = directions / directions.norm(dim=0) * lengths
        norms, rows = deltas.norm(dim=0), deltas.norm(dim=1, keepdim=True)
        whole = clamp * inits.norm()
        what = f"the projection of 4 columns with clamp = {clamp:g}"
        got = tensor(call(project, deltas, inits, clamp), (5, 4), what)
        agree(
            got,
            projected(deltas, inits, clamp),
            what,
            {
                "the columns were not changed": deltas,
                "columns inside the ball were stretched to its surface; they must stay": (
                    deltas * (limits / norms)
                ),
                "columns inside were stretched, and those outside left alone: the comparison is "
                "the wrong way round": torch.where(norms > limits, deltas, deltas * limits / norms),
                "every column became a unit vector, or shorter: the radius is clamp * norm(init)": (
                    deltas * (1 / norms).clamp(max=1)
                ),
                "the radius was taken for clamp alone; it is clamp * norm(init)": (
                    deltas * (clamp / norms).clamp(max=1)
                ),
                "clamp was left out of the radius; it is clamp * norm(init)": (
                    deltas * (limits / clamp / norms).clamp(max=1)
                ),
                "the radius must be clamp times the norm of init, and not its square": (
                    deltas * (clamp * inits.square().sum(dim=0) / norms).clamp(max=1)
                ),
                "the norm of the whole matrix was used; every column has its own": (
                    deltas * (whole / deltas.norm()).clamp(max=1)
                ),
                "the norms were taken along the rows; columns are facts (`dim=0`)": (
                    deltas * (clamp * inits.norm(dim=1, keepdim=True) / rows).clamp(max=1)
                ),
                "the entries were cut off one by one, which also changes the direction": (
                    deltas.clamp(-limits, limits)
                ),
                "columns outside were set to zero; they belong on the surface": (
                    deltas * (norms <= limits)
                ),
            },
        )
    zero, what = torch.zeros(5, 4).double(), "the projection of columns that are zero"
    agree(tensor(call(project, zero, inits, 0.75), (5, 4), what), zero, what)
    return right("Columns outside land on the surface, those inside stay, each by its own radius.")


def check_kl(kl: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``kl(now, initial)``: KL(now || initial), both log-probabilities (vocabulary,).

    Raises ExerciseError.
    """
    for seed, size in ((2, 6), (4, 9)):
        now, initial = draw(seed, size).log_softmax(0), (2 * draw(seed + 1, size)).log_softmax(0)
        what = f"the divergence over {size} tokens"
        p, q, expected = now.exp(), initial.exp(), divergence(now, initial)
        agree(
            number(call(kl, now, initial), what),
            expected,
            what,
            {
                "this is KL(initial || now); the probabilities in front are those of now": (
                    divergence(initial, now)
                ),
                "you took the mean over the vocabulary; it is a sum": expected / size,
                "this is in bits; use the natural logarithm": expected / math.log(2),
                "the differences of the log-probabilities were added up without weights; each "
                "counts with the probability now": (now - initial).sum(),
                "the arguments are log-probabilities already; take no logarithm of them": (
                    now * (now / initial).log()
                ).sum(),
                "the weights are log-probabilities; they must be probabilities (`exp`)": (
                    now * (now - initial)
                ).sum(),
                "this is the cross entropy; subtract the entropy of now": -(p * initial).sum(),
                "the logarithm is missing: this is the sum of p times p / q": (p * p / q).sum(),
                "this is the symmetric sum of both directions": (
                    expected + divergence(initial, now)
                ),
            },
        )
    what = "the divergence of a distribution from itself"
    agree(number(call(kl, initial, initial), what), 0.0, what)
    return right("It is KL(now || initial), and zero where nothing has changed.")


def check_value_loss(
    value_loss: Callable[
        [Sequence[Tensor], Sequence[Tensor], Any, Tensor, Tensor, float, float], Any
    ],
) -> str:
    """Check ``value_loss(logps, targets, kl, delta, h, kl_weight, weight_decay)``.

    logps: for each context (tokens x vocabulary), a row for each target token; targets: for each
    context the ids; kl: a number; delta, h: (d,). Raises ExerciseError.
    """
    for seed, counts in ((0, (2, 3, 1)), (10, (1, 4))):
        logps = [draw(seed + i, n, 7).log_softmax(1) for i, n in enumerate(counts)]
        targets = [(torch.arange(n) * 3 + i + 1) % 7 for i, n in enumerate(counts)]
        kl, delta, h = 0.37, 3 * draw(seed + 5, 4), 2 * draw(seed + 6, 4) + 1
        chosen = _chosen(logps, targets)
        said, weight, rate = target_loss(logps, targets), 0.25, 0.8
        norm, size = delta.norm(), h.norm()
        pull, decay = weight * kl, rate * norm / size**2
        rest = pull + decay
        each = torch.cat(chosen)
        what = f"the loss over {len(counts)} contexts"
        agree(
            number(call(value_loss, logps, targets, kl, delta, h, weight, rate), what),
            said + rest,
            what,
            {
                "the norm of delta was squared; only the norm of h is": (
                    said + pull + rate * norm**2 / size**2
                ),
                "the norm of h must be squared, that of delta not": said
                + pull
                + rate * norm / size,
                "you divided by the norm of delta; that of h belongs below": (
                    said + pull + rate * size / norm**2
                ),
                "all target tokens count the same here; take the mean over the tokens of each "
                "context first, and then over contexts": -each.mean() + rest,
                "the log-probabilities of a target's tokens were added; take their mean": (
                    -torch.stack([one.sum() for one in chosen]).mean() + rest
                ),
                "the contexts were added; take their mean": len(counts) * said + rest,
                "only the first token of each target counts here": (
                    -torch.stack([one[0] for one in chosen]).mean() + rest
                ),
                "only the last token of each target counts here": (
                    -torch.stack([one[-1] for one in chosen]).mean() + rest
                ),
                "the logarithm was taken of the mean probability; it is the mean of logarithms": (
                    -torch.stack([one.exp().mean() for one in chosen]).mean().log() + rest
                ),
                "this is the mean of probabilities; it is that of -log p": (
                    torch.stack([one.exp().mean() for one in chosen]).mean() + rest
                ),
                "the sign of the first term is wrong: a probable target must give a small loss": (
                    -said + rest
                ),
                "the KL term is missing": said + decay,
                "the KL term is not multiplied by kl_weight": said + kl + decay,
                "the decay is missing": said + pull,
                "the decay is not multiplied by weight_decay": said + pull + norm / size**2,
                "the two weights are exchanged": said + rate * kl + weight * norm / size**2,
            },
        )
    return right("The mean over contexts of the mean over tokens, plus both penalties.")
