"""The commands of the command line: each turns its arguments into a `Result`.

What costs nothing is checked first (files that would be overwritten, facts, statistics), so that
nobody waits for a model to load, or for an edit, to be told of a misspelt name.
"""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from textwrap import shorten
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from unified_edit.command_line.console import (
    check_place,
    format_table,
    to_json,
    write_text,
)
from unified_edit.editing import METHODS, Edit, Method, Preserve, edit, load_model
from unified_edit.errors import ModelError
from unified_edit.facts import Fact, read_facts
from unified_edit.measuring import ask, evaluate, evaluate_edits, load_records, suggest_layers
from unified_edit.measuring.suggesting import CLAMPS
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.statistics import KeyStatistics, check_texts, chosen_texts
from unified_edit.statistics.sums import room

log = logging.getLogger(__name__)

#: Columns of `Edit.table` as the JSON document calls them.
_KEYS = {"first loss": "first_loss", "last loss": "last_loss", "|delta|/|v0|": "relative_norm"}


#: Options about facts that do not go together.
_WAYS = ("on_shared_subject", "on_conflict")


@dataclass(frozen=True)
class Result:
    """What a command found: a JSON-able document, and the same for people; and the exit code."""

    document: Mapping[str, Any]
    text: str
    code: int = 0


def run_ask(args: Namespace) -> Result:
    """The most probable next tokens after each prompt."""
    prompts = [*args.prompts, *(args.prompt or [])]
    if not prompts:
        args.parser.error("give at least one prompt")
    edits = _edits(args)
    model, tokenizer = model_of(args)
    for one in edits:
        one.apply(model)
    table = ask(model, tokenizer, prompts, k=args.k).drop(columns="prompt")
    # a prompt given twice has its rows twice, so rows are told apart by their place
    parts = table.groupby(table.index // (len(table) // len(prompts)))
    answers, blocks = [], []
    for prompt, (_, rows) in zip(prompts, parts, strict=True):
        answers.append({"prompt": prompt, "next": rows.drop(columns="rank").to_dict("records")})
        blocks.append(f"{prompt}\n{format_table(rows.assign(token=rows['token'].map(repr)))}")
    document = {**_about(args, model), "edits": [one.id for one in edits], "answers": answers}
    return Result(document, "\n\n".join(blocks))


def run_edit(args: Namespace) -> Result:
    """Write facts into the model and save the edit."""
    facts, method, seed = _facts(args), _method(args), args.seed or 0
    check_place(args.out, args.force)
    if args.peft is not None:
        check_place(args.peft, folder=True)
    statistics, preserve = statistics_of(args), _preserve(args)
    model, tokenizer = model_of(args)
    made = edit(
        model, tokenizer, facts, method, statistics=statistics, seed=seed, preserve=preserve,
        **ways_of(args),
    )  # fmt: skip
    made.save(args.out)
    if args.peft is not None:
        made.to_peft(args.peft)
    table = made.table.rename(columns=_KEYS)
    outcomes = table.drop(columns=["prompt", "target"]).to_dict("records")
    layers = [{"layer": layer, **asdict(found)} for layer, found in made.diagnosis.items()]
    document = {
        **_about(args, model),
        "method": made.method.to_dict(),
        "seed": seed,
        "on_shared_subject": made.provenance.on_shared_subject,
        "id": made.id,
        "facts": [asdict(fact) | row for fact, row in zip(made.facts, outcomes, strict=True)],
        "layers": layers,
        "preserved": made.preserved.to_dict("records"),
        "warnings": list(made.warnings),
        "out": str(args.out),
        "peft": None if args.peft is None else str(args.peft),
    }
    shown = ["prompt", "target", "before", "after", "likeliest", "steps", "clamped"]
    text = (
        f"{made.method.name}: {table['likeliest'].sum()} of {len(table)} facts took (probability "
        "of the target before and after; likeliest: whether the model now says it by itself)\n"
        f"{format_table(table[shown])}\n\n{format_table(pd.DataFrame(layers))}"
    )
    if preserve is not None:
        text += f"\n\npreserved by name:\n{format_table(made.preserved)}"
    return Result(document, text + wrote(args.out, args.peft))


def run_evaluate(args: Namespace) -> Result:
    """Scores on records: of a method, of a saved edit, or of the model alone."""
    if args.method is None:
        for name in ("layers", "ridge", "statistics", "batch_size", *_WAYS):
            if getattr(args, name) is not None:
                args.parser.error(f"--{name.replace('_', '-')} is of use with --method only")
    places = [path for path in (args.to, args.table, args.out) if path is not None]
    if len(set(places)) < len(places):
        args.parser.error("two of --to, --table and --out are the same file")
    for path in (args.out, args.table):
        if path is not None:
            check_place(path, args.force)
    if args.to is not None:
        check_place(args.to, force=True)  # what is there is gone on with
    method = None if args.method is None else _method(args)
    statistics, edits = statistics_of(args), _edits(args)
    records = load_records(args.records, limit=args.limit, seed=args.seed)
    model, tokenizer = model_of(args)
    seed, size = args.seed or 0, args.batch_size or 1
    if method is not None:
        method = method.resolve(model)
        report = evaluate_edits(
            model, tokenizer, records, method, batch_size=size, statistics=statistics, seed=seed,
            to=args.to, known_only=args.known_only, **ways_of(args),
        )  # fmt: skip
    else:
        written = {(fact.text, fact.target_new) for one in edits for fact in one.facts}
        others = [r for r in records if (r.fact.text, r.fact.target_new) not in written]
        if edits and others:
            say = "%d of %d records are about facts that the edits given do not write"
            log.warning(say, len(others), len(records))
        for one in edits:
            one.apply(model)
        report = evaluate(
            model, tokenizer, records, seed=seed, to=args.to, known_only=args.known_only
        )
    document = {
        **_about(args, model),
        "source": args.records,
        "limit": args.limit,
        "method": None if method is None else method.to_dict(),
        "batch_size": None if method is None else size,
        "edits": [one.id for one in edits],
        **report.to_dict(),
    }
    if args.table is not None:
        write_text(args.table, report.table.to_csv(index=False, lineterminator="\n"))
    if args.out is not None:
        write_text(args.out, to_json(document) + "\n")
    return Result(document, repr(report) + wrote(*places))


def run_statistics(args: Namespace) -> Result:
    """C0 of some layers from texts, saved."""
    if args.split and not args.texts:
        args.parser.error("--split is of use with --texts only")
    if args.config and not args.dataset:
        args.parser.error("--config is of use with --dataset only")
    if sum(one is not None for one in (args.texts, args.dataset, args.join)) > 1:
        args.parser.error("--texts, --dataset and --join exclude each other")
    if (args.layers is None) == (args.join is None):
        args.parser.error("give --layers, or else --join FILE ...")
    check_place(args.out, args.force)
    if args.join:
        made = KeyStatistics.joined([KeyStatistics.lazily(path) for path in args.join])
        return _saved_statistics(args, made, {"joined": [str(path) for path in args.join]})
    check_texts(args.texts or [])
    model, tokenizer = model_of(args)
    texts, tokens = chosen_texts(
        model, args.layers, files=args.texts or (), split=args.split, dataset=args.dataset,
        config=args.config, column=args.column, tokens=args.tokens,
    )  # fmt: skip
    made = KeyStatistics.collect(
        model, tokenizer, texts, args.layers,
        tokens=tokens, shrinkage=args.shrinkage, checkpoint=args.checkpoint, keep_checkpoint=True,
        skip_start=args.skip_start, part=args.part, max_memory=room(), folder=args.out.parent,
    )  # fmt: skip
    result = _saved_statistics(args, made, _about(args, model))  # or the checkpoint holds the work
    if args.checkpoint is not None:
        with contextlib.suppress(OSError):  # none was written
            args.checkpoint.unlink(missing_ok=True)
    return result


def _saved_statistics(args: Namespace, made: KeyStatistics, about: Mapping[str, Any]) -> Result:
    """Save statistics, and say what they are."""
    made.save(args.out)
    layers = [
        {"layer": layer, "d_k": made.width(layer), "agreement": made.convergence(layer)}
        for layer in made.layers
    ]
    source = asdict(made.source)
    document = {**about, "source": source, "layers": layers, "out": str(args.out)}
    shrunk = f", shrinkage {args.shrinkage:g}" if args.shrinkage else ""
    shrunk += ", without the first token of each text" if source["skip_start"] else ""
    shrunk += f", share {made.source.part}" if made.source.part else ""
    text = (
        f"C0 from {source['tokens']} tokens of {source['texts']} texts{shrunk}\n"
        f"{format_table(pd.DataFrame(layers))}"
    )
    return Result(document, text + wrote(args.out))


def run_suggest(args: Namespace) -> Result:
    """Layers and clamp for a method, by a sweep."""
    layers, args.layers = args.layers, None  # to try, not of the method
    method, statistics = _method(args), statistics_of(args)
    records = load_records(args.records)
    model, tokenizer = model_of(args)
    found = suggest_layers(
        model, tokenizer, records, method=method, layers=layers, clamps=args.clamps or CLAMPS,
        count=args.count, statistics=statistics, budget_s=args.budget, to=args.to, seed=args.seed,
    )  # fmt: skip
    document = {
        **_about(args, model),
        "source": args.records,
        "used": [place for place, record in enumerate(records) if record in found.used],
        "method": found.method.to_dict(),
        "by": found.by,
        "complete": found.complete,
        "before": found.before,
        "table": found.table.to_dict("records"),
    }
    text = (
        f"{found!r}\n{format_table(found.table.drop(columns=['GS', 'problem'], errors='ignore'))}"
    )
    return Result(document, text + wrote(args.to))


#: Name of a command -> what runs it.
COMMANDS = {
    "ask": run_ask,
    "edit": run_edit,
    "evaluate": run_evaluate,
    "statistics": run_statistics,
    "suggest": run_suggest,
}


# -- what the commands are given, and what they say ---------------------------------------------


def model_of(args: Namespace) -> tuple[PreTrainedModel, Tokenizer]:
    """The model that is named, opened."""
    return load_model(**loading_of(args))


def usable(device: str | torch.device | None) -> str | torch.device | None:
    """The device, if there is such a one; nobody waits for a large model to be told otherwise."""
    try:
        torch.ones(1, device=device).item()
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as problem:
        reason = shorten(str(problem), 100, placeholder=" ...")
        raise ModelError(
            f"device {device!r} cannot be used ({reason}); leave --device out for the CPU"
        ) from problem
    return device


def loading_of(args: Namespace) -> dict[str, Any]:
    """What `load_model` is told."""
    usable(args.device)
    names = ("dtype", "device", "revision", "allow_bin", "gguf_file", "cache")
    return {"name": args.model, **{name: getattr(args, name) for name in names}}


def _facts(args: Namespace) -> list[Fact]:
    single = (args.prompt, args.subject, args.target)
    if args.facts is not None:
        if any(part is not None for part in (*single, args.target_true)):
            args.parser.error("give --facts, or --prompt, --subject and --target: not both")
        return read_facts(args.facts)
    if any(part is None for part in single):
        args.parser.error("give --facts FILE, or all of --prompt, --subject and --target")
    return [Fact(*single, args.target_true)]


def _method(args: Namespace) -> Method:
    if args.method not in METHODS:
        args.parser.error(f"--method: {args.method!r} is none of {', '.join(METHODS)}")
    given = {name: getattr(args, name) for name in ("layers", "ridge")}
    changes = {name: value for name, value in given.items() if value is not None}
    return METHODS[args.method].replace(**changes)


def _preserve(args: Namespace) -> Preserve | None:
    named = [*(read_facts(args.preserve) if args.preserve else ()), *(args.preserve_prompts or ())]
    if not named and args.preserve_weight is not None:
        args.parser.error("--preserve-weight is of use with --preserve or --preserve-prompts")
    weight: float | None = args.preserve_weight
    return Preserve(tuple(named), "exact" if weight is None else weight) if named else None


def ways_of(args: Namespace) -> dict[str, Any]:
    """What is to be done with facts that meet, where it was said."""
    return {name: value for name in _WAYS if (value := getattr(args, name)) is not None}


def statistics_of(args: Namespace) -> KeyStatistics | None:
    """C0 of the file that is named; None where none is."""
    return None if args.statistics is None else KeyStatistics.lazily(args.statistics)


def _edits(args: Namespace) -> list[Edit]:
    return [Edit.load(path) for path in args.edit or []]


def _about(args: Namespace, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "command": args.command,
        "library": version("unified_edit"),
        "model": args.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "origin": anatomy(model).origin,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def wrote(*paths: object) -> str:
    """Which files were written, for people."""
    lines = "".join(f"\nwrote {path}" for path in paths if path is not None)
    return lines and f"\n{lines}"
