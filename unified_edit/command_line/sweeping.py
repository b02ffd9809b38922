"""The commands about sweeps, and the table of all commands."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch

from unified_edit.command_line import commands, running
from unified_edit.command_line.commands import Result
from unified_edit.command_line.console import format_table
from unified_edit.editing import METHODS
from unified_edit.errors import MethodError
from unified_edit.measuring import draw_sweep, load_records, sweep, sweep_in_processes
from unified_edit.measuring.grid import Cell, Grid, cells_of, read_grid
from unified_edit.measuring.grid_files import DONE, NEW, read_cells
from unified_edit.measuring.grid_table import Sweep

#: Options that say what the grid is -> what `Grid` calls them.
_OF_GRID = ("methods", "batch_sizes", "ridges", "layers", "seeds", "histories")


def run_sweep(args: Namespace) -> Result:
    """A grid, cell by cell."""
    grids = _grids(args)
    cells = cells_of(grids)
    for cell in cells:
        if args.limit is not None and cell.batch_size > args.limit:
            raise MethodError(
                f"{cell.name} asks for batches of {cell.batch_size}, and --limit is {args.limit}; "
                "give more records, or smaller batches"
            )
    if args.dry_run:
        return _listed(args, cells)
    records = load_records(args.records, limit=args.limit, seed=args.sample)
    given: dict[str, Any] = {
        "known_only": args.known_only, "generate": args.fluency, **commands.ways_of(args)
    }  # fmt: skip
    if args.processes > 1:
        found = sweep_in_processes(
            commands.loading_of(args), records, grids, to=args.to, processes=args.processes,
            threads=args.threads, statistics=args.statistics, **given,
        )  # fmt: skip
    else:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        statistics = commands.statistics_of(args)
        model, tokenizer = commands.model_of(args)
        found = sweep(model, tokenizer, records, grids, to=args.to, statistics=statistics, **given)
    return _found(args, found)


def _grids(args: Namespace) -> tuple[Grid, ...]:
    given = {name: value for name in _OF_GRID if (value := getattr(args, name)) is not None}
    if args.grid is not None:
        if given:
            args.parser.error(f"give --grid, or --{next(iter(given)).replace('_', '-')}: not both")
        return read_grid(args.grid)
    for name in given.get("methods", ()):
        if name not in METHODS:
            args.parser.error(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    return (Grid(**{"methods": ["EMMET"], **given}),)


def _about(args: Namespace) -> dict[str, Any]:
    return {
        "command": args.command,
        "library": version("unified_edit"),
        "model": args.model,
        "source": args.records,
        "limit": args.limit,
        "sample": args.sample,
        "to": str(args.to),
    }


def _listed(args: Namespace, cells: tuple[Cell, ...]) -> Result:
    """What would be done."""
    known = read_cells(args.to)
    rows = [
        {
            "cell": cell.name,
            "method": cell.method.name,
            "layers": _own(cell.method.layers),
            "lam": _own(cell.method.ridge),
            "batch_size": cell.batch_size,
            "seed": cell.seed,
            "history": cell.history,
            "state": known.get(cell.name, {}).get("state", NEW),
        }
        for cell in cells
    ]
    done = sum(row["state"] == DONE for row in rows)
    table = pd.DataFrame(rows)
    text = (
        f"{len(cells)} cells, {done} of them done, in {args.to}\n"
        f"{format_table(table.drop(columns='method'))}"
    )
    return Result({**_about(args), "done": done, "cells": rows}, text)


def _own(value: Any) -> Any:
    """What a method has itself, as a cell of a table; what the model decides is its own."""
    return "own" if value is None else list(value) if isinstance(value, tuple) else value


def _found(args: Namespace, found: Sweep) -> Result:
    table, problems, missing = found.table, found.problems, found.missing
    shown = ("ES", "PS", "NS", "S", "GE", "ES_first")
    names = ["cell", *(one for one in shown if one in table), "miss", "cost", "state"]
    lines = [format_table(table[names].astype({"state": str}))]
    lines += [f"{name} failed: {problem}" for name, problem in problems.items()]
    if missing:
        lines.append(f"not done, for another process has or had them: {', '.join(missing)}")
    text = "\n\n".join(lines) + commands.wrote(found.folder / "table.csv")
    document = {
        **_about(args),
        "cells": table.to_dict("records"),
        "problems": problems,
        "missing": missing,
    }
    return Result(document, text, code=1 if problems or missing else 0)


def run_figures(args: Namespace) -> Result:
    """Pictures of a sweep."""
    made = draw_sweep(Sweep.read(args.folder), args.to, kind=args.format, scores=args.scores)
    document = {
        "command": args.command,
        "library": version("unified_edit"),
        "folder": str(args.folder),
        "figures": [str(path) for path in made],
    }
    return Result(document, "\n".join(f"wrote {path}" for path in made))


#: Name of a command -> what runs it.
COMMANDS = {
    **commands.COMMANDS,
    "sweep": run_sweep,
    "figures": run_figures,
    **running.COMMANDS,
}
