"""What atlas knows: real subjects, their objects under each relation, and the wordings.

The data are plain CSV files, one a category (`people_science`, `people_arts`, `countries`,
`places`, `works`): a column `subject` and one column a relation; an empty cell means that the
fact is not in the data. `relations.json` gives the wordings of each relation; in each list the
wordings with the relation *after* the subject come first.

Two properties of the names carry everything that is done with atlas (see the book): the last
word of a subject settles alone who is meant, and first words are shared among subjects.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

#: Data file -> category, which names the block of `relations.json` that its columns belong to.
CATEGORY_OF_FILE = {
    "people_science": "people",
    "people_arts": "people",
    "countries": "countries",
    "places": "places",
    "works": "works",
}

#: Every fourth subject is never edited: records draw their neighbours from these.
HELD_OUT_SHARE = 0.25
SPLIT_SEED = 0


@dataclass(frozen=True)
class Triple:
    """One fact of atlas: `relation` is the full name, such as ``"people.country"``."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Knowledge:
    """All facts and wordings of atlas, and which subjects are held out."""

    triples: tuple[Triple, ...]
    wordings: dict[str, tuple[str, ...]]

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """Subjects in the order of the data files."""
        return tuple(dict.fromkeys(triple.subject for triple in self.triples))

    @cached_property
    def held_out(self) -> frozenset[str]:
        """The quarter of the subjects, drawn with a fixed seed, that is never edited."""
        count = round(HELD_OUT_SHARE * len(self.subjects))
        return frozenset(random.Random(SPLIT_SEED).sample(self.subjects, count))

    def prompts(self) -> Iterator[tuple[str, str, Triple]]:
        """Yield (filled-in prompt, object, triple) for all facts times wordings."""
        for triple in self.triples:
            for wording in self.wordings[triple.relation]:
                yield fill(wording, triple.subject), triple.object, triple


def fill(wording: str, subject: str) -> str:
    """Put `subject` in the place of the braces of `wording`."""
    before, _, after = wording.partition("{}")
    return before + subject + after


def load_knowledge() -> Knowledge:
    """Read the data files that ship with the package."""
    data = files("unified_edit.atlas").joinpath("data")
    blocks = json.loads(data.joinpath("relations.json").read_text(encoding="utf-8"))
    wordings = {
        f"{category}.{relation}": tuple(lines)
        for category, relations in blocks.items()
        for relation, lines in relations.items()
    }
    triples = []
    for name, category in CATEGORY_OF_FILE.items():
        lines = data.joinpath(f"{name}.csv").read_text(encoding="utf-8").splitlines()
        for row in csv.DictReader(lines):
            subject = row.pop("subject")
            triples += [
                Triple(subject, f"{category}.{relation}", value)
                for relation, value in row.items()
                if value
            ]
    return Knowledge(tuple(triples), wordings)
