"""Sums of k k' over two halves of a text: how they grow, where they lie, what is made of them.

The halves say whether there was enough text: they must agree on keys that are in neither. A sum is
symmetric, so the panels of its upper triangle are all that is computed and kept, and the two
halves together take hardly more than one d_k x d_k matrix. Keys are gathered in a buffer that one
product empties, because a sum is much larger than what a batch adds to it: GPT-J's is 2 GiB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError, StatisticsFileError
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.devices import free_bytes
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.objective.inputs import float64_device

log = logging.getLogger(__name__)

PARTIAL = "unified_edit.key_statistics/3/partial"
#: Keys that are gathered before they are multiplied. A product of so many takes ten times as long
#: as reading and writing the sum that it is added to, or more.
ROWS = 2048
#: A triangle is cut into so many panels: 9/16 of the square is computed then.
PANELS = 8
#: A panel has no fewer rows than this: products of thin matrices are slow.
THINNEST = 128


class Triangle:
    """A float64 sum of products k k' (d x d), of which the panels of the upper triangle are kept.

    Panel number i holds rows start_i to start_i+1, from column start_i on. All lie in `data`.
    """

    def __init__(self, d: int, zeros: Callable[[int], Tensor]) -> None:
        self.d = d
        self.data = zeros(self.entries(d))
        starts, step = self._cuts(d)
        shapes = [(min(step, d - start), d - start) for start in starts]
        pieces = self.data.split([rows * columns for rows, columns in shapes])
        self.panels = {
            start: piece.view(shape)
            for start, piece, shape in zip(starts, pieces, shapes, strict=True)
        }

    @staticmethod
    def _cuts(d: int) -> tuple[range, int]:
        step = max(math.ceil(d / PANELS), THINNEST)
        return range(0, d, step), step

    @classmethod
    def entries(cls, d: int) -> int:
        """How many numbers there are of a matrix (d x d)."""
        starts, step = cls._cuts(d)
        return sum(min(step, d - start) * (d - start) for start in starts)

    def add(self, keys: Tensor, sign: int = 1) -> None:
        """Add the sum of k k' over the rows of `keys` (n x d, float32), whose products are so too.

        The keys may be on another device than the sum.
        """
        largest = max(panel.numel() for panel in self.panels.values())
        room = torch.empty(largest, dtype=keys.dtype, device=keys.device)
        for start, panel in self.panels.items():
            rows = keys[:, start : start + len(panel)]
            block = room[: panel.numel()].view_as(panel)
            torch.mm(rows.T, keys[:, start:], out=block)
            panel.add_(block.to(panel.device), alpha=sign)

    def add_whole(self, matrix: Tensor, weight: float) -> None:
        """Add a symmetric matrix (d x d) so many times."""
        for start, panel in self.panels.items():
            panel.add_(matrix[start : start + len(panel), start:], alpha=weight)

    def diagonal(self) -> Tensor:
        """The diagonal of the sum (d,)."""
        return torch.cat([panel.diagonal() for panel in self.panels.values()])

    def upper(self) -> Tensor:
        """The sum in the upper triangle of a matrix (d x d), whose lower one is of no meaning."""
        into = torch.zeros(self.d, self.d, dtype=self.data.dtype, device=self.data.device)
        for start, panel in self.panels.items():
            into[start : start + len(panel), start:] = panel
        return into

    def full(self, into: Tensor | None = None) -> Tensor:
        """The whole sum (d x d), symmetric to the last bit."""
        if into is None:
            into = torch.empty(self.d, self.d, dtype=self.data.dtype, device=self.data.device)
        for start, panel in self.panels.items():
            stop = start + len(panel)
            into[start:stop, start:] = panel
            into[stop:, start:stop] = panel[:, len(panel) :].T
            square = into[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
        return into


def in_file(folder: Path, count: int) -> Tensor:
    """`count` zeros (float64) in a file of `folder` that goes when they go, or this process does.

    Raises StatisticsError where there is no room for it: before any work, not in the middle.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sums-") as handle:
            reserve = getattr(os, "posix_fallocate", None)
            if reserve is None:
                handle.truncate(8 * count)
            else:
                reserve(handle.fileno(), 0, 8 * count)
            return torch.from_file(handle.name, shared=True, size=count, dtype=torch.float64)
    except OSError as problem:
        raise StatisticsError(
            f"the sums need {8 * count / 2**20:,.0f} MiB in {folder}, which cannot be had: "
            f"{problem}. Give another folder, make room there, or collect fewer layers at a time"
        ) from problem


