"""One progress bar for everything that takes longer than a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

#: Set to 0 to silence all bars: notebooks whose outputs are compared set it.
VARIABLE = "UNIFIED_EDIT_PROGRESS"


Bar: TypeAlias = "tqdm[Any]"


class Progress(Protocol):
    """What is needed of a progress bar."""

    def update(self, n: float | None = 1) -> object: ...  # noqa: D102


def progress(description: str, total: int | None = None, unit: str = "it") -> Bar:
    """A tqdm bar that shows up after one second and leaves nothing behind.

    Silent when the environment variable ``UNIFIED_EDIT_PROGRESS`` is 0.
    """
    return tqdm(desc=description, total=total, unit=unit, delay=1.0, leave=False, disable=silent())


def silent() -> bool:
    """Whether the environment asks for no bars."""
    return os.environ.get(VARIABLE, "1") == "0"


@contextmanager
def loading() -> Iterator[None]:
    """transformers shows bars of its own while it loads: none of them where ours are silent."""
    shown = transformers_logging.is_progress_bar_enabled()
    if silent() and shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if silent() and shown:
            transformers_logging.enable_progress_bar()
