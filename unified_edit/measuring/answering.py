"""Putting the questions whose answers are not there yet, and saying which records count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from unified_edit.errors import FactError
from unified_edit.facts import Record
from unified_edit.measuring.answer_lines import AnswerLines, digest_of
from unified_edit.measuring.generation import Generation, generated_rows
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import Report, report_of
from unified_edit.measuring.scores import BEFORE, REWRITE
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.progress import Progress

#: Why a record does not count with `known_only`.
UNKNOWN, NOTHING_TRUE = "not known before", "without a true object"


@dataclass
class Asking:
    """Puts questions whose answers are not there yet."""

    lines: AnswerLines
    known_only: bool
    bar: Progress
    tokenizer: Tokenizer
    generate: Generation | None = None
    kept: int = 0

    def ask(self, sheet: Sheet, when: str) -> list[tuple[int, Record]]:
        """Ask all that a sheet holds, in one state; return the records that count.

        If a single answer is missing, all are asked again: in another company they may differ in
        rounding.
        """
        given = list(zip(sheet.numbers, sheet.records, strict=True))
        digests = {number: digest_of([record]) for number, record in given}
        for number, digest in digests.items():
            self.lines.expect(number, digest)
        counting = [
            place
            for place, (number, _) in enumerate(given)
            if when == BEFORE or self.lines.why_not(number) is None
        ]
        missing = {given[i][0] for i in counting if not self.lines.has(given[i][0], when)}
        if missing:
            answers: dict[int, list[dict[str, Any]]] = {given[i][0]: [] for i in counting}
            rows = sheet.rows(when, counting, self.bar)
            if self.generate is not None:
                rows += generated_rows(sheet, self.tokenizer, when, counting, self.generate)
            for row in rows:
                answers[row["record"]].append(row)
            for place in counting:
                number, record = given[place]
                if number in missing:
                    line = self._line(record, when, answers[number])
                    self.lines.add(number, when, {"digest": digests[number], **line})
        else:
            self.bar.update(len(sheet.asked))
        left = [one for one in given if self.lines.why_not(one[0]) is None]
        self.kept += len(left) * (when == BEFORE)
        return left

    def _line(self, record: Record, when: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of one record: its answers, or why it is left out."""
        reason = None
        if self.known_only and when == BEFORE:
            asked = next(row for row in rows if row["kind"] == REWRITE)
            if record.fact.target_true is None:
                reason = NOTHING_TRUE
            elif not asked["logp_true"] > asked["logp_new"]:
                reason = UNKNOWN
        about = {"case_id": record.case_id, "relation": record.relation}
        if reason is not None:
            return {**about, "left_out": reason}
        of_record = ("record", "when", *about)
        answers = [{k: v for k, v in row.items() if k not in of_record} for row in rows]
        return {**about, "answers": answers}

    def report(self, count: int, bootstrap: int) -> Report:
        """What was found about all `count` records."""
        if count and not self.kept:
            raise FactError(
                f"known_only leaves none of {count} records: the model finds the true object more "
                "probable than the new one at no rewrite prompt. Give other records, or leave "
                "known_only out"
            )
        self.lines.finish(count)
        return replace(report_of(self.lines.lines())[0], bootstrap=bootstrap)
