"""Which texts were counted where, so that sums made on several machines add up to one.

Sums add up if no text is in two of them. Shares of one corpus are told apart by their numbers: a
corpus may hold a text twice. All others are told apart by the texts themselves.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from unified_edit.arguments import whole_number
from unified_edit.errors import StatisticsError, brief


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)


@dataclass(frozen=True, eq=False)
class Counted:
    """Which texts are in some statistics.

    texts: eight bytes of the SHA-256 of each one, in order (n,), int64. marks: the same of all
    texts of the corpus up to the first, second, fourth, eighth … group, counted or not; those of
    the same corpus agree as far as both go. shares, of: which of how many shares of it these are.
    """

    texts: Tensor
    marks: Tensor
    shares: tuple[int, ...] = (0,)
    of: int = 1

    @property
    def part(self) -> str | None:
        """Which shares these are, for people; None for all of them."""
        if self.shares == tuple(range(self.of)):
            return None
        return f"{'+'.join(map(str, self.shares))} of 0..{self.of - 1}"

    def of_one_corpus(self, other: Counted) -> bool:
        """Whether both are shares of one corpus, cut in the same way."""
        both = min(len(self.marks), len(other.marks))
        return self.of == other.of and both > 0 and self.marks[:both].equal(other.marks[:both])

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        share = torch.tensor([self.of, *self.shares])
        return {"counted.texts": self.texts, "counted.marks": self.marks, "counted.share": share}

    @classmethod
    def taken_from(cls, tensors: dict[str, Tensor]) -> Counted:
        """What `tensors` gave, from among those of a file; KeyError if it is not there."""
        of, *shares = tensors["counted.share"].tolist()
        texts, marks = tensors["counted.texts"], tensors["counted.marks"]
        return cls(texts, marks, tuple(shares), of)


class Reading:
    """Makes `Counted` while groups of texts go by."""

    def __init__(self) -> None:
        self._corpus = hashlib.sha256()
        self._passed = 0
        self._marks: list[int] = []
        self._texts = array("q")

    def passes(self, group: Sequence[str]) -> None:
        """Note a group of the corpus, whether it is counted or not."""
        for text in group:
            self._corpus.update(text.encode() + b"\0")
        self._passed += 1
        if self._passed & (self._passed - 1) == 0:
            self._marks.append(_number(self._corpus.digest()))

    def counts(self, texts: Sequence[str]) -> None:
        """Note texts that are counted."""
        self._texts.extend(_number(hashlib.sha256(text.encode()).digest()) for text in texts)

    def counted(self, part: tuple[int, int]) -> Counted:
        """What was noted, as share part[0] of part[1]."""
        texts, marks = (torch.tensor(list(one)).long() for one in (self._texts, self._marks))
        return Counted(texts, marks, (part[0],), part[1])


def checked_part(part: object) -> tuple[int, int]:
    """(i, n) with 0 <= i < n; StatisticsError for anything else."""
    if not isinstance(part, Sequence) or isinstance(part, str) or len(part) != 2:
        raise StatisticsError(
            f"part is {brief(part)}; give (i, n), to count share i (0 is the first) of n"
        )
    number = whole_number(part[1], "the number of parts", StatisticsError, least=1)
    index = whole_number(part[0], "the part", StatisticsError, least=0, below=number)
    return index, number


def check_apart(each: Sequence[Counted]) -> None:
    """Raise StatisticsError if a text is in two of these."""
    for (i, one), (j, other) in combinations(enumerate(each), 2):
        if one.of_one_corpus(other):
            if same := sorted(set(one.shares) & set(other.shares)):
                raise StatisticsError(
                    f"statistics number {i} and number {j} count the same share of one corpus "
                    f"({same[0]} of 0..{one.of - 1}): what is counted twice is not added up; "
                    "collect each share once, by part=(i, n)"
                )
        elif twice := int(torch.isin(one.texts, other.texts).sum()):
            raise StatisticsError(
                f"{twice} of the {len(one.texts)} texts in statistics number {i} are in number "
                f"{j} too: what is counted twice is not added up; leave them out of one, or "
                "collect shares of one corpus by part=(i, n)"
            )


def together(each: Sequence[Counted]) -> Counted:
    """What is in the sum of some statistics that are apart."""
    texts = torch.cat([one.texts for one in each])
    if not all(each[0].of_one_corpus(other) for other in each[1:]):
        return Counted(texts, texts[:0])
    shares = tuple(sorted(share for one in each for share in one.shares))
    return Counted(texts, max((one.marks for one in each), key=len), shares, each[0].of)
