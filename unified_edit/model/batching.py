"""Rows of tokens as batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Tokens (with padding) of one batched forward; bounds memory, does not change results.
BATCH_TOKENS = 8192
#: The same for forwards without gradients on a CPU: what such a batch passes from layer to layer
#: stays in its caches, and rows of nearly one length need little padding. On a model of 135 M
#: parameters questions cost .37 of what they cost in batches of `BATCH_TOKENS`.
CPU_BATCH_TOKENS = 512


def forward_tokens(device: torch.device) -> int:
    """Tokens (with padding) of one forward without gradients, where they are fewest seconds."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids, attention mask and position ids (each rows x longest) of left-padded rows.

    Position ids are always passed: GPT-2 counts positions from the left edge of the batch
    otherwise, and a padded row then gets other logits than the same row alone.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        if row:
            ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in batch.items()}


def right_padded(
    rows: Sequence[tuple[Sequence[int], int]], device: torch.device
) -> dict[str, Tensor]:
    """Inputs of the rest of each row, from a token on: what attention looks back on has no gap.

    A window of attention counts places, with padding between them, not positions.
    """
    width = max(len(row) - start for row, start in rows)
    rests = [[*row[start:], *[0] * (width - len(row) + start)] for row, start in rows]
    ends = torch.tensor([len(row) for row, _ in rows])[:, None]
    places = torch.tensor([start for _, start in rows])[:, None] + torch.arange(width)
    batch = {
        "input_ids": torch.tensor(rests),
        "attention_mask": (places < ends).long(),
        # padding repeats the last one, so that none beyond the model's limit is asked for
        "position_ids": torch.minimum(places, ends - 1),
    }
    return {name: value.to(device) for name, value in batch.items()}


def batches_by_length(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Yield lists of indices of similar length, each with at most `tokens` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
