"""Facts that may stand together in one batch, and what becomes of those that may not."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from unified_edit.errors import ContradictionError, FactError, MethodError, brief
from unified_edit.facts.facts import Fact, Record

#: What is done with facts of one batch that share a subject: the equality refuses them, one value
#: is found for all of them, or they are written in consecutive batches.
SharedSubject = Literal["raise", "merge", "split"]
#: What is done with facts of one prompt and subject that have different targets: they are refused,
#: or the last one wins.
Conflict = Literal["raise", "last"]


def check_ways(on_shared_subject: object = "raise", on_conflict: object = "raise") -> None:
    """Raise MethodError unless these are a `SharedSubject` and a `Conflict`."""
    given = (
        ("on_shared_subject", on_shared_subject, get_args(SharedSubject)),
        ("on_conflict", on_conflict, get_args(Conflict)),
    )
    for name, value, choices in given:
        if not isinstance(value, str) or value not in choices:
            raise MethodError(f"{name} is {brief(value)}; choose one of {choices}")


def _listed(facts: Iterable[Fact] | Fact) -> list[Fact]:
    try:
        given = iter([facts] if isinstance(facts, Fact) else facts)
    except TypeError as error:
        raise _no_fact(facts, "got") from error
    items = list(given)
    for index, item in enumerate(items):
        if not isinstance(item, Fact):
            raise _no_fact(item, f"item {index} is")
    return items


def _no_fact(value: object, place: str) -> FactError:
    advice = "Pass record.fact." if isinstance(value, Record) else "Write [Fact(...)]."
    got = f"{place} {type(value).__name__}, {brief(value, 60)}"
    return FactError(f"facts must be a list of Fact: {got}. {advice}")


def check_items(facts: Iterable[Fact] | Fact) -> list[Fact]:
    """`facts` as a list; a single `Fact` is a list of one.

    Raises `FactError` for no facts and for anything that is no `Fact`.
    """
    items = _listed(facts)
    if not items:
        raise FactError("there are no facts to edit: the list is empty. Give at least one Fact.")
    return items


def check_batch(facts: Iterable[Fact] | Fact, on_conflict: Conflict = "raise") -> list[Fact]:
    """The facts of a batch, each once, in order of first occurrence.

    Facts with the same prompt, subject and target are merged (`target_true` is taken from the
    first that has one). Where the same prompt and subject are given another target, the last one
    stands with `on_conflict` "last", as if the others had not been given.

    Raises `FactError` for no facts and for anything that is no `Fact`, `ContradictionError` for
    different targets of the same prompt and subject with "raise", and `MethodError` for another
    `on_conflict`.
    """
    return settle(facts, on_conflict)[0]


def settle(
    facts: Iterable[Fact] | Fact, on_conflict: Conflict = "raise"
) -> tuple[list[Fact], list[str]]:
    """What `check_batch` gives, and a sentence on each fact that another one overrules."""
    check_ways(on_conflict=on_conflict)
    items = check_items(facts)
    last = {(fact.prompt, fact.subject): index for index, fact in enumerate(items)}
    merged: dict[tuple[str, str], tuple[int, Fact]] = {}
    overruled: list[str] = []
    for index, fact in enumerate(items):
        place = (fact.prompt, fact.subject)
        winner = items[last[place]]
        if on_conflict == "last" and fact.target_new != winner.target_new:
            overruled.append(
                f"fact {index}, {fact}, is not written: fact {last[place]}, {winner}, has the same "
                "prompt and subject and another target, and the last one wins"
            )
            continue
        first, known = merged.setdefault(place, (index, fact))
        if known.target_new != fact.target_new:
            raise ContradictionError(
                f"two facts contradict each other: fact {first}, {known}, and fact {index}, {fact},"
                " have the same prompt and subject but different targets. Keep one of them, or "
                "edit them one after another, or let the last one win (on_conflict='last')."
            )
        if known.target_true is None and fact.target_true is not None:
            merged[place] = (first, replace(known, target_true=fact.target_true))
    return [fact for _, fact in merged.values()], overruled


def subject_key(fact: Fact) -> str:
    """What facts about one subject have in common.

    Upper and lower case, repeated blanks and the Unicode form of accents make no difference.
    """
    return unicodedata.normalize("NFC", " ".join(fact.subject.split()).casefold())


def _by_subject(facts: Sequence[Fact]) -> list[list[int]]:
    """The places of the facts of each subject, by first occurrence."""
    groups: dict[str, list[int]] = {}
    for index, fact in enumerate(facts):
        groups.setdefault(subject_key(fact), []).append(index)
    return list(groups.values())


def shared_subjects(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Index pairs (i < j) of facts about the same subject whose filled-in prompts differ.

    Upper and lower case, repeated blanks and the Unicode form of accents do not make subjects
    different. The keys of such facts are close or identical: with a subject at the start of both
    prompts the model has read the same tokens when it forms the key.
    """
    facts = _listed(facts)
    return sorted(
        (i, j)
        for members in _by_subject(facts)
        for n, i in enumerate(members)
        for j in members[n + 1 :]
        if facts[i].text != facts[j].text
    )


def subject_columns(facts: Sequence[Fact]) -> tuple[int, ...]:
    """For each fact the number of its column, from 0 in order of first occurrence.

    Facts that `shared_subjects` pairs stand in one column, all others in one of their own.
    """
    facts = _listed(facts)
    first = list(range(len(facts)))  # the first fact of each one's column
    for members in _by_subject(facts):
        if len({facts[place].text for place in members}) > 1:
            for place in members:
                first[place] = members[0]
    number = {one: place for place, one in enumerate(dict.fromkeys(first))}
    return tuple(number[one] for one in first)


def subject_batches(facts: Sequence[Fact]) -> list[list[int]]:
    """The places of facts in as few batches as are needed for none to hold a shared subject.

    The first fact of every subject is in the first batch, the second one in the second, and so on.
    """
    facts = _listed(facts)
    batch_of = [0] * len(facts)
    for members in _by_subject(facts):
        texts = {text: n for n, text in enumerate(dict.fromkeys(facts[i].text for i in members))}
        for place in members:
            batch_of[place] = texts[facts[place].text]
    return members_of(batch_of)


def members_of(columns: Sequence[int]) -> list[list[int]]:
    """The places of each number in `columns`, which counts from 0."""
    members: list[list[int]] = [[] for _ in range(max(columns, default=-1) + 1)]
    for place, column in enumerate(columns):
        members[column].append(place)
    return members
