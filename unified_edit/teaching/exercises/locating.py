"""Checks for the exercises of the chapter "Locating it"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import Mistakes, agree, draw, number, right, tensor


def check_noise_scale(noise_scale: Callable[[Tensor, list[int], float], Any]) -> str:
    """Check ``noise_scale(embeddings, ids, factor)``: factor times sigma, :eq:`locate-sigma`.

    embeddings is (vocabulary x width); ids are those of the subjects' tokens. Raises ExerciseError.
    """
    spread = torch.linspace(0.5, 3.0, 12, dtype=torch.float64)[:, None]
    E = spread * draw(0, 12, 4) + 2.0 * draw(1, 12, 1)
    for ids, factor in (([7, 2, 7, 11, 0], 2.5), ([4], 3.0)):
        rows = E[ids]
        sigma = rows.std()
        mistakes: dict[str, Tensor | float] = {
            "it is sigma; the factor is missing": sigma,
            "it is the scale of all tokens, and only those of the subjects in `ids` count": (
                factor * E.std()
            ),
            "a token that occurs twice in `ids` must count twice": factor
            * E[sorted(set(ids))].std(),
            "the sum of squares must be divided by nd - 1, with n tokens of d entries each, and "
            "yours is divided by nd": factor * rows.std(correction=0),
            "the mean must be taken away before the entries are squared": (
                factor * rows.square().mean().sqrt()
            ),
            "it is the variance: the square root is missing": factor * rows.var(),
            "it is a mean over the tokens; all entries must be taken together": (
                factor * rows.std(dim=1).mean()
            ),
        }
        if len(ids) > 1:
            each = factor * rows.std(dim=0).mean()
            mistakes["it is a mean over the dimensions; all entries must be taken together"] = each
        what = f"the scale for {len(ids)} token{'s' * (len(ids) > 1)}"
        got = number(call(noise_scale, E, ids, factor), what)
        agree(got, sigma * factor, what, mistakes)
    return right("It is the standard deviation of the subjects' embeddings, times the factor.")


def check_restore(restore: Callable[[Tensor, int], Any]) -> str:
    """Check ``restore(output, token)``, the change that a hook of causal tracing makes.

    output is (runs x tokens x width), run 0 the clean one; see :eq:`locate-indirect`. Raises
    ExerciseError.
    """
    for runs, tokens, token in ((3, 4, 2), (4, 3, 0), (2, 5, 4)):
        output = draw(runs, runs, tokens, 3)
        expected, every, first, turned, sideways, zero = (output.clone() for _ in range(6))
        expected[1:, token] = output[0, token]
        every[1:] = output[0]
        first[1, token] = output[0, token]
        turned[0, token] = output[1, token]
        if token < runs:
            sideways[token, 1:] = output[token, :1]
        zero[1:, token] = 0
        corrupted = f"{runs - 1} corrupted run{'s' * (runs > 2)}"
        what = f"the output for token {token} of {tokens}, with {corrupted},"
        mistakes: Mistakes = {
            "nothing was put back: the corrupted runs are as they were": output,
            "all tokens were put back, and only the one at `token` must be": every,
            "only the first of the corrupted runs was changed; all of them must be": first,
            "the clean run was overwritten; it is the corrupted ones that must change": turned,
            "runs and tokens are mixed up: the first axis holds the runs": (
                sideways if token < runs else ()
            ),
            "the activation was set to zero, and must be that of the clean run": zero,
        }
        got = tensor(call(restore, output, token), output.shape, what)
        agree(got, expected, what, mistakes)
    return right("Every corrupted run gets the clean activation at that token, and nothing else.")


def check_average_effect(
    average_effect: Callable[[list[Tensor], list[tuple[int, int]]], Any],
) -> str:
    """Check ``average_effect(effects, subjects)``: :eq:`locate-average` at the last subject token.

    effects: (tokens x layers) for each fact; subjects: first and last subject token of each.
    Raises ExerciseError.
    """
    for lengths, subjects in (
        ((6, 4, 5, 3), [(0, 2), (1, 1), (0, 1), (0, 2)]),  # the last prompt ends with its subject
        ((5, 7, 3, 6, 6), [(2, 3), (1, 3), (1, 2), (0, 2), (3, 4)]),  # the third one does
    ):
        effects = [draw(seed, length, 3) for seed, length in enumerate(lengths)]
        count = len(lengths)
        first, last = ([places[i] for places in subjects] for i in (0, 1))
        before = [place - 1 for place in last]
        all_of_it = [slice(start, end + 1) for start, end in subjects]
        everyone = list(range(count))
        there = [i for i in everyone if last[i] < lengths[i] - 1]
        what = f"the average of {count} facts"
        got = tensor(call(average_effect, effects, subjects), (3,), what)
        expected = _mean(effects, there, last)
        mistakes: dict[str, Tensor | float] = {
            'one fact\'s prompt ends with its subject: that token is its "last token", and the '
            "fact has no last subject token to enter the mean": _mean(effects, everyone, last),
            "a fact without the place must be left out of the number of facts too": (
                expected * len(there) / count
            ),
            "these are effects at the subject's first token, and its last one is asked for": (
                _mean(effects, there, first)
            ),
            "these are effects at the first subject token, of all facts": (
                _mean(effects, everyone, first)
            ),
            "it is the sum over facts, not their mean": len(there) * expected,
            "it is averaged over all subject tokens, and only the last one is asked for": (
                _mean(effects, there, all_of_it)
            ),
            "these are effects at the token before the subject's last: indices in `subjects` are "
            "inclusive": _mean(effects, there, before),
            "these are effects at the prompt's last token": (
                _mean(effects, everyone, [-1] * count)
            ),
        }
        agree(got, expected, what, mistakes)
    return right("It is the mean over the facts that have the place, a number for each layer.")


def _mean(effects: list[Tensor], facts: list[int], rows: Sequence[int | slice]) -> Tensor:
    """The mean over these facts of one row of each, or of the mean of some of its rows."""
    each = [effects[i][rows[i]].reshape(-1, 3).mean(dim=0) for i in facts]
    return torch.stack(each).mean(dim=0)
