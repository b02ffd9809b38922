"""How many values are optimised together: as many as fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unified_edit.model.anatomy import Anatomy
from unified_edit.model.devices import free_bytes
from unified_edit.model.prompts import Row

#: Tokens of one step on a CPU, without padding: more do not make products any faster, and what a
#: step hands from block to block leaves the processor's caches.
CPU_TOKENS = 1024
#: The same on other devices, where memory sets the limit as a rule.
TOKENS = 16384
#: The share of a device's free memory that a batch is to take.
SHARE = 0.6


def batches_that_fit(parts: Anatomy, texts: Sequence[Sequence[Row]], layer: int) -> list[list[int]]:
    """Indices of values to be optimised together, of similar length.

    texts: the rows of each. The longest come first: if these fit, so do all.
    """
    tokens = [sum(len(row.ids) - row.subject for row in rows) for rows in texts]
    longest = [max(len(row.ids) - row.subject for row in rows) for rows in texts]
    room, limit = free_bytes(parts.model.device), TOKENS
    if parts.model.device.type == "cpu":
        limit = CPU_TOKENS
    costs = [_bytes(parts, rows, layer) for rows in texts]
    order = sorted(range(len(texts)), key=lambda index: (-longest[index], -tokens[index]))
    # as many batches as are needed, and all of one size
    batches = max(1, math.ceil(sum(tokens) / limit), math.ceil(sum(costs) / (SHARE * room)))
    size = sum(tokens) / batches
    found: list[list[int]] = []
    of_batch = 0
    for index in order:
        if not found or of_batch + tokens[index] / 2 > size:
            found.append([])
            of_batch = 0
        found[-1].append(index)
        of_batch += tokens[index]
    return found


def _bytes(parts: Anatomy, rows: Sequence[Row], layer: int) -> int:
    """About how many bytes the optimisation of one value keeps on the device."""
    weight, above = parts.weight(layer), parts.n_layers - layer - 1
    size = weight.parameter.element_size()
    tokens = sum(len(row.ids) - row.subject for row in rows)
    padded = len(rows) * max(len(row.ids) for row in rows)
    read = sum(len(row.target) for row in rows) + 1
    # of each token and block what goes back through it; keys and values twice, as they are joined
    of_blocks = above * size * (tokens * (16 * weight.d_out + 3 * weight.d_in))
    of_prefixes = 4 * weight.d_out * size * padded * above
    of_head = read * parts.vocabulary * (2 * size + 3 * max(size, 4))
    return of_blocks + of_prefixes + of_head
