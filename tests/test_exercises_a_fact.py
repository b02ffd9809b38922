"""Checks of the chapter "A fact inside a transformer", and its equations in the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.model import Encoder, anatomy, likelihoods
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.a_fact import (
    check_contribution,
    check_mean_logp,
    direct_contribution,
    mean_log_probability,
)

Check = Callable[[Any], str]


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("fact-target")
def test_the_probability_of_an_object_is_a_geometric_mean(atlas: Any) -> None:
    model, tokenizer = atlas
    prompt, target = "The Brooklyn Bridge is located in the city of", "New York"
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    parts = anatomy(model)
    (answer,) = likelihoods(parts, Encoder(tokenizer, parts).continuations([(prompt, target)]))
    assert len(ids) == len(tokenizer(prompt)["input_ids"]) + 2
    # logits in float32, with and without the last token: they agree to about 1e-5
    assert answer.logp == pytest.approx(mean_log_probability(logits, ids, 2), abs=1e-4)
    table = ue.compare(model, tokenizer, prompt, target)
    assert table["before"][0] == pytest.approx(math.exp(answer.logp))


# --- checks ---------------------------------------------------------------------------------------


def by_gather(logits: Tensor, ids: list[int], n: int) -> Tensor:
    target = torch.tensor(ids[-n:])[:, None]
    return logits.log_softmax(-1)[-n - 1 : -1].gather(1, target).mean()


def off_by_one(logits: Tensor, ids: list[int], n: int) -> Tensor:
    return logits.log_softmax(-1)[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).mean()


def off_the_last(logits: Tensor, ids: list[int], n: int) -> Tensor:
    return logits.log_softmax(-1)[-1, ids[-n:]].mean()


@pytest.mark.equation("fact-direct")
@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_mean_logp, mean_log_probability),
        (check_mean_logp, by_gather),
        (check_contribution, direct_contribution),
        (
            check_contribution,
            lambda u, h, gain, e: (
                ((e * gain) @ u - (e * gain).sum() * u.mean()) / h.var(correction=0).sqrt()
            ),
        ),
    ],
    ids=range(4),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_mean_logp, None, "was given nothing"),
        (check_mean_logp, lambda logits, ids, n: None, "returned nothing"),
        (check_mean_logp, off_by_one, "you read token i off row i"),
        (check_mean_logp, off_the_last, "off the last row"),
        (check_mean_logp, lambda *given: given[2] * by_gather(*given), "this is the sum"),
        (check_mean_logp, lambda *given: by_gather(*given).exp(), "this is the probability"),
        (
            check_mean_logp,
            lambda logits, ids, n: by_gather(logits, ids, len(ids) - 1),
            "the tokens of the prompt are in it",
        ),
        (
            check_mean_logp,
            lambda logits, ids, n: (
                logits[-n - 1 : -1].gather(1, torch.tensor(ids[-n:])[:, None]).mean()
            ),
            "use `log_softmax`",
        ),
        (
            check_mean_logp,
            lambda logits, ids, n: (
                logits.softmax(-1)[-n - 1 : -1]
                .gather(1, torch.tensor(ids[-n:])[:, None])
                .mean()
                .log()
            ),
            "the mean of the logarithms",
        ),
        (check_contribution, None, "was given nothing"),
        (check_contribution, lambda u, h, gain, e: None, "returned nothing"),
        (check_contribution, lambda *given: -direct_contribution(*given), "sign"),
        (check_contribution, lambda *given: 2 * direct_contribution(*given), "2 times"),
        (check_contribution, lambda u, h, gain, e: 0.0, "zero"),
        (check_contribution, lambda u, h, gain, e: 0.123, "you have 0.123"),
        (check_contribution, lambda u, h, gain, e: gain * u, "one number is asked for"),
        (
            check_contribution,
            lambda u, h, gain, e: e @ (gain * u) / h.std(correction=0),
            "the mean of the part",
        ),
        (
            check_contribution,
            lambda u, h, gain, e: e @ (gain * (u - h.mean())) / h.std(correction=0),
            "the mean of the stream",
        ),
        (
            check_contribution,
            lambda u, h, gain, e: e @ (u - u.mean()) / h.std(correction=0),
            "the gain is missing",
        ),
        (check_contribution, lambda u, h, gain, e: e @ (gain * (u - u.mean())), "is missing"),
        (
            check_contribution,
            lambda u, h, gain, e: direct_contribution(u, u, gain, e),
            "as a whole",
        ),
        (
            check_contribution,
            lambda u, h, gain, e: e @ (gain * (u - u.mean())) / h.var(correction=0),
            "the variance",
        ),
        (check_contribution, lambda u, h, gain, e: e @ (gain * (u - u.mean())) / h.std(), "d - 1"),
        (
            check_contribution,
            lambda u, h, gain, e: direct_contribution(h, h, gain, e),
            "the whole stream",
        ),
        (
            check_contribution,
            lambda u, h, gain, e: e @ (gain * u - (gain * u).mean()) / h.std(correction=0),
            "after the gain",
        ),
    ],
    ids=range(25),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
