"""One progress bar for everything that takes longer than a second."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from tqdm.auto import tqdm

#: Set to 0 to silence all bars: notebooks whose outputs are compared set it.
VARIABLE = "UNIFIED_EDIT_PROGRESS"


Bar: TypeAlias = "tqdm[Any]"


def progress(description: str, total: int | None = None, unit: str = "it") -> Bar:
    """A tqdm bar that shows up after one second and leaves nothing behind.

    Silent when the environment variable ``UNIFIED_EDIT_PROGRESS`` is 0.
    """
    silent = os.environ.get(VARIABLE, "1") == "0"
    return tqdm(desc=description, total=total, unit=unit, delay=1.0, leave=False, disable=silent)
