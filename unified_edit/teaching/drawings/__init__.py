"""Line drawings of the book: each is a function that returns a `Drawing`, made by code alone."""

from collections.abc import Callable

from unified_edit.teaching.drawings.geometry import key_to_value, whitened_keys
from unified_edit.teaching.drawings.moving import drawing_slider
from unified_edit.teaching.drawings.network import three_runs, transformer
from unified_edit.teaching.drawings.opening import story
from unified_edit.teaching.drawings.pencil import Drawing
from unified_edit.teaching.drawings.schemes import spread, two_by_two

#: All drawings by the names that the directive ``{drawing}`` of the book's pages knows.
DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "story": story,
    "transformer": transformer,
    "three_runs": three_runs,
    "key_to_value": key_to_value,
    "whitened_keys": whitened_keys,
    "two_by_two": two_by_two,
    "spread": spread,
}

__all__ = [
    "story",
    "transformer",
    "three_runs",
    "key_to_value",
    "whitened_keys",
    "two_by_two",
    "spread",
    "drawing_slider",
    "Drawing",
    "DRAWINGS",
]
