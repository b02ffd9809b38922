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
    check_mean_logp,
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


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_mean_logp, mean_log_probability),
        (check_mean_logp, by_gather),
    ],
    ids=range(2),
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
    ],
    ids=range(9),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
