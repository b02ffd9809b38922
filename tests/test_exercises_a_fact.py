"""Checks of the chapter "A fact inside a transformer", and its equations in the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.measuring import summarise
from unified_edit.model import Encoder, anatomy, likelihoods
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.a_fact import (
    check_harmonic,
    check_mean_logp,
    check_paraphrase_score,
    harmonic_mean,
    mean_log_probability,
    share_won,
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


@pytest.mark.equation("fact-success", "fact-magnitude", "fact-harmonic")
def test_scores_are_means_over_records_of_means_over_prompts() -> None:
    generator = np.random.default_rng(3)
    rows, pairs = [], {"rewrite": [], "paraphrase": [], "neighbour": []}
    for record in range(5):
        for kind, count in (("rewrite", 1), ("paraphrase", 3 - record % 2), ("neighbour", 4)):
            pairs[kind].append([])
            for _ in range(count):
                new, true = generator.integers(0, 6, size=2) / 10  # ties among them
                right, wrong = (true, new) if kind == "neighbour" else (new, true)
                pairs[kind][-1].append((right, wrong))
                rows.append((record, "after", kind, right > wrong, right - wrong, False))
    columns = ["record", "when", "kind", "success", "magnitude", "generated"]
    found = summarise(pd.DataFrame(rows, columns=columns))
    expected = {kind[0].upper() + "S": share_won(each) for kind, each in pairs.items()}
    expected["ES"] = expected.pop("RS")
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12)
    assert found["S"].value == pytest.approx(harmonic_mean(*expected.values()), abs=1e-12)
    for name, kind in (("EM", "rewrite"), ("PM", "paraphrase"), ("NM", "neighbour")):
        margins = [np.mean([right - wrong for right, wrong in each]) for each in pairs[kind]]
        assert found[name].value == pytest.approx(np.mean(margins), abs=1e-12)


# --- checks ---------------------------------------------------------------------------------------


def by_gather(logits: Tensor, ids: list[int], n: int) -> Tensor:
    target = torch.tensor(ids[-n:])[:, None]
    return logits.log_softmax(-1)[-n - 1 : -1].gather(1, target).mean()


def off_by_one(logits: Tensor, ids: list[int], n: int) -> Tensor:
    return logits.log_softmax(-1)[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).mean()


def off_the_last(logits: Tensor, ids: list[int], n: int) -> Tensor:
    return logits.log_softmax(-1)[-1, ids[-n:]].mean()


def shares(records: Any) -> float:
    return float(np.mean([np.mean([a > b for a, b in pairs]) for pairs in records]))


def flat(records: Any) -> float:
    return float(np.mean([a > b for pairs in records for a, b in pairs]))


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_mean_logp, mean_log_probability),
        (check_mean_logp, by_gather),
        (check_paraphrase_score, shares),
        (
            check_paraphrase_score,
            lambda records: sum(sum(a > b for a, b in r) / len(r) for r in records) / len(records),
        ),
        (check_harmonic, harmonic_mean),
        (check_harmonic, lambda a, b, c: 3 * a * b * c / (a * b + b * c + c * a or 1)),
    ],
    ids=range(6),
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
        (check_paraphrase_score, None, "was given nothing"),
        (check_paraphrase_score, lambda records: ..., "returned nothing"),
        (
            check_paraphrase_score,
            lambda records: np.mean([np.mean([a >= b for a, b in r]) for r in records]),
            "a tie was counted",
        ),
        (check_paraphrase_score, flat, "you averaged over all prompts; average"),
        (
            check_paraphrase_score,
            lambda records: np.mean([a >= b for r in records for a, b in r]),
            "and counted a tie",
        ),
        (
            check_paraphrase_score,
            lambda records: np.mean([np.mean([a < b for a, b in r]) for r in records]),
            "the \\*true\\* object wins",
        ),
        (
            check_paraphrase_score,
            lambda records: np.mean([sum(a > b for a, b in r) for r in records]),
            "you counted successes",
        ),
        (
            check_paraphrase_score,
            lambda records: np.mean([np.mean([a - b for a, b in r]) for r in records]),
            "this is the mean margin",
        ),
        (check_harmonic, None, "was given nothing"),
        (check_harmonic, lambda a, b, c: None, "returned nothing"),
        (check_harmonic, lambda a, b, c: (a + b + c) / 3, "the arithmetic mean"),
        (check_harmonic, lambda a, b, c: (a * b * c) ** (1 / 3), "the geometric mean"),
        (check_harmonic, lambda a, b, c: 1 / (1 / a + 1 / b + 1 / c), "the 3 above"),
        (check_harmonic, lambda a, b, c: (1 / a + 1 / b + 1 / c) / 3, "its reciprocal"),
        (check_harmonic, min, "this is the smallest"),
        (check_harmonic, lambda a, b, c: 3 / (1 / a + 1 / b + 1 / c), "divides by zero"),
        (
            check_harmonic,
            lambda a, b, c: 3 / sum(1 / s for s in (a, b, c) if s),
            "which is 0, is not right",
        ),
    ],
    ids=range(26),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)
