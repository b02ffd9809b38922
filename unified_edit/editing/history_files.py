"""The active edits of a model in a folder, for a later process to go on with."""

from __future__ import annotations

import json
from pathlib import Path

from unified_edit.editing.consecutive import Owner
from unified_edit.editing.edits import Edit
from unified_edit.errors import EditError, EditFileError
from unified_edit.model.tensor_files import written_whole

INDEX, INDEX_KIND = "history.json", "unified_edit.history/1"


def save(editor: Owner, folder: Path) -> None:
    """`Editor.save`."""
    active = editor.active
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for edit in active:
            if not (folder / f"{edit.id}.safetensors").exists():
                edit.save(folder / f"{edit.id}.safetensors")
        index = {
            "kind": INDEX_KIND,
            "fingerprint": editor.ledger.fingerprint(),
            "model": editor.parts.name,
            "history": editor.history,
            "edits": [edit.id for edit in active],
        }
        with written_whole(folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except OSError as problem:
        raise EditFileError(
            f"{folder} cannot be written: {problem}. Give another place, or make room there"
        ) from problem


def resume(editor: Owner, folder: Path) -> tuple[Edit, ...]:
    """`Editor.resume`."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        ids = [str(id_) for id_ in index["edits"]]
        if index["kind"] != INDEX_KIND:
            raise ValueError(f"it is {index['kind']!r}, not {INDEX_KIND!r}")
        kind, made_for, name = index["history"], index["fingerprint"], index["model"]
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise EditFileError(
            f"{path} cannot be read ({problem!r}): give the folder that Editor.save wrote"
        ) from problem
    found = editor.ledger.fingerprint()
    if made_for != found:
        raise EditFileError(
            f"{folder} holds the edits of {name!r} (base fingerprint {str(made_for)[:12]}), not of "
            f"this model ({editor.parts.name!r}, {found[:12]}). Load the model they were made for"
        )
    if editor.history is not None and kind is not None and editor.history != kind:
        raise EditFileError(
            f"the edits of {folder} were made with history={kind!r}, this editor has "
            f"{editor.history!r}: make it with Editor(..., history={kind!r})"
        )
    if editor.ledger.active:
        raise EditError(
            f"{len(editor.ledger.active)} edits are in force already; take them out first "
            "(editor.reset()), or resume into a model as it was loaded"
        )
    edits = []
    for id_ in ids:
        edit = Edit.load(folder / f"{id_}.safetensors")
        if edit.id != id_:
            raise EditFileError(f"{folder / id_}.safetensors holds the edit {edit.id}, not {id_}")
        edits.append(edit)
    with editor.ledger.rollback():
        for edit in edits:
            edit.apply(editor.model)
    return tuple(edits)
