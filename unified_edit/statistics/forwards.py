"""Groups of texts through the model: batches of one length, and which of their keys go where.

What becomes of a token does not depend on how large batches are: texts of a group are taken from
the longest to the shortest, and go to the two halves of the sums in turn, so that these are alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.batching import batches_by_length, forward_tokens, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, per_token
from unified_edit.statistics.sums import Sums

log = logging.getLogger(__name__)

Weigh = Callable[[Anatomy, NamedWeight, Tensor], Tensor]


def batch_size(parts: Anatomy, weights: Sequence[NamedWeight]) -> int:
    """Tokens of one forward where that is fewest seconds, and its tensors have room on a GPU."""
    device = parts.model.device
    tokens = forward_tokens(device)
    if device.type == "cuda":
        # at most: what the MLP makes of a block, three or four tensors, and the keys of all layers
        width = max(one.d_in for one in weights) * 4 + sum(one.d_in for one in weights)
        free = torch.cuda.mem_get_info(device)[0]
        while tokens > 512 and 4 * tokens * width * parts.model.dtype.itemsize > free:
            tokens //= 2
    return tokens


def places(
    lengths: Sequence[int], first: int, skip_start: bool, aside: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of counted tokens in a left-padded batch, row by row: aside, and for each half.

    lengths: of its rows, of which the first has number `first`. aside: so many are set aside.
    """
    width = max(lengths)
    begin = width - torch.tensor(lengths)[:, None] + int(skip_start)
    counted = (torch.arange(width) >= begin).flatten().nonzero()[:, 0]
    half = (counted // width + first) % 2
    fresh, counted, half = counted[:aside], counted[aside:], half[aside:]
    return fresh, counted[half == 0], counted[half == 1]


def add_group(
    parts: Anatomy,
    weights: Sequence[NamedWeight],
    rows: Sequence[list[int]],
    sums: Sums,
    *,
    number: int,
    batch_tokens: int,
    skip_start: bool,
    weigh: Weigh,
) -> None:
    """Add the keys of the group with this number to the sums; those set aside are of the first."""
    run = _Group(parts, weights, sums, sums.aside if number == 0 else 0, skip_start, weigh)
    first = number
    with torch.no_grad():
        for batch in batches_by_length([len(row) for row in rows], batch_tokens):
            run.add([rows[i] for i in batch], first)
            first += len(batch)
    sums.settle()


@dataclass(frozen=True)
class _Group:
    """A group of texts on its way into the sums; `aside` of its keys are set aside."""

    parts: Anatomy
    weights: Sequence[NamedWeight]
    sums: Sums
    aside: int
    skip_start: bool
    weigh: Weigh

    def add(self, rows: list[list[int]], first: int) -> None:
        """Add the keys of one batch; one that memory does not suffice for is run in two."""
        aside = max(self.aside - self.sums.fresh, 0)
        chosen = places([len(row) for row in rows], first, self.skip_start, aside)
        try:
            keys = self._keys(rows, chosen)
        except torch.OutOfMemoryError as problem:
            if len(rows) == 1:
                raise StatisticsError(
                    f"there is not enough memory for one text of {len(rows[0])} tokens; give a "
                    f"smaller max_tokens, or free some: {problem}"
                ) from problem
            keys = None
        if keys is None:  # outside of the handler, which would keep what the forward had made
            log.info("out of memory with %d texts at a time; half of them are tried", len(rows))
            torch.cuda.empty_cache()
            middle = len(rows) // 2
            self.add(rows[:middle], first)
            self.add(rows[middle:], first + middle)
        else:
            self.sums.add(keys)

    def _keys(self, rows: list[list[int]], chosen: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Keys at the chosen places, for each layer; the forward ends at the deepest of them."""
        model = self.parts.model
        inputs = left_padded(rows, model.device)
        shape = inputs["input_ids"].shape
        with captured({one.layer: (one.module, "input") for one in self.weights}) as seen:
            model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        keys = {}
        for one in self.weights:
            found = per_token(model, seen.pop(one.layer, None), shape, one.module, "input")
            taken = [found.flatten(0, 1)[some.to(found.device)] for some in chosen]
            keys[one.layer] = [
                self.weigh(self.parts, one, some) if len(some) else some for some in taken
            ]
        return keys
