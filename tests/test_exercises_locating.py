"""The checks of the chapter on causal tracing: right answers pass, mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unified_edit import exercises
from unified_edit.teaching.exercises import ExerciseError


def scale(E: Tensor, ids: list[int], factor: float) -> Tensor:
    return factor * E[ids].std()


def restore(output: Tensor, token: int) -> Tensor:
    output = output.clone()
    output[1:, token] = output[0, token]
    return output


def average(effects: list[Tensor], subjects: list[tuple[int, int]]) -> Tensor:
    pairs = zip(effects, subjects, strict=True)
    return torch.stack([e[last] for e, (_, last) in pairs if last + 1 < len(e)]).mean(0)


RIGHT: dict[str, Callable[..., Any]] = {
    "check_noise_scale": scale,
    "check_restore": restore,
    "check_average_effect": average,
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_passes_and_none_does_not(name: str) -> None:
    check = getattr(exercises, name)
    assert check(RIGHT[name]).startswith("Right. ")
    with pytest.raises(ExerciseError, match="returned nothing"):
        check(lambda *_: None)


def by_hand(E: Tensor, ids: list[int], factor: float) -> float:
    entries = E[ids].flatten()
    return factor * float(((entries - entries.mean()) ** 2).sum() / (len(entries) - 1)) ** 0.5


def test_another_way_to_the_scale_passes() -> None:
    assert exercises.check_noise_scale(by_hand).startswith("Right.")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda E, ids, f: E[ids].std(), "factor is missing"),
        (lambda E, ids, f: f * E.std(), "all tokens"),
        (lambda E, ids, f: f * E[sorted(set(ids))].std(), "count twice"),
        (lambda E, ids, f: f * E[ids].std(correction=0), "nd - 1"),
        (lambda E, ids, f: f * E[ids].square().mean().sqrt(), "mean must be taken away"),
        (lambda E, ids, f: f * E[ids].var(), "square root"),
        (lambda E, ids, f: f * E[ids].std(dim=0).mean(), "taken together"),
        (lambda E, ids, f: f * E[ids].std(dim=0), "shape"),
    ],
)
def test_mistakes_with_the_scale_are_named(wrong: Callable[..., Any], words: str) -> None:
    with pytest.raises(ExerciseError, match=words):
        exercises.check_noise_scale(wrong)


def in_place(output: Tensor, token: int) -> Tensor:
    output[1:, token] = output[0, token]
    return output


def everywhere(output: Tensor, token: int) -> Tensor:
    return output[:1].expand(output.shape).clone()


def one_run(output: Tensor, token: int) -> Tensor:
    output = output.clone()
    output[1, token] = output[0, token]
    return output


def backwards(output: Tensor, token: int) -> Tensor:
    output = output.clone()
    output[0, token] = output[1, token]
    return output


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (in_place, "changed its argument"),
        (everywhere, "all tokens were put back"),
        (one_run, "only the first of the corrupted runs"),
        (backwards, "clean run was overwritten"),
        (lambda output, token: output.clone(), "nothing was put back"),
        (lambda output, token: output[0, token], "shape"),
    ],
)
def test_mistakes_with_restoring_are_named(wrong: Callable[..., Any], words: str) -> None:
    with pytest.raises(ExerciseError, match=words):
        exercises.check_restore(wrong)


def all_facts(effects: list[Tensor], subjects: list[tuple[int, int]]) -> Tensor:
    pairs = zip(effects, subjects, strict=True)
    return torch.stack([effect[last] for effect, (_, last) in pairs]).mean(0)


def first_token(effects: list[Tensor], subjects: list[tuple[int, int]]) -> Tensor:
    pairs = zip(effects, subjects, strict=True)
    return torch.stack([e[first] for e, (first, last) in pairs if last + 1 < len(e)]).mean(0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (all_facts, "ends with its subject"),
        (first_token, "first token"),
        (lambda effects, subjects: average(effects, subjects) * 3 / 4, "number of facts too"),
        (lambda effects, subjects: average(effects, subjects) * 3, "sum over facts"),
        (lambda effects, subjects: average(effects, subjects).mean(), "shape"),
    ],
)
def test_mistakes_with_the_average_are_named(wrong: Callable[..., Any], words: str) -> None:
    with pytest.raises(ExerciseError, match=words):
        exercises.check_average_effect(wrong)