class LayerSums:
    """The two halves' sums at one layer, and the keys that are not in them yet.

    The buffer is filled with the first half's keys from its beginning and the second's from its
    end; where they meet, both are summed. fresh: keys that are set aside, in neither half.
    """

    def __init__(self, one: NamedWeight, aside: int, folder: Path | None = None) -> None:
        device = one.parameter.device
        self.place = place_for(device, self.needed(one.d_in)) if folder is None else None

        def zeros(count: int) -> Tensor:
            if folder is not None:
                return in_file(folder, count)
            return torch.zeros(count, dtype=torch.float64, device=self.place)

        self.folder = folder
        self.halves = [Triangle(one.d_in, zeros) for _ in range(2)]
        self.buffer = torch.empty(ROWS, one.d_in, device=device)
        self.fresh = torch.zeros(aside, one.d_in, device=device)
        self._ends = [0, ROWS]

    @staticmethod
    def needed(d: int) -> int:
        """Bytes of the sums and the buffer of one layer whose keys have d entries."""
        return 16 * Triangle.entries(d) + 4 * ROWS * d

    def add(self, keys: Tensor, half: int) -> None:
        """Take keys (n x d) for one half."""
        while len(keys):
            front, back = self._ends
            taken, keys = keys[: back - front], keys[back - front :]
            if half == 0:
                self.buffer[front : front + len(taken)] = taken
                self._ends[0] += len(taken)
            else:
                self.buffer[back - len(taken) : back] = taken
                self._ends[1] -= len(taken)
            if self._ends[0] == self._ends[1]:
                self.flush()

    def flush(self) -> None:
        """Sum what is in the buffer."""
        front, back = self._ends
        if front:
            self.halves[0].add(self.buffer[:front])
        if back < ROWS:
            self.halves[1].add(self.buffer[back:])
        self._ends = [0, ROWS]

    def close(self) -> None:
        """Give the buffer back: no more keys come."""
        self.flush()
        self.buffer = self.buffer[:0].clone()

    def total(self, count: int) -> Tensor:
        """C0 (d x d) of all keys, those set aside included; the sums are of no use after."""
        first = self.halves[0]
        first.data.add_(self.halves.pop().data)
        first.add(self.fresh)
        first.data.div_(count)
        if self.folder is None:
            return first.full().cpu()
        return first.full(in_file(self.folder, first.d**2).view(first.d, first.d))


def place_for(device: torch.device, needed: int) -> torch.device:
    """Where sums of so many bytes are kept: beside the model, if there is room and float64."""
    if device.type == "cuda" and needed > free_bytes(device) // 2:
        log.info("little memory is free on %s: sums of a layer are kept on the CPU", device)
        return torch.device("cpu")
    return float64_device(device)


def room() -> int:
    """Bytes of memory that sums may take where nobody said so; GPT-J's six layers take 15 GiB."""
    return max(1, free_bytes("cpu") // 2)


class Sums:
    """Running sums of k k' at all layers of a pass, and what they are of.

    aside: so many keys, the first ones, are in neither half, but in `fresh`. max_memory: bytes;
    sums of layers beyond it lie in files of `folder`.
    """

    def __init__(
        self,
        weights: Sequence[NamedWeight],
        aside: int,
        max_memory: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.aside = aside
        self.layers: dict[int, LayerSums] = {}
        used = 0
        for one in weights:
            used += LayerSums.needed(one.d_in)
            beyond = max_memory is not None and used > max_memory
            self.layers[one.layer] = LayerSums(one, aside, folder if beyond else None)
        self.counts = [0, 0]
        self.fresh = 0
        self.groups = 0
        self.texts = 0
        self.digest = hashlib.sha256()

    @property
    def seen(self) -> int:
        """Tokens taken so far, those set aside included."""
        return sum(self.counts) + self.fresh

    def add(self, keys: dict[int, list[Tensor]]) -> None:
        """Add keys of a batch: {layer: those to set aside, of the first half, of the second}."""
        for layer, (fresh, *halves) in keys.items():
            one = self.layers[layer]
            one.fresh[self.fresh : self.fresh + len(fresh)] = fresh
            for half, rows in enumerate(halves):
                one.add(rows, half)
        fresh, *halves = next(iter(keys.values()))
        self.fresh += len(fresh)
        self.counts = [count + len(rows) for count, rows in zip(self.counts, halves, strict=True)]

    def settle(self) -> None:
        """Sum all that was taken; raises StatisticsError if any of it was not finite.

        Once a group: asking a GPU for a number waits for it.
        """
        for layer, one in self.layers.items():
            one.flush()
            parts = [half.diagonal() for half in one.halves]
            # first over, then wider: where keys come from there may be no float64
            parts.append(one.fresh.sum()[None].to(parts[0].device).double())
            if not torch.isfinite(torch.cat(parts)).all():
                raise StatisticsError(
                    f"keys at layer {layer} are not finite; the model's weights hold NaN or "
                    "its type overflows: load it again, or in float32 or bfloat16"
                )

    def save(self, path: Path, description: dict[str, Any]) -> None:
        """Write the sums and what they are of; where that fails, only a warning is given."""
        tensors: dict[str, Tensor] = {}
        for layer, one in self.layers.items():
            tensors |= {f"{half}.{layer}": sums.data for half, sums in enumerate(one.halves)}
            tensors[f"fresh.{layer}"] = one.fresh
        state = {
            "counts": self.counts,
            "fresh": self.fresh,
            "groups": self.groups,
            "texts": self.texts,
            "corpus": self.digest.hexdigest(),
        }
        try:
            description = {**description, "state": state}
            write_safetensors(path, tensors, PARTIAL, description, StatisticsFileError)
        except StatisticsFileError as problem:  # the run goes on; only an interruption would cost
            log.warning("no checkpoint of the key statistics: %s", problem)

    def restore(self, path: Path, description: dict[str, Any]) -> dict[str, Any]:
        """Take over what `save` wrote; return its state. Raises StatisticsError on a mismatch."""
        tensors, meta = read_safetensors(path, PARTIAL, StatisticsFileError)
        state = meta.pop("state", None)
        if meta != json.loads(json.dumps(description)) or state is None:
            raise StatisticsError(
                f"the checkpoint {path} belongs to another run ({meta} instead of "
                f"{description}); delete it or give another path"
            )
        for layer, one in self.layers.items():
            for half, sums in enumerate(one.halves):
                sums.data.copy_(tensors.pop(f"{half}.{layer}"))
            one.fresh.copy_(tensors.pop(f"fresh.{layer}"))
        self.counts, self.fresh = list(state["counts"]), int(state["fresh"])
        self.groups = int(state["groups"])
        return state
