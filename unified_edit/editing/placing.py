"""What stands where in the prompts of some values: counted on the CPU, before anything is run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_edit.model.prompts import Row


@dataclass(frozen=True)
class Placing:
    """The rows of some values, each cut in two just before its subject's last token; on the CPU.

    A row is one prompt: the prefix is what stands before the cut and the suffix what stands behind
    it. Nothing stands behind the last token that is read: of a KL prompt there is only the subject.

    owner: (rows) the value that the row belongs to.
    suffix: (rows x longest suffix) ids, and zeros behind them.
    lengths: (rows) tokens of the suffix.
    mask: (rows x (longest prefix + longest suffix)) one where there is a token; prefixes end, and
        suffixes begin, together.
    positions: (rows x longest suffix).
    bare: the rows of bare prompts with a target.
    subject: (values) the row of the KL prompt.
    target_row, target_place, target_id: (targets) of each token of a target its row, the place in
        the suffix whose logits predict it, and its id.
    target_weight: (targets) 1 / (tokens of the target * prompts of the value).
    target_watched: (targets) whether the prompt has a prefix, or none has.
    """

    owner: Tensor
    suffix: Tensor
    lengths: Tensor
    mask: Tensor
    positions: Tensor
    bare: Tensor
    subject: Tensor
    target_row: Tensor
    target_place: Tensor
    target_id: Tensor
    target_weight: Tensor
    target_watched: Tensor

    @property
    def width(self) -> int:
        """Tokens of the longest suffix."""
        return self.suffix.shape[1]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Row]], contexts: int) -> Placing:
        """The rows of each value: `contexts` for each fact, the bare one first; the KL row last."""
        flat = [row for of_value in rows for row in of_value]
        owner = [index for index, of_value in enumerate(rows) for _ in of_value]
        suffixes = [
            row.ids[row.subject :] if row.target else row.ids[row.subject :][:1] for row in flat
        ]
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        starts = torch.tensor([row.subject for row in flat])
        width, before = int(lengths.max()), int(starts.max())
        ids = [[*suffix, *[0] * (width - len(suffix))] for suffix in suffixes]
        columns = torch.arange(width)
        # padding repeats the last position, so that none beyond the model's limit is asked for
        positions = starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)
        mask = [torch.arange(before) >= before - starts[:, None], columns < lengths[:, None]]
        target_row, target_place, target_id, target_weight = [], [], [], []
        for index, row in enumerate(flat):
            prompts = len(rows[owner[index]]) - 1
            for place, token in enumerate(row.target):
                target_row.append(index)
                target_place.append(len(suffixes[index]) - len(row.target) + place)
                target_id.append(token)
                target_weight.append(1.0 / (len(row.target) * prompts))
        lasts = [end - 1 for end in itertools.accumulate(map(len, rows))]
        bare = [
            index
            for last, of_value in zip(lasts, rows, strict=True)
            for index in range(last + 1 - len(of_value), last, contexts)
        ]
        unprefixed = set(bare) if contexts > 1 else set()
        return cls(
            owner=torch.tensor(owner),
            suffix=torch.tensor(ids),
            lengths=lengths,
            mask=torch.cat(mask, dim=1).long(),
            positions=positions,
            bare=torch.tensor(bare),
            subject=torch.tensor(lasts),
            target_row=torch.tensor(target_row),
            target_place=torch.tensor(target_place),
            target_id=torch.tensor(target_id),
            target_weight=torch.tensor(target_weight, dtype=torch.float64),
            target_watched=torch.tensor([row not in unprefixed for row in target_row]),
        )

    def only(self, kept: Sequence[int]) -> tuple[Placing, Tensor, Tensor]:
        """The rows of the values with index in `kept`; which rows and which tokens these are."""
        new_value = _numbered(torch.tensor(kept), len(self.subject))
        rows = (new_value[self.owner] >= 0).nonzero().squeeze(1)
        new_row = _numbered(rows, len(self.owner))
        targets = (new_row[self.target_row] >= 0).nonzero().squeeze(1)
        of_tokens = torch.repeat_interleave(torch.arange(len(self.owner)), self.lengths)
        lengths = self.lengths[rows]
        width, before = int(lengths.max()), self.mask.shape[1] - self.width
        bare = new_row[self.bare]
        placing = Placing(
            owner=new_value[self.owner[rows]],
            suffix=self.suffix[rows, :width],
            lengths=lengths,
            mask=self.mask[rows, : before + width],
            positions=self.positions[rows, :width],
            bare=bare[bare >= 0],
            subject=new_row[self.subject[list(kept)]],
            target_row=new_row[self.target_row[targets]],
            target_place=self.target_place[targets],
            target_id=self.target_id[targets],
            target_weight=self.target_weight[targets],
            target_watched=self.target_watched[targets],
        )
        return placing, rows, (new_row[of_tokens] >= 0).nonzero().squeeze(1)

    @property
    def first(self) -> Tensor:
        """(rows) The place of each row's first suffix token in the list of all their tokens."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def places(self) -> Tensor:
        """(tokens) Row * width + column of each token of that list."""
        return (torch.arange(self.width) < self.lengths[:, None]).flatten().nonzero().squeeze(1)

    @property
    def read(self) -> Tensor:
        """(targets + values) The places in the list at which a prediction is needed."""
        targets = self.first[self.target_row] + self.target_place
        return torch.cat([targets, self.first[self.subject]])

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """The targets of each value and what each counts: (values x most targets), twice.

        A value with fewer has its first one again, which counts nothing then.
        """
        counts = torch.bincount(self.owner[self.target_row], minlength=len(self.subject))
        first, column = counts.cumsum(0) - counts, torch.arange(int(counts.max()))
        there = column < counts[:, None]
        slots = first[:, None] + torch.where(there, column, 0)
        return slots, torch.where(there, self.target_weight[slots], 0.0)


def _numbered(kept: Tensor, count: int) -> Tensor:
    """For each of `count` things its place among those `kept`, -1 where it is not one of them."""
    found = torch.full((count,), -1)
    found[kept] = torch.arange(len(kept))
    return found
