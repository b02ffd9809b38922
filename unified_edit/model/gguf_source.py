"""Whether what is asked for is a GGUF file, and which: a path, one in a folder or a package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from unified_edit.errors import ModelError, brief
from unified_edit.model.fingerprints import sha256_of
from unified_edit.model.gguf_header import is_gguf
from unified_edit.model.loading_report import said
from unified_edit.model.packages import PACKAGED, check_file, packaged_file


@dataclass(frozen=True)
class Source:
    """A GGUF file: where it is, what its model is called, and the revision if it is of the Hub."""

    path: Path
    sha256: str
    name: str
    revision: str | None = None


def gguf_files(folder: Path) -> list[str]:
    """Names of the GGUF files in a folder."""
    return sorted(one.name for one in folder.glob("*.gguf") if one.is_file())


def gguf_source(name: str, gguf_file: str | None, revision: str | None) -> Source | None:
    """The GGUF file that is asked for; None if it is none.

    Raises ModelError if there is no such file, or if the package of a packaged model is not there
    or holds another one.
    """
    if name in PACKAGED:
        if gguf_file is not None:
            raise ModelError(
                f"{name!r} is always one file, so gguf_file={brief(gguf_file)} has no meaning; "
                f"leave it out, or give a folder (./{name})"
            )
        path = packaged_file(name)
        sha256 = sha256_of(path)
        check_file(name, sha256)
        return Source(path, sha256, name)
    path = Path(name)
    if gguf_file is None:
        if path.suffix.lower() != ".gguf" and not is_gguf(path):
            return None
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise ModelError(
                f"{name!r} could not be loaded: there is {what} of this name; give the path of a "
                "GGUF file, or a folder with gguf_file='...'"
            )
        return Source(path, sha256_of(path), name)
    if not isinstance(gguf_file, str) or not gguf_file:
        raise ModelError(f"gguf_file is {brief(gguf_file)}; give the name of a file in {name!r}")
    if path.is_file():
        raise ModelError(f"{name!r} is a file itself; leave out gguf_file, or give its folder")
    if not path.is_dir():
        return _of_the_hub(name, gguf_file, revision)
    if not (path / gguf_file).is_file():
        there = ", ".join(gguf_files(path)) or "no GGUF file at all"
        raise ModelError(f"the folder {name!r} has no file {gguf_file!r}; it has {there}")
    found = path / gguf_file
    return Source(found, sha256_of(found), str(found))


def _of_the_hub(name: str, gguf_file: str, revision: str | None) -> Source:
    """A GGUF file of a repository, with the revision that it was found at."""
    try:
        path = Path(hf_hub_download(name, gguf_file, revision=revision))
    except Exception as problem:  # what a hub, a network or a disk may say
        raise ModelError(
            f"{gguf_file!r} of {name!r} could not be loaded: {said(problem)}. Give a folder that "
            "has it, or a name on the Hugging Face Hub (which needs the network the first time)"
        ) from problem
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
    return Source(path, sha256_of(path), name, found[1] if found else revision)
