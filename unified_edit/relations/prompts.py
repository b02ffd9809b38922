"""The published few-shot prompt of a relation, and where its subjects stand in it.

    Miles Davis plays the trumpet
    Jimi Hendrix plays the guitar
    Elton John plays the

A subject that is itself one of the examples is asked behind the others. In front stands the token
that the model's texts begin with (`Encoder.start`), as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unified_edit.errors import RelationError, TokenizationError, quote
from unified_edit.facts.facts import SLOT
from unified_edit.model.prompts import Encoder, Row
from unified_edit.relations.data import Pair

#: Between two lines of the prompt, as published.
SEPARATOR = "\n"


@dataclass(frozen=True)
class FewShot:
    """A wording behind solved examples of it, each followed by `separator`."""

    template: str
    examples: tuple[Pair, ...] = ()
    separator: str = SEPARATOR

    def parts(self, subject: str) -> tuple[str, str, str]:
        """The prompt about `subject`: the text before it, the subject, the text behind it."""
        before, _, behind = self.template.partition(SLOT)
        lines = [
            f"{before}{pair.subject}{behind} {pair.object}{self.separator}"
            for pair in self.examples
            if pair.subject != subject
        ]
        return "".join(lines) + before, subject, behind

    def text(self, subject: str) -> str:
        """The whole prompt about `subject`."""
        return "".join(self.parts(subject))


@dataclass(frozen=True)
class Asked(Row):
    """A prompt as tokens; `own` is the place of its subject's first one.

    What stands before is the same for all subjects that are not among the examples.
    """

    own: int = 0


def rows_of(encoder: Encoder, prompt: FewShot, subjects: Sequence[str]) -> list[Asked]:
    """The prompt about each subject as tokens, with the place of the subject's last one.

    Raises TokenizationError where a subject has no token of its own, or the model has fewer
    positions than the prompt has tokens.
    """
    texts = [prompt.text(subject) for subject in subjects]
    front = () if encoder.before else encoder.start
    limit = None if encoder.parts is None else encoder.parts.positions
    rows = []
    for subject, text, found in zip(subjects, texts, encoder.encode(texts), strict=True):
        start = len(prompt.parts(subject)[0])
        places = found.covering(start, start + len(subject))
        if not places:
            raise TokenizationError(
                f"no token of {quote(text)} covers the subject {quote(subject)}; check the "
                "tokenizer's offsets"
            )
        ids = front + found.ids
        if limit is not None and len(ids) > limit:
            raise TokenizationError(
                f"the prompt of {len(prompt.examples)} examples about {quote(subject)} has "
                f"{len(ids)} tokens, but the model has only {limit} positions; give fewer or "
                "shorter examples (n=)"
            )
        rows.append(Asked(ids, len(front) + places[-1], own=len(front) + places[0]))
    return rows


def first_tokens(encoder: Encoder, template: str, pairs: Sequence[Pair]) -> list[int]:
    """The first token of each object as it stands behind its filled-in wording.

    It alone is asked for: of an object of several tokens a relation reads the first one.
    """
    before, _, behind = template.partition(SLOT)
    asked = [(f"{before}{pair.subject}{behind}", pair.object) for pair in pairs]
    return [row.target[0] for row in encoder.continuations(asked)]


def says(encoder: Encoder, token: int, wanted: str) -> bool:
    """Whether a token begins `wanted`, blanks and case aside: the published rule for an answer."""
    said = encoder.tokenizer.decode([token]).strip().lower()
    return bool(said) and wanted.strip().lower().startswith(said)


def enough(pairs: Sequence[object], needed: int, what: str, where: str) -> None:
    """Raise RelationError where there are fewer than `needed`."""
    if len(pairs) < needed:
        raise RelationError(
            f"{where} has {len(pairs)} {what}, but {needed} are needed; ask for fewer examples "
            "(n=) or folds, or give more pairs"
        )
