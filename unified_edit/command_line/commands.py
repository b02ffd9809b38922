"""The commands of the command line: each turns its arguments into a `Result`.

What costs nothing is checked first (files that would be overwritten, facts, statistics), so that
nobody waits for a model to load, or for an edit, to be told of a misspelt name.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from unified_edit.command_line.console import (
    check_free,
    check_peft,
    check_texts,
    format_table,
    read_texts,
    to_json,
    write_text,
    writing,
)
from unified_edit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unified_edit.editing.edits import Edit
    from unified_edit.editing.methods import Method
    from unified_edit.facts.facts import Fact
    from unified_edit.model.anatomy import Tokenizer
    from unified_edit.statistics.key_statistics import KeyStatistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a command found: a JSON-able document, and the same for people."""

    document: Mapping[str, Any]
    text: str


def run_ask(args: Namespace) -> Result:
    """The most probable next tokens after each prompt."""
    from unified_edit.measuring.evaluation import ask

    prompts = [*args.prompts, *(args.prompt or [])]
    if not prompts:
        args.parser.error("give at least one prompt")
    edits = _load_edits(args)
    model, tokenizer = _load_model(args)
    for edit in edits:
        edit.apply(model)
    table = ask(model, tokenizer, prompts, k=args.k)
    answers, blocks = [], []
    for place, prompt in enumerate(prompts):
        # a prompt given twice has its rows twice, so rows are told apart by their place
        rows = table.iloc[place * len(table) // len(prompts) :][: len(table) // len(prompts)]
        found = rows[["token", "probability"]].to_dict("records")
        answers.append({"prompt": prompt, "next": found})
        shown = [
            {"rank": n, "token": repr(row["token"]), "probability": row["probability"]}
            for n, row in enumerate(found, start=1)
        ]
        blocks.append(f"{prompt}\n{format_table(shown)}")
    document = {**_about(args, model), "edits": [edit.id for edit in edits], "answers": answers}
    return Result(document, "\n\n".join(blocks))


def run_edit(args: Namespace) -> Result:
    """Write facts into the model and save the edit."""
    from unified_edit.editing.editor import edit as write_facts
    from unified_edit.facts.facts import Record
    from unified_edit.measuring.evaluation import evaluate

    facts = _facts(args)
    method = _method(args)
    check_free(args.out, args.force)
    if args.peft is not None:
        check_peft(args.peft)
    statistics = _load_statistics(args)
    model, tokenizer = _load_model(args)
    seed = args.seed or 0
    edit = write_facts(model, tokenizer, facts, method, statistics=statistics, seed=seed)
    answers = evaluate(model, tokenizer, [Record(fact) for fact in edit.facts]).table
    with writing(args.out):
        edit.save(args.out)
    if args.peft is not None:
        with writing(args.peft):
            edit.to_peft(args.peft)
    answers = answers[answers["kind"] == "rewrite"].sort_values("record", kind="stable")
    states = {
        when: [math.exp(value) for value in answers[answers["when"] == when]["logp_new"]]
        for when in ("before", "after")
    }
    told = [
        {
            **asdict(fact),
            "before": states["before"][place],
            "after": states["after"][place],
            "steps": len(outcome.losses),
            "first_loss": outcome.losses[0],
            "last_loss": outcome.losses[-1],
            "relative_norm": outcome.relative_norm,
            "clamped": outcome.clamped,
        }
        for place, (fact, outcome) in enumerate(zip(edit.facts, edit.outcomes, strict=True))
    ]
    shown = [
        {
            "prompt": fact.text,
            "target": fact.target_new,
            **{name: row[name] for name in ("before", "after", "steps", "clamped")},
        }
        for fact, row in zip(edit.facts, told, strict=True)
    ]
    layers = [{"layer": layer, **asdict(found)} for layer, found in edit.diagnosis.items()]
    document = {
        **_about(args, model),
        "method": edit.method.to_dict(),
        "seed": seed,
        "id": edit.id,
        "facts": told,
        "layers": layers,
        "warnings": list(edit.warnings),
        "out": str(args.out),
        "peft": None if args.peft is None else str(args.peft),
    }
    wrote = [f"wrote {args.out}"] + ([] if args.peft is None else [f"wrote {args.peft}"])
    text = [
        f"{edit.method.name}: probability of the target before and after",
        format_table(shown),
        "",
        format_table(layers),
        "",
        *wrote,
    ]
    return Result(document, "\n".join(text))


def run_evaluate(args: Namespace) -> Result:
    """Scores on records: of a method, of a saved edit, or of the model alone."""
    from unified_edit.facts.readers import load_records
    from unified_edit.measuring.evaluation import evaluate, evaluate_edits
    from unified_edit.model.anatomy import anatomy

    if args.method is None:
        for name in ("layers", "ridge", "statistics", "batch_size"):
            if getattr(args, name) is not None:
                args.parser.error(f"--{name.replace('_', '-')} is of use with --method only")
    if args.out is not None and args.out == args.table:
        args.parser.error("--out and --table are the same file")
    for path in (args.out, args.table):
        if path is not None:
            check_free(path, args.force)
    method = None if args.method is None else _method(args)
    statistics, edits = _load_statistics(args), _load_edits(args)
    records = load_records(args.records, limit=args.limit, seed=args.seed)
    model, tokenizer = _load_model(args)
    seed, batch_size = args.seed or 0, args.batch_size or 1
    if method is not None:
        method = method.resolve(anatomy(model))
        report = evaluate_edits(
            model, tokenizer, records, method,
            batch_size=batch_size, statistics=statistics, seed=seed,
        )  # fmt: skip
    else:
        written = {(fact.text, fact.target_new) for edit in edits for fact in edit.facts}
        asked = [(record.fact.text, record.fact.target_new) for record in records]
        others = sum(pair not in written for pair in asked)
        if edits and others:
            log.warning(
                "%d of %d records are about facts that the edits given do not write",
                others, len(records),
            )  # fmt: skip
        for edit in edits:
            edit.apply(model)
        report = evaluate(model, tokenizer, records, seed=seed)
    document = {
        **_about(args, model),
        "source": args.records,
        "limit": args.limit,
        "method": None if method is None else method.to_dict(),
        "batch_size": None if method is None else batch_size,
        "edits": [edit.id for edit in edits],
        **report.to_dict(),
    }
    wrote = []
    if args.table is not None:
        write_text(args.table, report.table.to_csv(index=False, lineterminator="\n"))
        wrote.append(f"wrote {args.table}")
    if args.out is not None:
        write_text(args.out, to_json(document) + "\n")
        wrote.append(f"wrote {args.out}")
    return Result(document, "\n".join([repr(report), *([""] if wrote else []), *wrote]))


def run_statistics(args: Namespace) -> Result:
    """C0 of some layers from texts, saved."""
    from unified_edit.model.anatomy import anatomy
    from unified_edit.statistics.cache import TOKENS_PER_DIMENSION, default_corpus
    from unified_edit.statistics.key_statistics import KeyStatistics

    check_free(args.out, args.force)
    texts: Iterable[str]
    if args.texts:
        check_texts(args.texts)
        texts, tokens = read_texts(args.texts, args.split), args.tokens
        model, tokenizer = _load_model(args)
    else:
        if args.split:
            args.parser.error("--split is of use with --texts only")
        model, tokenizer = _load_model(args)
        texts = default_corpus(model)
        tokens = args.tokens or TOKENS_PER_DIMENSION * anatomy(model).d_in
    made = KeyStatistics.collect(
        model, tokenizer, texts, args.layers,
        tokens=tokens, shrinkage=args.shrinkage, checkpoint=args.checkpoint,
    )  # fmt: skip
    with writing(args.out):
        made.save(args.out)
    layers = [
        {"layer": layer, "d_k": len(made.C0(layer)), "agreement": made.convergence(layer)}
        for layer in made.layers
    ]
    source = asdict(made.source)
    document = {
        **_about(args, model),
        "source": source,
        "layers": layers,
        "out": str(args.out),
    }
    counts = f"C0 from {source['tokens']} tokens of {source['texts']} texts"
    if args.shrinkage:
        counts += f", shrinkage {args.shrinkage:g}"
    return Result(document, f"{counts}\n{format_table(layers)}\n\nwrote {args.out}")


# -- what the commands are given --------------------------------------------------------------


def _load_model(args: Namespace) -> tuple[PreTrainedModel, Tokenizer]:
    import torch

    from unified_edit.model.load import load_model

    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError, NotImplementedError) as problem:
            reason = str(problem).strip().partition("\n")[0]
            raise ModelError(
                f"device {args.device!r} cannot be used ({reason}); leave --device out for the CPU"
            ) from problem
    return load_model(
        args.model, dtype=args.dtype, device=args.device,
        revision=args.revision, allow_bin=args.allow_bin,
    )  # fmt: skip


