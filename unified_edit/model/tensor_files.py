"""Files the library writes, whole or not at all: texts, and safetensors, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unified_edit.errors import UnifiedEditError
from unified_edit.model.fingerprints import tensor_hash


def _checksum(hashes: Mapping[str, str], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(hashes):
        digest.update(f"{name} {hashes[name]}".encode())
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Inside, a new file beside `path` to write into; it takes that name if nothing went wrong.

    Folders are made. Raises OSError where that fails; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all. Raises OSError where that fails."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_json(path: Path) -> Any:
    """What a file of JSON says. Raises OSError if it cannot be read, ValueError if it is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_safetensors(
    path: Path,
    tensors: dict[str, Tensor],
    kind: str,
    description: dict[str, Any],
    error: type[UnifiedEditError],
) -> None:
    """Write tensors with a JSON description and a checksum over both.

    The file appears under its name only when it is complete: it is written beside it first and
    then renamed, which replaces an older one in a single step. `kind` names format and version.

    Raises `error` if it cannot be written; nothing is left behind then.
    """
    text = json.dumps(description, sort_keys=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    hashes = {name: tensor_hash(value) for name, value in contiguous.items()}
    metadata = {"kind": kind, "description": text, "sha256": _checksum(hashes, text)}
    try:
        with written_whole(path) as temporary:
            save_file(contiguous, temporary, metadata=metadata)
    except (OSError, SafetensorError) as problem:  # the latter is what it makes of a full disk
        raise error(
            f"{path} cannot be written: {problem}. Give another place, or make room there"
        ) from problem


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remedy(found: str, kind: str) -> str:
    """What to do about a file of another kind; kinds are names with the number of a format."""
    theirs, ours = (re.split(r"/(\d+)", one) for one in (found, kind))
    if theirs[::2] != ours[::2]:
        return "give another file"
    if int(theirs[1]) > int(ours[1]):
        return "it was written by a newer version of this library: install that one"
    return "it was written by an older version of this library: make it again"


def read_safetensors(
    path: Path, kind: str, error: type[UnifiedEditError]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_safetensors` wrote; returns (tensors, description).

    Raises `error` if the file is missing, truncated, damaged or of another kind.
    """
    tensors, _, description = read_some(path, kind, error, lambda _name: True)
    return tensors, description


def read_some(
    path: Path, kind: str, error: type[UnifiedEditError], wanted: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """As `read_safetensors`, but tensors that are not wanted have a shape only (device "meta").

    All are checked, one at a time. The second part is {name: hash of the tensor}, for `read_one`.
    """
    tensors, hashes = {}, {}
    with _opened(path, error) as handle:
        metadata = handle.metadata() or {}
        for name in handle.keys():  # noqa: SIM118
            held = handle.get_tensor(name)
            # copies: what is handed out may lie in the file itself and change with it
            tensors[name] = held.clone() if wanted(name) else held.to("meta")
            hashes[name] = tensor_hash(tensors[name] if wanted(name) else held)
    found = metadata.get("kind", "nothing")
    if found != kind:
        raise error(f"{path} holds {found!r}, but {kind!r} is needed here; {_remedy(found, kind)}")
    text = metadata.get("description", "")
    if metadata.get("sha256") != _checksum(hashes, text):
        raise error(
            f"{path}: the checksum does not match the contents; the file was changed or damaged "
            "after it was written: make or download it again"
        )
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise error(f"{path}: its description is no JSON object; make or download the file again")
    return tensors, hashes, description


def read_one(path: Path, name: str, known: str, error: type[UnifiedEditError]) -> Tensor:
    """One tensor of a file that was read before, when its hash was `known`; `error` if it is not
    the same any more."""
    with _opened(path, error) as handle:
        tensor = handle.get_tensor(name).clone() if name in handle.keys() else None  # noqa: SIM118
    if tensor is None or tensor_hash(tensor) != known:
        raise error(
            f"{path} does not hold the {name} any more that was in it: the file was replaced or "
            "changed; put it back, or read the new one"
        )
    return tensor


@contextmanager
def _opened(path: Path, error: type[UnifiedEditError]) -> Iterator[Any]:
    if not path.is_file():
        raise error(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as problem:
        raise error(
            f"{path} cannot be read as safetensors ({problem}): it is damaged, truncated or "
            "something else; make or download it again"
        ) from problem
