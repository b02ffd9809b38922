"""Files that cannot be read or written: a clear error, and nothing half done."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_refusals import ONE, TOWER, essential, raising, refused, same_content
from safetensors import SafetensorError
from safetensors.torch import save_file

from unified_edit.editing import Edit, Editor, edit
from unified_edit.editing.edit_files import FORMAT as EDIT_FORMAT
from unified_edit.errors import EditError, EditFileError, StatisticsFileError
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.statistics import KeyStatistics
from unified_edit.statistics.files import FORMAT as STATISTICS_FORMAT

# --- files that are read ---


FORMATS = {KeyStatistics.load: STATISTICS_FORMAT, Edit.load: EDIT_FORMAT}


def rejected(load: Callable[[Path], Any], path: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        load(path)
    assert caught.type is error
    essential(str(caught.value), (str(path), *words))


def test_a_file_that_is_not_there(stored, tmp_path) -> None:
    _, load, error = stored
    rejected(load, tmp_path / "none.safetensors", error, "no such file")
    rejected(load, tmp_path, error, "no such file")
    with pytest.raises(error, match="no such file"):
        load(str(tmp_path / "none.safetensors"))


def test_a_truncated_file(stored) -> None:
    path, load, error = stored
    whole = path.read_bytes()
    for kept in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:kept])
        rejected(load, path, error, "damaged, truncated", "again")
    path.write_bytes(whole + b"\0")
    rejected(load, path, error, "damaged", "again")


def test_one_changed_byte_anywhere(stored) -> None:
    path, load, error = stored
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # every byte of the beginning, and some of everything else
    places = {*range(64), *range(64, header, 61), *range(header, len(whole), len(whole) // 40)}
    for place in sorted(places):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        rejected(load, path, error, "again" if place >= header else "")
    path.write_bytes(whole)
    load(path)


def test_files_of_other_kinds(stored, statistics_file, ready_made, tmp_path) -> None:
    path, load, error = stored
    other = ready_made if load == KeyStatistics.load else statistics_file
    rejected(load, other, error, "needed here", "another file")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3, 3)}, foreign)
    rejected(load, foreign, error, "nothing", "another file")
    pickled = tmp_path / "pickled.pt"
    torch.save({"weight": torch.zeros(3, 3)}, pickled)
    rejected(load, pickled, error, "cannot be read as safetensors")
    text = tmp_path / "facts.json"
    text.write_text(json.dumps([{"prompt": "{} is in", "subject": "Rome", "target_new": "Oslo"}]))
    rejected(load, text, error, "cannot be read as safetensors")


def test_a_file_of_a_later_format(stored) -> None:
    path, load, error = stored
    kind = FORMATS[load]
    tensors, description = read_safetensors(path, kind, error)
    write_safetensors(path, tensors, kind[:-1] + "9", description, error)
    rejected(load, path, error, kind[:-1] + "9", kind, "newer version", "install that one")


def test_a_file_of_the_first_format(stored) -> None:
    """What version 0.1 wrote: it holds no keys, and knows weights by their layers only."""
    path, load, error = stored
    kind = FORMATS[load]
    tensors, description = read_safetensors(path, kind, error)
    write_safetensors(path, tensors, kind[:-1] + "1", description, error)
    rejected(
        load,
        path,
        error,
        f"holds '{kind[:-1]}1'",
        f"'{kind}' is needed here",
        "older version",
        "make it again",
    )


def without(description: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy without the field found by going down `names`."""
    copied = json.loads(json.dumps(description))
    inside = copied
    for name in names[:-1]:
        inside = inside[name]
    del inside[names[-1]]
    return copied