def _about(args: Namespace, model: PreTrainedModel) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "command": args.command,
        "library": version("unified_edit"),
        "model": args.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _facts(args: Namespace) -> list[Fact]:
    from unified_edit.facts.facts import Fact
    from unified_edit.facts.readers import read_facts

    single = (args.prompt, args.subject, args.target)
    if args.facts is not None:
        if any(part is not None for part in (*single, args.target_true)):
            args.parser.error("give --facts, or --prompt, --subject and --target: not both")
        return read_facts(args.facts)
    if any(part is None for part in single):
        args.parser.error("give --facts FILE, or all of --prompt, --subject and --target")
    return [Fact(*single, args.target_true)]


def _method(args: Namespace) -> Method:
    from unified_edit.editing.methods import METHODS

    changes: dict[str, Any] = {}
    if args.layers is not None:
        changes["layers"] = tuple(args.layers)
    if args.ridge is not None:
        changes["ridge"] = args.ridge
    return METHODS[args.method].replace(**changes)


def _load_statistics(args: Namespace) -> KeyStatistics | None:
    from unified_edit.statistics.key_statistics import KeyStatistics

    return None if args.statistics is None else KeyStatistics.load(args.statistics)


def _load_edits(args: Namespace) -> list[Edit]:
    from unified_edit.editing.edits import Edit

    return [Edit.load(path) for path in args.edit or []]
