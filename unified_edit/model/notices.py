"""Licence and notice beside weights that were made from a file of others."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from unified_edit.errors import ModelError
from unified_edit.model.packages import licence_text, package_with
from unified_edit.model.tensor_files import written_whole

#: Names under which a licence or a notice stands beside a model.
_BESIDE = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt")

_NOTICE = """\
The weights in this folder are a copy, in another form, of

    {file} ({quantisation})
    SHA-256 {sha256}
    {where}

unified_edit {library} has changed how the numbers are stored, from blocks of codes to plain
floating-point numbers.
{terms}
"""


def write_notices(folder: Path, path: Path, wanted: Mapping[str, str]) -> None:
    """Write the notice of a copy of `path`, and the licence where there is one, into `folder`.

    The licence is the one that the file's package brings, or what stands beside the file.
    Raises ModelError if they cannot be written.
    """
    known = package_with(wanted["sha256"])
    licence = licence_text(known) if known is not None else None
    try:
        beside = [path.parent / name for name in _BESIDE]
        texts = {one.name: one.read_bytes() for one in beside if one.is_file()}
        if licence:
            texts["LICENSE"] = licence.encode()
        texts["NOTICE.unified_edit" if "NOTICE" in texts else "NOTICE"] = _notice(wanted).encode()
        for name, text in texts.items():
            with written_whole(folder / name) as temporary:
                temporary.write_bytes(text)
    except OSError as problem:
        raise ModelError(
            f"{folder} cannot be written: {problem}. Give another place, or make room there"
        ) from problem


def _notice(wanted: Mapping[str, str]) -> str:
    """From what file the copy was made, whose it is, and under which licence."""
    about = (
        wanted["model"],
        wanted["author"] and f"by {wanted['author']}",
        wanted["package"] and f"of the Python package {wanted['package']}",
    )
    where = ", ".join(part for part in about if part) or "which names no author"
    terms = "The file does not say under which licence the weights are."
    if wanted["licence"]:
        terms = (
            f"The licence of the weights, {wanted['licence']}, holds for this copy and for what is "
            "made from it."
        )
    return _NOTICE.format(**wanted, where=where, terms=terms, library=version("unified_edit"))
