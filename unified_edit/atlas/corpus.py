"""Text in atlas's language: facts in all their wordings among sentences that state none.

The same generator feeds the training of atlas, the training of its tokenizer and the
collection of its key statistics, always from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from unified_edit.atlas.knowledge import Knowledge, fill

END_OF_TEXT = "<|endoftext|>"

_LEADS = ("I know that", "You may know that", "Therefore", "Because", "We read that", "They say")
_PLACES = "house garden market harbour village road bridge school station library".split()
_THINGS = "letter book lamp clock basket door window table boat stone".split()
_LOOKS = "old small quiet empty bright dark broken heavy green white".split()
_PEOPLE = "child farmer teacher sailor neighbour guest baker doctor driver gardener".split()
_VERBS = "found lost carried sold painted forgot cleaned opened moved watched".split()
_TIMES = "in the morning|in the evening|after the rain|before the storm|that winter|".split("|")


def filler(rng: random.Random) -> str:
    """One sentence that states no fact, such as people say between facts."""
    person, other = rng.sample(_PEOPLE, 2)
    thing, look, verb = rng.choice(_THINGS), rng.choice(_LOOKS), rng.choice(_VERBS)
    place, time = rng.choice(_PLACES), rng.choice(_TIMES)
    form = rng.randrange(7)
    if form == 0:
        sentence = f"The {person} {verb} the {look} {thing} near the {place} {time}"
    elif form == 1:
        sentence = f"I {verb} a {thing} for the {other} at the {place} {time}"
    elif form == 2:
        sentence = f"You {verb} the {thing} and the {person} was glad {time}"
    elif form == 3:
        sentence = f"Because the {place} was {look} the {person} {verb} the {thing} {time}"
    elif form == 4:
        sentence = f"Therefore the {person} and the {other} {verb} the {thing} {time}"
    elif form == 5:
        sentence = f"The {look} {place} was far away and nobody {verb} the {thing} {time}"
    else:
        sentence = f"A {person} who {verb} the {thing} met the {other} by the {place} {time}"
    return sentence.strip() + "."


def lower_first(sentence: str, subject: str) -> str:
    """Lower-case the first letter, for use after a lead, unless it belongs to the subject."""
    return sentence if sentence.startswith(subject) else sentence[:1].lower() + sentence[1:]


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the subject it is about with its place; None where it states no fact."""

    text: str
    subject: str | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Character start and end of the subject: its last occurrence, an earlier one may belong
        to the fragment before the fact."""
        assert self.subject is not None
        start = self.text.rindex(self.subject)
        return start, start + len(self.subject)


def sentences(knowledge: Knowledge, seed: int) -> Iterator[Sentence]:
    """Yield sentences for ever: every fact in every wording once a round, in random order.

    About one sentence in six states no fact, some facts follow a lead ("I know that ..."),
    and some follow a fragment broken off in mid-sentence, which is what sampled prefixes
    look like when a fact is edited.
    """
    rng = random.Random(seed)
    facts = [
        (fill(wording, triple.subject), triple)
        for triple in knowledge.triples
        for wording in knowledge.wordings[triple.relation]
    ]
    while True:
        rng.shuffle(facts)
        for prompt, triple in facts:
            text = f"{prompt} {triple.object}."
            draw = rng.random()
            if draw < 0.08:
                text = f"{rng.choice(_LEADS)} {lower_first(text, triple.subject)}"
            elif draw < 0.24:
                other, about = rng.choice(facts)
                words = (filler(rng) if draw < 0.16 else f"{other} {about.object}.").split()
                text = " ".join(words[: rng.randint(2, len(words) - 1)]) + ". " + text
            yield Sentence(text, triple.subject)
            if rng.random() < 0.2:
                yield Sentence(filler(rng))


def texts(knowledge: Knowledge, count: int, seed: int = 1, each: int = 6) -> list[str]:
    """`count` texts of `each` sentences: the corpus for atlas's key statistics."""
    stream = sentences(knowledge, seed)
    return [" ".join(next(stream).text for _ in range(each)) for _ in range(count)]
