#!/usr/bin/env python3
"""Execute notebooks, take out what depends on the machine, find what may not be committed.

    python tools/notebooks.py execute book                   all of a folder, two at a time
    python tools/notebooks.py execute book/first_edit.ipynb  one of them
    python tools/notebooks.py check book                     hold stored outputs against `faults`

Notebooks are executed in place, in fresh kernels; one that fails stays as it was. `make.py` calls
this file inside `.venv` (nbclient, nbconvert and nbformat must be installed).
"""

from __future__ import annotations

import argparse
import copy
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbformat import NotebookNode

WORKERS = 2
CELL_SECONDS = 300
LARGEST = 1_500_000  # bytes; readers clone this

#: The same for every machine: which Python ran a notebook says its page.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
#: What the metadata of a code cell may say: tags, and how its outputs are shown.
KEPT = {"jupyter", "mystnb", "slideshow", "tags"}


def notebooks(place: Path) -> list[Path]:
    """The notebook at `place`, or those below it, without hidden folders and build folders."""
    if place.is_file():
        return [place]
    return sorted(
        path
        for path in place.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in path.relative_to(place).parts)
    )


def read(path: Path) -> NotebookNode:
    """A notebook from its file."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Code cells that hold anything; blank ones are not executed."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def normalise(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what depends on when and where it was executed (changed in place)."""
    clear = ClearMetadataPreprocessor(enabled=True, preserve_cell_metadata_mask=KEPT)
    clear(notebook, {})
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.source.strip():
            cell.execution_count, cell.outputs = None, []
    return nbformat.from_dict(notebook)


# --- faults ---------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(
    r"(?<![\w:/.<])/(?:[\w.-]+/){2,}[\w.-]+"  # /a/b/c, but neither an address nor a closing tag
    r"|(?<![\w])[A-Za-z]:\\\\?[\w.-]+\\"  # C:\a\
    r"|file://"
)


def output_texts(output: NotebookNode) -> Iterator[str]:
    """Everything a reader can read in one output: streams, text, HTML, tracebacks."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [data[kind] for kind in data if kind.startswith("text/")]
    for text in parts:
        yield re.sub(r"data:image/[^\"]*", "", text)  # a picture inside of HTML is no text


def output_faults(cell: NotebookNode, output: NotebookNode) -> Iterator[str]:
    """What is wrong with one output of a cell."""
    expected = "raises-exception" in cell.metadata.get("tags", [])
    if output.output_type == "error" and not expected:
        yield f"stored error {output.ename}: {output.evalue}"
    for text in output_texts(output):
        if match := MACHINE_PATH.search(text):
            yield f"a path of this machine in an output: {match.group()}"
    pictures = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    if pictures and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip():
        yield "no alt text (cell metadata mystnb: image: alt)"


def faults(notebook: NotebookNode) -> list[str]:
    """What a committed notebook may not have, each with its cell; an empty list is a good one."""
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"no valid notebook: {error}"]
    found = []
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"cells were not executed once each, in order, in a fresh kernel: {counts}")
    for number, cell in enumerate(cells, start=1):
        for output in cell.outputs:
            found += [f"code cell {number}: {fault}" for fault in output_faults(cell, output)]
    if normalise(copy.deepcopy(notebook)) != notebook:
        found.append("metadata of an editor or a machine are stored; execute it to remove them")
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"{size / 1e6:.1f} MB: shrink its figures")
    return found


def check(place: Path) -> str | None:
    """Every fault of the notebooks in a place, a line each; None if there is none."""
    lines = [f"  {path.as_posix()}: {x}" for path in notebooks(place) for x in faults(read(path))]
    return "\n".join(["outputs that may not be committed:", *lines]) if lines else None


# --- execution ------------------------------------------------------------------------------------


def execute_one(path: Path, shown: str, cell_seconds: int) -> str | None:
    """Execute one notebook in place in a fresh kernel; returns what failed, and in which cell."""
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    started: list[NotebookNode] = []

    def note(cell: NotebookNode, **_: Any) -> None:
        started.append(cell)

    client = NotebookClient(
        notebook,
        timeout=cell_seconds,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=note,
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rstrip()
        return f"{shown}, code cell {len(started)} of {len(code_cells(notebook))} failed:\n{text}"
    nbformat.write(normalise(notebook), path)
    return None


def execute_all(folder: Path, workers: int, cell_seconds: int) -> str | None:
    """Execute all notebooks of a folder, each in a process of its own; returns every failure."""
    paths = notebooks(folder)
    if not paths:
        return f"{folder} holds no notebook"

    def one(path: Path) -> str | None:
        began = time.monotonic()
        name = path.relative_to(folder).as_posix()
        command = [sys.executable, __file__, "execute", str(path), name]
        command += ["--cell-seconds", str(cell_seconds)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            return (result.stdout + result.stderr).strip()
        print(f"executed {name} in {time.monotonic() - began:.0f} s", flush=True)
        return None

    with ThreadPoolExecutor(workers) as pool:
        failures = [text for text in pool.map(one, paths) if text]
    return "\n\n".join(["notebooks failed", *failures]) if failures else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do the work; the exit code is 0 only if all is well."""
    description, _, commands = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=commands, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=["execute", "check"])
    parser.add_argument("place", type=Path, help="a notebook, or a folder of notebooks")
    parser.add_argument("name", nargs="?", help="execute: what messages call the notebook")
    parser.add_argument("--workers", type=int, default=WORKERS, help="execute: so many at a time")
    parser.add_argument("--cell-seconds", type=int, default=CELL_SECONDS, help="execute: at most")
    given = parser.parse_args(arguments)
    if not given.place.exists():
        parser.error(f"there is no notebook and no folder {given.place}")
    if given.command == "check":
        failure = check(given.place)
    elif given.place.is_dir():
        failure = execute_all(given.place, given.workers, given.cell_seconds)
    else:
        shown = given.name or given.place.name
        failure = execute_one(given.place, shown, given.cell_seconds)
    if failure:
        print(failure, file=sys.stderr, flush=True)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
