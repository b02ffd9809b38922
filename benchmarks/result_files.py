"""How results are written, so that a person can read them and a change can be seen."""

from __future__ import annotations

import json
import re
from typing import Any


def in_lines(result: dict[str, Any]) -> str:
    """JSON with the numbers of a list in one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"
