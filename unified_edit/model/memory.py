"""What is made from a model and kept in memory: up to so many bytes, the least used go first."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from transformers import PreTrainedModel

#: Bytes kept for one model: two factors of C0 at the size of GPT-J, a hundred at that of GPT-2.
BYTES = 4 * 2**30


class Memory:
    """Things by key, each with its size; `limit` is the number of bytes that may be kept.

    What is larger than the limit by itself is not kept at all.
    """

    def __init__(self, limit: int = BYTES) -> None:
        self.limit = limit
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes kept now."""
        return sum(size for _, size in self._kept.values())

    def get(self, key: Hashable) -> Any:
        """What is kept under `key`, now the most recently used; None where there is nothing."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep `value`, of so many bytes, and drop what was used least until there is room."""
        self._kept.pop(key, None)
        if size > self.limit:
            return
        self._kept[key] = (value, size)
        while self.size > self.limit:
            self._kept.popitem(last=False)

    def drop(self, key: Hashable) -> None:
        """Let go of what is kept under `key`, if anything is."""
        self._kept.pop(key, None)

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()


_MEMORIES: weakref.WeakKeyDictionary[PreTrainedModel, Memory] = weakref.WeakKeyDictionary()


def memory_of(model: PreTrainedModel) -> Memory:
    """The memory of `model`; it goes when the model goes, and does not keep it."""
    return _MEMORIES.setdefault(model, Memory())
