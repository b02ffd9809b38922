"""The commands about runs: `run`, and `status`, which only looks."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import version
from typing import Any

from unified_edit.command_line import commands
from unified_edit.command_line.commands import Result
from unified_edit.command_line.console import format_table
from unified_edit.editing import METHODS, Method
from unified_edit.facts import read_facts
from unified_edit.measuring import load_records
from unified_edit.running import RunFolder, RunState, run
from unified_edit.running.finishing import TEXT
from unified_edit.running.settings import COLLECTING
from unified_edit.running.status import EDIT, duration, time_left
from unified_edit.running.workers import own_device

#: Options that say how the model is loaded.
_LOADING = ("dtype", "revision", "allow_bin", "gguf_file", "cache")
#: Options that `run` is told as they are.
_PLAIN = ("statistics", *COLLECTING, "piece", "seed")


def run_run(args: Namespace) -> Result:
    """The missing pieces, and the edit."""
    if args.records is None:
        for name in ("limit", "sample"):
            if getattr(args, name) is not None:
                args.parser.error(f"--{name} is of use with --records only")
    known = RunFolder(args.folder).config()
    device = commands.usable(own_device(args.device))  # opens no other card
    records = args.records and load_records(args.records, limit=args.limit, seed=args.sample)
    state = run(
        args.folder,
        model=_loading(args, known.asked["loading"] if known else {"name": "atlas"}, known is None),
        facts=None if args.facts is None else read_facts(args.facts),
        records=records,
        method=_method(args, known.asked["method"] if known else None),
        device=device,
        gather=True if args.gather else False if args.pieces_only else None,
        accept_changes=args.accept_changes,
        **{name: getattr(args, name) for name in _PLAIN},
        **commands.ways_of(args),
    )
    return _told(args, state)


def run_status(args: Namespace) -> Result:
    """Where a run stands."""
    return _told(args, RunState.read(args.folder))


def _loading(args: Namespace, known: dict[str, Any], new: bool) -> dict[str, Any] | None:
    """What `load_model` is told; None where nothing is said of it and the folder knows."""
    told = {name: getattr(args, name) for name in _LOADING}
    told["allow_bin"] = args.allow_bin or None  # a flag that is not given is False
    given = {name: value for name, value in told.items() if value is not None}
    if args.model is not None:
        return {"name": args.model, **given}
    return {**known, **given} if given or new else None


def _method(args: Namespace, known: dict[str, Any] | None) -> Method | None:
    """The method that is named, changed as is said; None where nothing is said of it."""
    given = {name: getattr(args, name) for name in ("layers", "ridge")}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.method is not None:
        if args.method not in METHODS:
            args.parser.error(f"--method: {args.method!r} is none of {', '.join(METHODS)}")
        return METHODS[args.method].replace(**changes)
    if not changes:
        return None
    return (METHODS["EMMET"] if known is None else Method.from_dict(known)).replace(**changes)


def _told(args: Namespace, state: RunState) -> Result:
    document = {"command": args.command, "library": version("unified_edit"), **state.to_dict()}
    asked = state.config.asked
    head = f"{state.folder}: {asked['method']['name']}, {asked['facts']['count']} facts, on "
    lines = [f"{head}{asked['loading']['name']}"]
    if state.pieces:
        table = state.table
        for name in ("seconds", "a piece"):
            table[name] = ["" if n != n else duration(n) for n in table[name]]
        lines.append(format_table(table.rename(columns={"seconds": "time"})))
    if not state.finished:
        lines.append(state.told + time_left(state))
    lines += state.lines()
    if state.finished:
        summary = (state.folder / TEXT).read_text(encoding="utf-8").rstrip()
        return Result(
            document, "\n".join([*lines, "", summary]) + commands.wrote(state.folder / EDIT)
        )
    return Result(document, "\n".join(lines))


#: Name of a command -> what runs it.
COMMANDS = {"run": run_run, "status": run_status}
