"""What a GGUF file says of itself before its weights: read, and held against the file's size.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Strings of a vocabulary are
passed over, so that this takes a fraction of a second.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unified_edit.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
#: Type of a value -> how `struct` writes it.
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands: its shape as torch has it, the number of its type, its offset."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file, and where its tensors are.

    metadata: values by key; of an array, how many entries it has. start: where the data begin.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    start: int

    @property
    def architecture(self) -> str:
        """What the file calls the family of its model."""
        return str(self.metadata.get("general.architecture", ""))

    def quantisation(self) -> str:
        """Name of the file's quantisation; without one, of the type that most weights have."""
        import gguf

        try:
            kind = gguf.LlamaFileType(self.metadata["general.file_type"])
        except (KeyError, ValueError):
            weights: Counter[int] = Counter()
            for one in self.tensors.values():
                weights[one.kind] += math.prod(one.shape)
            return str(gguf.GGMLQuantizationType(weights.most_common(1)[0][0]).name)
        return str(kind.name).removeprefix("MOSTLY_").removeprefix("ALL_")

    def check_whole(self, path: Path) -> None:
        """Raise ModelError unless every tensor lies inside the file, in a type that is known."""
        import gguf

        size = path.stat().st_size
        for name, one in self.tensors.items():
            try:
                block, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(one.kind)]
            except (KeyError, ValueError) as problem:
                raise ModelError(
                    f"{name} of {path} has type {one.kind}, which this version of the package gguf "
                    f"does not know; install a newer one, or take another quantisation"
                ) from problem
            end = self.start + one.offset + math.prod(one.shape) // block * length
            if end > size:
                raise _truncated(path, f"{name} should end at byte {end}, but it has only {size}")


def is_gguf(path: Path) -> bool:
    """Whether there is a file of this name that begins as a GGUF file does."""
    try:
        with path.open("rb") as handle:
            return handle.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises ModelError if it cannot be read, is no GGUF file, or ends too early.
    """
    try:
        with path.open("rb") as handle:
            return _Reader(handle, path).header()
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror or problem}") from problem


def _truncated(path: Path, where: str) -> ModelError:
    return ModelError(f"{path} is truncated or damaged: {where}. Download the file again")


class _Reader:
    """Values of a GGUF file, one behind another."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self.handle, self.path = handle, path
        self.size = path.stat().st_size

    def header(self) -> Header:
        if self.handle.read(len(MAGIC)) != MAGIC:
            what = "it is empty" if not self.size else "it does not begin with the letters GGUF"
            raise ModelError(
                f"{self.path} is no GGUF file: {what}. Download the file again, or give the folder "
                "of a model in another format"
            )
        (version,) = self.take("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            what = "is written for big-endian machines" if swapped else f"has version {version}"
            raise ModelError(
                f"{self.path} {what}; only little-endian GGUF of versions 2 and 3 can be read. "
                "Convert or download it again"
            )
        tensors, values = self.take("QQ")
        metadata = {self.text(): self.value() for _ in range(self.plausible(values))}
        found = {self.text(): self.tensor() for _ in range(self.plausible(tensors))}
        if "general.architecture" not in metadata or not found:
            raise ModelError(
                f"{self.path} holds {len(found)} tensors and names "
                f"{'an' if 'general.architecture' in metadata else 'no'} architecture: it is no "
                "whole model. Download the file again"
            )
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _truncated(self.path, f"its alignment is {alignment!r}")
        start = -(-self.handle.tell() // alignment) * alignment
        return Header(metadata, found, start)

    def plausible(self, count: int) -> int:
        """`count`, unless the file is too short for so many things."""
        if count > self.size:
            raise _truncated(self.path, f"it announces {count} entries in {self.size} bytes")
        return count

    def take(self, form: str) -> tuple[Any, ...]:
        """Numbers from here on."""
        form = f"<{form}"
        data = self.handle.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise _truncated(self.path, f"it ends within its header, after {self.size} bytes")
        return struct.unpack(form, data)

    def skip(self, count: int) -> None:
        if self.handle.tell() + count > self.size:
            raise _truncated(self.path, f"it ends within its header, after {self.size} bytes")
        self.handle.seek(count, 1)

    def text(self) -> str:
        (length,) = self.take("Q")
        return b"".join(self.take(f"{self.plausible(length)}s")).decode("utf-8", "replace")

    def value(self) -> Any:
        (kind,) = self.take("I")
        if kind in _PLAIN:
            return self.take(_PLAIN[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        raise _truncated(self.path, f"there is no type {kind} of values")

    def array(self) -> int:
        """How many entries an array has; they are passed over."""
        kind, count = self.take("IQ")
        if kind in _PLAIN:
            self.skip(self.plausible(count) * struct.calcsize(f"<{_PLAIN[kind]}"))
        elif kind == _STRING:
            for _ in range(self.plausible(count)):
                self.skip(self.take("Q")[0])
        elif kind == _ARRAY:
            for _ in range(self.plausible(count)):
                self.array()
        else:
            raise _truncated(self.path, f"there is no type {kind} of entries")
        return int(count)

    def tensor(self) -> Stored:
        (axes,) = self.take("I")
        if axes > 8:
            raise _truncated(self.path, f"a tensor has {axes} axes")
        shape = self.take(f"{axes}Q")
        kind, offset = self.take("IQ")
        return Stored(tuple(reversed(shape)), kind, offset)
