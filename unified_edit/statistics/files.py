"""Key statistics as files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from unified_edit.arguments import as_path
from unified_edit.errors import StatisticsFileError
from unified_edit.model.tensor_files import read_one, read_some, write_safetensors
from unified_edit.statistics.collect import Source
from unified_edit.statistics.moments import Moment, matrix_of
from unified_edit.statistics.shares import Counted

FORMAT = "unified_edit.key_statistics/3"
#: Its C0 lacks the keys set aside for the check, and it does not say which texts it counts.
OLDER = "unified_edit.key_statistics/2"


_KINDS = ("C0", "fresh", "counted")


class Content(NamedTuple):
    """What a file of key statistics holds; see `KeyStatistics`."""

    source: Source
    moments: Mapping[int, Moment]
    agreement: dict[int, float]
    counted: Counted | None
    fresh: dict[int, Tensor]


def write(path: str | Path, content: Content) -> None:
    """Write a safetensors file, whole or not at all; StatisticsFileError if it cannot be."""
    tensors = {f"C0.{layer}": matrix_of(moment) for layer, moment in content.moments.items()}
    tensors |= {f"fresh.{layer}": keys for layer, keys in content.fresh.items()}
    if content.counted is not None:
        tensors |= content.counted.tensors()
    agreement = {str(layer): value for layer, value in content.agreement.items()}
    meta = {"source": vars(content.source), "agreement": agreement}
    place = as_path(path, "the path of the statistics", StatisticsFileError)
    write_safetensors(place, tensors, FORMAT, meta, StatisticsFileError)


def moment_of(path: str | Path, layer: int) -> Tensor:
    """C0 of one layer of a file; StatisticsError if there is none, or not that layer in it."""
    found = read(path).moments
    if layer not in found:
        raise StatisticsFileError(
            f"{path} holds C0 of layers {sorted(found)} now, and of layer {layer} no more: it was "
            "replaced; put it back, or read the new one"
        )
    return matrix_of(found[layer])


def _tensors(
    place: Path, wanted: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    try:
        return read_some(place, FORMAT, StatisticsFileError, wanted)
    except StatisticsFileError:
        with contextlib.suppress(StatisticsFileError):
            older = read_some(place, OLDER, StatisticsFileError, wanted)
            if not any(name.startswith("counted.") for name in older[0]):
                return older
        raise


def _by_layer(tensors: dict[str, Tensor], kind: str) -> dict[int, Tensor]:
    """The tensors of one kind, by their layers."""
    kinds = {name: name.partition(".") for name in tensors}
    return {int(layer): tensors[name] for name, (of, _, layer) in kinds.items() if of == kind}


def read(path: str | Path, *, lazily: bool = False) -> Content:
    """What `write` wrote, or an older version did.

    lazily: C0 is checked, a layer at a time, and what is handed out reads it again.

    Raises StatisticsFileError if the file is missing, damaged or of another kind.
    """
    place = as_path(path, "the path of the statistics", StatisticsFileError)
    tensors, hashes, meta = _tensors(place, lambda name: not (lazily and name.startswith("C0.")))
    try:
        if other := {name.partition(".")[0] for name in tensors} - set(_KINDS):
            raise ValueError(f"unknown tensors: {sorted(other)}")
        source = Source(**meta["source"])
        agreement = {int(layer): float(value) for layer, value in meta["agreement"].items()}
        moments, fresh = _by_layer(tensors, "C0"), _by_layer(tensors, "fresh")
        counted = Counted.taken_from(tensors) if fresh else None
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise StatisticsFileError(
            f"{path}: the description of the statistics is incomplete ({problem!r}); collect "
            "them again"
        ) from problem
    if set(moments) != set(agreement):
        raise StatisticsFileError(
            f"{path}: it holds C0 of layers {sorted(moments)} but describes layers "
            f"{sorted(agreement)}; collect the statistics again"
        )
    for layer, moment in moments.items():
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            raise StatisticsFileError(
                f"{path}: C0 of layer {layer} has shape {tuple(moment.shape)}, which is not "
                "square; collect the statistics again"
            )
    made: Mapping[int, Moment] = moments
    if lazily:
        made = {
            layer: partial(read_one, place, name, hashes[name], StatisticsFileError)
            for layer, name in ((layer, f"C0.{layer}") for layer in moments)
        }
    return Content(source, made, agreement, counted, fresh)
