"""Checks for the exercises of the chapter "From atlas to a model that read the world"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import (
    ExerciseError,
    agree,
    kind_of,
    name_of,
    number,
    right,
)

Lead = Callable[[float], float]


def on_the_path(W0: Tensor, delta: Tensor, strength: float) -> Tensor:
    """The weight at a strength of the edit, :eq:`real-path`."""
    return W0 + strength * delta


def smallest_strength(strengths: Sequence[float], lead: Lead) -> float:
    """The smallest of ascending `strengths` at which `lead` is positive, by bisection.

    It has to be positive at the last of them, and to stay so from where it first is.
    """
    fails, wins = -1, len(strengths) - 1
    while wins - fails > 1:
        middle = (fails + wins) // 2
        if lead(strengths[middle]) > 0:
            wins = middle
        else:
            fails = middle
    return strengths[wins]


#: Strengths and leads, log P(new) - log P(true), in which every mistake of the list below gives
#: another number. The lead of the first is 0 once, and there the new object is not the likelier.
TABLES: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    (
        (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25),
        (-5.1, -5, -4.8, -4.5, -4.1, -3.6, -3, -2.3, -1.5, -0.6, 0, 0.9, 2.1, 3.3, 4.4, 5.2, 6),
    ),
    ((0, 0.1, 0.3, 0.6, 1, 1.5, 2, 3), (-2, -1.1, 0.4, 2, 3.1, 3.9, 4.2, 4.4)),
    ((0.5, 1, 2, 3, 7), (-3, -2, -1.2, -0.7, 0.1)),
    ((0.25, 0.4, 0.8, 1.6, 3.2), (-0.3, 0.3, 0.9, 2, 3.5)),
)


def _asked(table: dict[float, float], asked: list[float]) -> Lead:
    """A lead that can be asked at the strengths of a table, and notes where it was."""

    def lead(strength: float) -> float:
        at = number(strength, "the strength that you give to `lead`")
        if at not in table:
            listed = ", ".join(f"{t:g}" for t in table)
            raise ExerciseError(
                f"`lead` was asked at {at:g}, which is none of the strengths {listed}: give it an "
                "entry of the list, and not a place in the list or a number in between"
            )
        asked.append(at)
        return table[at]

    return lead


def check_smallest_strength(smallest_strength: Callable[[Sequence[float], Lead], Any]) -> str:
    """Check ``smallest_strength(strengths, lead)``: the first with a positive lead, by bisection.

    Raises ExerciseError.
    """
    for strengths, leads in TABLES:
        asked: list[float] = []
        lead = _asked(dict(zip(strengths, leads, strict=True)), asked)
        given = call(smallest_strength, list(strengths), lead)
        if isinstance(given, (tuple, list)):
            raise ExerciseError(
                f"{name_of(smallest_strength)} must return one strength, and returned "
                f"{kind_of(given)}"
            )
        what = f"the smallest of {len(strengths)} strengths"
        place = next(i for i, value in enumerate(leads) if value > 0)
        before, first = strengths[place - 1], strengths[place]
        tie = leads[place - 1] == 0  # then whoever counts it gives what comes just before
        mistakes = {
            "a lead of 0 was counted; the new object must be *more* probable"
            if tie
            else "this is the largest strength at which the new object is *not* yet the likelier "
            "one": before,
            "this lies between two strengths of the list; return the one at which the new object "
            "is the likelier one": (before + first) / 2,
            "this is the place in the list; the strength that stands there is asked for": place,
            "this is the last strength, which is not the smallest that will do": strengths[-1],
        }
        mistakes = {text: value for text, value in mistakes.items() if value != first}
        agree(number(given, what), float(first), what, mistakes)
        if len(asked) > len(strengths).bit_length() + 2:  # both ends may be asked besides
            raise ExerciseError(
                f"{name_of(smallest_strength)} is right, and asked the model {len(asked)} times "
                f"about {len(strengths)} strengths. Halve the list each time: then "
                f"{len(strengths).bit_length()} questions are enough"
            )
    return right("The first strength at which the new object wins, and few questions asked.")