def test_statistics_whose_description_is_malformed(statistics_file) -> None:
    tensors, good = read_safetensors(statistics_file, STATISTICS_FORMAT, StatisticsFileError)

    def load_with(description: Any, tensors: dict[str, Any] = tensors) -> None:
        write_safetensors(
            statistics_file, tensors, STATISTICS_FORMAT, description, StatisticsFileError
        )
        rejected(KeyStatistics.load, statistics_file, StatisticsFileError, "again")

    for description in (
        {}, [], "text", None, 5,
        without(good, "source"),
        without(good, "agreement"),
        without(good, "source", "fingerprint"),
        without(good, "agreement", "1"),
        {**good, "source": {**good["source"], "unknown": 1}},
        {**good, "source": "text"},
        {**good, "agreement": []},
        {**good, "agreement": {"one": 0.1}},
    ):  # fmt: skip
        load_with(description)
    load_with(good, {})
    load_with(good, {**tensors, "other": torch.zeros(2)})
    load_with(good, {**tensors, "C0.1": tensors["C0.1"][:40]})
    load_with(good, {**tensors, "C0.1": tensors["C0.1"][0]})


NAME = "transformer.h.1.mlp.c_proj.weight"


def test_edits_whose_description_is_malformed(edit_file) -> None:
    path = edit_file
    tensors, good = read_safetensors(path, EDIT_FORMAT, EditFileError)

    def load_with(description: Any, tensors: dict[str, Any] = tensors) -> None:
        write_safetensors(path, tensors, EDIT_FORMAT, description, EditFileError)
        rejected(Edit.load, path, EditFileError, "again")

    diagnosis = good["diagnosis"]
    for description in (
        {}, [], "text", None, 5,
        *(without(good, name) for name in good),
        without(good, "method", "name"),
        without(good, "method", "contexts"),
        without(good, "provenance", "weights", NAME),
        without(good, "provenance", "weights", NAME, "layer"),
        without(good, "provenance", "weights", NAME, "before"),
        without(good, "provenance", "weights", NAME, "after"),
        without(good, "provenance", "fingerprint"),
        without(good, "diagnosis", NAME, "rank"),
        {**good, "facts": []},
        {**good, "facts": good["facts"][:1]},
        {**good, "facts": [{"prompt": "no subject", "subject": "x", "target_new": "y"}]},
        {**good, "method": {**good["method"], "ridge": -1.0}},
        {**good, "method": {**good["method"], "contexts": []}},
        {**good, "diagnosis": {}},
        {**good, "diagnosis": []},
        {**good, "diagnosis": {NAME.replace("1", "2"): diagnosis[NAME]}},
        {**good, "diagnosis": {"one": diagnosis[NAME]}},
        {**good, "provenance": []},
        {**good, "outcomes": [5]},
        {**good, "warnings": None},
    ):  # fmt: skip
        load_with(description)
    load_with(good, {})
    keys, left, right = (f"{what}.{NAME}" for what in ("keys", "left", "right"))
    assert set(tensors) == {keys, left, right}
    load_with(good, {name: value for name, value in tensors.items() if name != keys})
    load_with(good, {name: value for name, value in tensors.items() if name != right})
    load_with(good, {**tensors, keys: tensors[keys][:-1]})
    load_with(good, {**tensors, keys: tensors[keys][:, :-1]})
    load_with(good, {**tensors, left: tensors[left][:, :-1]})
    load_with(good, {**tensors, left: tensors[left].flatten()})
    load_with(good, {**tensors, right: tensors[right] * float("nan")})


def test_a_loaded_thing_does_not_follow_its_file(stored, tmp_path) -> None:
    """Tensors of safetensors may lie in the file itself; the library's do not."""
    path, load, _ = stored
    thing = load(path)
    copy = tmp_path / "kept.safetensors"
    thing.save(copy)
    with path.open("r+b") as file:  # the same file, not a new one under its name
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    again = tmp_path / "again.safetensors"
    thing.save(again)
    assert same_content(again, copy)


def test_an_edit_whose_matrices_were_exchanged(tiny, edit_file) -> None:
    """A file that is whole and well-formed, but does not do what it says."""
    tensors, description = read_safetensors(edit_file, EDIT_FORMAT, EditFileError)
    left = tensors[f"left.{NAME}"]

    def written(changed: torch.Tensor) -> Edit:
        other = {**tensors, f"left.{NAME}": changed}
        write_safetensors(edit_file, other, EDIT_FORMAT, description, EditFileError)
        return Edit.load(edit_file)

    with refused(tiny, EditFileError, "layer 1", "other weights", "Make the edit again"):
        written(left * 1.5).apply(tiny)
    with refused(tiny, EditFileError, "layer 1", "Make the edit again"):
        written(torch.cat([left, left])).apply(tiny)


