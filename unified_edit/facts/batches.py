"""Facts that may stand together in one batch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

from unified_edit.errors import ContradictionError, FactError, brief
from unified_edit.facts.facts import Fact, Record


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


def check_batch(facts: Iterable[Fact] | Fact) -> list[Fact]:
    """The facts of a batch, each once, in order of first occurrence.

    Facts with the same prompt, subject and target are merged (`target_true` is taken from the
    first that has one). Raises `FactError` for no facts and for anything that is no `Fact`, and
    `ContradictionError` where the same prompt and subject are given another target.
    """
    merged: dict[tuple[str, str], tuple[int, Fact]] = {}
    for index, fact in enumerate(check_items(facts)):
        first, known = merged.setdefault((fact.prompt, fact.subject), (index, fact))
        if known.target_new != fact.target_new:
            raise ContradictionError(
                f"two facts contradict each other: fact {first}, {known}, and fact {index}, {fact},"
                " have the same prompt and subject but different targets. Keep one of them, or "
                "edit them one after another."
            )
        if known.target_true is None and fact.target_true is not None:
            known = replace(known, target_true=fact.target_true)
            merged[fact.prompt, fact.subject] = (first, known)
    return [fact for _, fact in merged.values()]


def shared_subjects(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Index pairs (i < j) of facts about the same subject whose filled-in prompts differ.

    Upper and lower case, repeated blanks and the Unicode form of accents do not make subjects
    different. The keys of such facts are close or identical: with a subject at the start of both
    prompts the model has read the same tokens when it forms the key.
    """
    facts = _listed(facts)
    groups: dict[str, list[int]] = {}
    for index, fact in enumerate(facts):
        same = unicodedata.normalize("NFC", " ".join(fact.subject.split()).casefold())
        groups.setdefault(same, []).append(index)
    return sorted(
        (i, j)
        for members in groups.values()
        for n, i in enumerate(members)
        for j in members[n + 1 :]
        if facts[i].text != facts[j].text
    )
