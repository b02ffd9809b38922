"""Records as they are given, a list or anything that yields them, as sheets of a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from transformers import PreTrainedModel

from unified_edit.arguments import as_list
from unified_edit.facts import Record
from unified_edit.measuring.answer_lines import digest_of
from unified_edit.measuring.questions import Sheet, check_records
from unified_edit.model.anatomy import Tokenizer

#: Records of one sheet.
GROUP = 32


class RecordSource:
    """Records to be evaluated.

    given: all of them, where they are a list; None for what yields them one by one.
    total: how many targets are asked in one state, and digest: a hash of all records; None where
        that is not known before.
    count: how many records there were so far.

    Raises what `Sheet.of` raises: for a list at once, else when it is the record's turn.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, records: Iterable[Record] | Record
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.count = 0
        self.given: tuple[Record, ...] | None = None
        self.total: int | None = None
        self.digest: str | None = None
        self._only: Sheet | None = None
        if isinstance(records, Iterator):
            self._stream: Iterator[Record] = records
            return
        self.given = check_records(as_list(records))
        self.digest = digest_of(self.given)
        self.total = 0
        for sheet in self.sheets():  # tokenised again later: thousands would fill the memory
            self.total += len(sheet.asked)
            self._only = sheet if len(sheet.records) == len(self.given) else None

    def sheets(self) -> Iterator[Sheet]:
        """The records, `GROUP` at a time; FactError if there is none."""
        stream = self._stream if self.given is None else iter(self.given)
        self.count = 0
        while some := tuple(islice(stream, GROUP)):
            first, self.count = self.count, self.count + len(some)
            numbers = range(first, self.count)
            yield self._only or Sheet.of(self.model, self.tokenizer, some, numbers)
        if not self.count:
            check_records(())