# --- files that cannot be written ---

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def partly_written(tensors: Any, path: Any, **_: Any) -> None:
    Path(path).write_bytes(b"half a fi")
    raise FULL


def partly_written_natively(tensors: Any, path: Any, **_: Any) -> None:
    """safetensors reports a full disk as an error of its own."""
    Path(path).write_bytes(b"half a fi")
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


#: Where the library writes its own files.
SAVE_FILE = "unified_edit.model.tensor_files.save_file"
WRITE_FAILURES = {
    "os.replace": lambda patch: patch.setattr("os.replace", raising(FULL, 1, os.replace)),
    "save_file": lambda patch: patch.setattr(SAVE_FILE, partly_written),
    "safetensors": lambda patch: patch.setattr(SAVE_FILE, partly_written_natively),
}


@pytest.mark.parametrize("broken", WRITE_FAILURES)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_file_that_cannot_be_written(stored, tmp_path, monkeypatch, broken, existing) -> None:
    path, load, error = stored
    thing = load(path)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "file.safetensors"
    if existing:
        target.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        WRITE_FAILURES[broken](patch)
        with pytest.raises(error, match="No space left on device") as caught:
            thing.save(target)
    essential(str(caught.value), (str(target), "cannot be written", "make room"))
    assert [item.name for item in folder.iterdir()] == ([target.name] if existing else [])
    if existing:
        assert target.read_bytes() == path.read_bytes()  # byte for byte: it was not touched
    thing.save(target)
    assert same_content(target, path)


def test_a_folder_in_the_way(stored, tmp_path) -> None:
    path, load, error = stored
    thing = load(path)
    folder = tmp_path / "out" / "file.safetensors"
    folder.mkdir(parents=True)
    with pytest.raises(error, match="cannot be written") as caught:
        thing.save(folder)
    essential(str(caught.value), (str(folder), "another place"))
    assert [item.name for item in folder.parent.iterdir()] == ["file.safetensors"]
    assert list(folder.iterdir()) == []
    with pytest.raises(error, match="cannot be written"):
        thing.save(path / "inside a file")


@pytest.mark.parametrize("broken", WRITE_FAILURES)
def test_a_full_disk_in_the_cache(
    tiny, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch, caplog, broken
) -> None:
    """The work of hours is used all the same; only the next time does it have to be done again."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "unified_edit.statistics.cache.default_corpus", lambda model: iter(tiny_texts * 3)
    )
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="unified_edit"):
        WRITE_FAILURES[broken](patch)
        full = edit(tiny, tiny_tokenizer, [TOWER], ONE)
    essential(caplog.text, ("not kept for the next time", "No space left on device", "layer-1"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    full.undo()
    Editor(tiny, tiny_tokenizer).memory.clear()
    assert edit(tiny, tiny_tokenizer, [TOWER], ONE).id == full.id
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["layer-1.safetensors"]


def test_an_adapter_that_cannot_be_written(
    tiny, tiny_tokenizer, tiny_statistics, tmp_path, monkeypatch
) -> None:
    made = edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    folder = tmp_path / "adapter"
    for failing in (partly_written, partly_written_natively):
        with monkeypatch.context() as patch:
            patch.setattr("unified_edit.editing.peft_export.save_file", failing)
            with refused(tiny, EditError, str(folder), "cannot be written", "No space left"):
                made.to_peft(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    with refused(tiny, EditError, "not empty", "new folder"):
        made.to_peft(tmp_path / "used")
    with refused(tiny, EditError, "new folder"):
        made.to_peft(tmp_path / "used" / "note")
    assert (tmp_path / "used" / "note").read_text() == "mine"
