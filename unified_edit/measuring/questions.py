"""What is asked about a record, and how an answer is judged: the rows of `Report.table`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from unified_edit.arguments import as_list
from unified_edit.errors import FactError, brief
from unified_edit.facts import Fact, Record
from unified_edit.measuring.scores import NEIGHBOUR, PARAPHRASE, RESERVED, REWRITE
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.likelihoods import Likelihood, likelihoods
from unified_edit.model.progress import Progress
from unified_edit.model.prompts import Encoder, Row


def judge(kind: str, new: Likelihood, true: Likelihood | None) -> dict[str, Any]:
    """The columns of one prompt: logp_new, logp_true, success, magnitude, generated.

    What is averaged in :eq:`judging-success` and :eq:`judging-magnitude`. `new` and `true`: of
    o* and oc, or of a probe's `expected` and `foil`. See `Report`.
    """
    import pandas as pd

    nan = float("nan")
    if true is None:
        judged = kind not in (REWRITE, PARAPHRASE)
        success, magnitude, generated = new.greedy if judged else pd.NA, nan, new.greedy
    else:
        right, wrong = (true, new) if kind == NEIGHBOUR else (new, true)
        success = right.logp > wrong.logp
        magnitude = right.probability - wrong.probability
        generated = right.greedy
    return {
        "logp_new": new.logp,
        "logp_true": nan if true is None else true.logp,
        "success": success,
        "magnitude": magnitude,
        "generated": generated,
    }


@dataclass(frozen=True)
class Question:
    """One prompt of a record; `new` and `true` are places in `Sheet.asked`."""

    kind: str
    prompt: str
    new: int
    true: int | None


@dataclass(frozen=True)
class Sheet:
    """All questions about some records, tokenised once."""

    parts: Anatomy
    records: tuple[Record, ...]
    questions: tuple[tuple[Question, ...], ...]  # of each record
    asked: tuple[Row, ...]
    numbers: tuple[int, ...]  # what each record is called in the column "record"

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        records: Sequence[Record] | Record,
        numbers: Sequence[int] | None = None,
    ) -> Sheet:
        """Check the model and the records, and tokenise every prompt with its targets.

        numbers: the places of the records in a longer list; their places in this one if not given.
        """
        parts = anatomy(model)
        given = check_records(records, numbers)
        pairs: list[tuple[str, str]] = []
        questions = []
        for record in given:
            of_record = []
            for kind, prompt, new, true in _prompts(record):
                place = len(pairs)
                pairs.append((prompt, new))
                if true is not None:
                    pairs.append((prompt, true))
                of_record.append(Question(kind, prompt, place, None if true is None else place + 1))
            questions.append(tuple(of_record))
        asked = Encoder(tokenizer, parts).continuations(pairs)
        places = tuple(range(len(given)) if numbers is None else numbers)
        return cls(parts, given, tuple(questions), tuple(asked), places)

    def rows(
        self, when: str, records: Iterable[int], bar: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Put the questions of some records to the model as it is: rows of `Report.table`."""
        chosen = [(index, question) for index in records for question in self.questions[index]]
        places = [
            place
            for _, question in chosen
            for place in (question.new, question.true)
            if place is not None
        ]
        answers = likelihoods(self.parts, [self.asked[place] for place in places], bar=bar)
        of_place = dict(zip(places, answers, strict=True))
        return [
            {
                "record": self.numbers[index],
                "case_id": self.records[index].case_id,
                "relation": self.records[index].relation,
                "when": when,
                "kind": question.kind,
                "prompt": question.prompt,
                **judge(
                    question.kind,
                    of_place[question.new],
                    None if question.true is None else of_place[question.true],
                ),
            }
            for index, question in chosen
        ]


def _prompts(record: Record) -> Iterable[tuple[str, str, str, str | None]]:
    """(kind, prompt, o* or expected, oc or foil) of every prompt of a record."""
    fact = record.fact
    prompts = [(REWRITE, fact.text)]
    prompts += [(PARAPHRASE, prompt) for prompt in record.paraphrases]
    prompts += [(NEIGHBOUR, prompt) for prompt in record.neighbours]
    for kind, prompt in prompts:
        yield kind, prompt, fact.target_new, fact.target_true
    for group, probes in record.probes.items():
        for probe in probes:
            yield group, probe.prompt, probe.expected, probe.foil


def check_records(
    records: Sequence[Record] | Record, numbers: Sequence[int] | None = None
) -> tuple[Record, ...]:
    """The records as a tuple; FactError if there are none or one cannot be evaluated.

    numbers: what the records are called in messages, if not by their places.
    """
    given = tuple(as_list(records))
    if not given:
        raise FactError("there are no records to evaluate: the list is empty. Give at least one.")
    for index, record in zip(numbers or range(len(given)), given, strict=True):
        if not isinstance(record, Record):
            advice = " Write Record(fact)." if isinstance(record, Fact) else ""
            raise FactError(
                f"records must be a list of Record: item {index} is {type(record).__name__}, "
                f"{brief(record, 60)}.{advice}"
            )
        taken = RESERVED.intersection(record.probes)
        if taken:
            raise FactError(
                f"a group of probes cannot be called {sorted(taken)[0]!r} (record {index}, "
                f"{record.fact}): that is the name of a score or a kind of prompt. Rename it."
            )
    return given
