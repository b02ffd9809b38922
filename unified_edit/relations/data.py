"""Relations as data: a wording, and pairs of a subject and the object that it is related to.

Files have the form published with *Linearity of Relation Decoding* (Hernandez et al., ICLR 2024,
arXiv 2308.09124): one JSON object a relation,

    {"name": ..., "prompt_templates": ["{} plays the", ...], "properties": {"relation_type": ...},
     "samples": [{"subject": "Miles Davis", "object": "trumpet"}, ...]}
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unified_edit.arguments import as_list, as_path, whole_number
from unified_edit.atlas.knowledge import load_knowledge
from unified_edit.errors import FactError, FactFileError, RelationError, brief, quote
from unified_edit.facts.facts import SLOT, clean_text
from unified_edit.facts.json_objects import Fields, read_objects

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """A subject and its object under a relation; outer whitespace of both is dropped.

    Raises FactError for a text that is empty or no string.
    """

    subject: str
    object: str

    def __post_init__(self) -> None:
        for name in self.__slots__:
            object.__setattr__(self, name, clean_text(getattr(self, name), f"Pair.{name}"))


@dataclass(frozen=True)
class RelationData:
    """One relation: its name, its wordings (each with one `{}`), its pairs, and what kind it is.

    A subject has one object here: later pairs of the same subject are left out, with a warning.
    Raises RelationError without a wording or a pair, FactError for a wording that is no template.
    """

    name: str
    templates: tuple[str, ...]
    pairs: tuple[Pair, ...]
    kind: str = ""

    def __post_init__(self) -> None:
        name = clean_text(self.name, "RelationData.name")
        where = f"relation {quote(name)}"
        templates = tuple(clean_text(text, "a template", where) for text in as_list(self.templates))
        for text in templates:
            if text.count(SLOT) != 1:
                raise FactError(
                    f"a template needs exactly one {SLOT}: {quote(text)} ({where}). Write {SLOT} "
                    "once, where the subject stands."
                )
        first: dict[str, Pair] = {}
        for pair in self.pairs:
            first.setdefault(pair.subject, pair)
        if not templates or not first:
            missing = "pairs" if templates else "templates"
            raise RelationError(f"{where} has no {missing}; give at least one")
        if left_out := len(self.pairs) - len(first):
            log.warning("%s: %d further pairs of a subject are left out", where, left_out)
        for field, value in (
            ("name", name), ("templates", templates), ("pairs", tuple(first.values()))
        ):  # fmt: skip
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.pairs)

    def wording(self, number: int) -> str:
        """One of the templates; RelationError where there are not so many."""
        name = f"template of relation {self.name!r}"
        return self.templates[
            whole_number(number, name, RelationError, least=0, below=len(self.templates))
        ]

    def with_pairs(self, pairs: Iterable[Pair]) -> RelationData:
        """The same relation with other pairs."""
        return replace(self, pairs=tuple(pairs))

    @classmethod
    def from_rows(
        cls,
        name: str,
        templates: str | Sequence[str],
        rows: Iterable[Mapping[str, Any]],
        *,
        subject: str = "subject",
        object: str = "object",
    ) -> RelationData:
        """A relation from rows of any table, such as a data set of `datasets`.

        `subject` and `object` are the names of its columns. Raises RelationError where a row lacks
        one, and what `RelationData` raises.
        """
        pairs = []
        for number, row in enumerate(rows):
            missing = [column for column in (subject, object) if column not in row]
            if missing:
                raise RelationError(
                    f"row {number} of {name!r} has no column {missing[0]!r}; it has "
                    f"{', '.join(map(repr, row))}. Name the columns: subject=, object="
                )
            pairs.append(Pair(row[subject], row[object]))
        return cls(name, tuple(as_list(templates)), tuple(pairs))


def _relation(fields: Fields) -> RelationData:
    samples = [Fields(one, f"{fields.where}, sample {i}", i)
               for i, one in enumerate(fields.take("samples", list))]  # fmt: skip
    name, kind = fields.take("name", str), ""
    if "properties" in fields:
        kind = fields.inside("properties").optional("relation_type", str) or ""
    try:
        return RelationData(
            name,
            fields.texts("prompt_templates"),
            tuple(Pair(one.take("subject", str), one.take("object", str)) for one in samples),
            kind,
        )
    except FactFileError:
        raise
    except (FactError, RelationError) as problem:
        raise FactFileError(f"{fields.where}: {problem}") from problem


def read_relations(path: str | os.PathLike[str]) -> list[RelationData]:
    """All relations of a file, or of the JSON files in a folder and below it, by their paths.

    Raises FactFileError, naming file and place, for what is not of the published form (above).
    """
    found = as_path(path, "path", FactFileError, advice="give a file or a folder of relations")
    files = sorted(found.rglob("*.json")) if found.is_dir() else [found]
    if not files:
        raise FactFileError(f"{found} holds no JSON file; give the folder of the relations")
    return [_relation(fields) for file in files for fields in read_objects(file)]


def load_relation(
    repository: str,
    name: str,
    templates: str | Sequence[str],
    *,
    subject: str = "subject",
    object: str = "object",
    split: str = "train",
    **more: Any,
) -> RelationData:
    """A relation from a data set of others, by `datasets.load_dataset(repository, **more)`.

    `subject`, `object`: its columns. Raises RelationError where it cannot be loaded (the package
    missing, no network, no such split), and what `RelationData.from_rows` raises.
    """
    try:
        from datasets import load_dataset  # an extra of this library
    except ImportError as problem:
        raise RelationError(
            "data sets of the Hub are read with the package datasets, which is not installed: "
            "pip install 'unified_edit[hub]', or give rows to RelationData.from_rows"
        ) from problem
    try:
        rows = load_dataset(repository, split=split, **more)
    except Exception as problem:  # whatever the network, the Hub or the cache raises
        raise RelationError(
            f"{brief(repository)} could not be loaded: {type(problem).__name__}, {problem}. Check "
            "the name, the split and the network, or give rows to RelationData.from_rows"
        ) from problem
    return RelationData.from_rows(name, templates, rows, subject=subject, object=object)


def atlas_relations() -> list[RelationData]:
    """The relations of the embedded model; the first wording of each has the subject first."""
    knowledge = load_knowledge()
    pairs: dict[str, list[Pair]] = {name: [] for name in knowledge.wordings}
    for triple in knowledge.triples:
        pairs[triple.relation].append(Pair(triple.subject, triple.object))
    return [
        RelationData(name, wordings, tuple(pairs[name]), "atlas")
        for name, wordings in knowledge.wordings.items()
    ]
