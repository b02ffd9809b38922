"""Edit facts in language models with ROME, EMMET and MEMIT.

examples:
  python -m unified_edit ask "The Eiffel Tower is located in the city of"
  python -m unified_edit edit --prompt "{} is located in the city of" \\
      --subject "The Eiffel Tower" --target Rome --out rome.safetensors
  python -m unified_edit ask --edit rome.safetensors "The Eiffel Tower is located in the city of"
  python -m unified_edit evaluate --records atlas --limit 20 --method EMMET --batch-size 10
  python -m unified_edit statistics --layers 17 --model gpt2-xl --texts wiki.txt \\
      --out xl.safetensors

"python -m unified_edit COMMAND --help" tells more about each command.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from unified_edit.arguments import as_path
from unified_edit.errors import (
    ContradictionError,
    InfeasibleError,
    MethodError,
    SharedSubjectError,
    StatisticsError,
    StatisticsFileError,
    UnifiedEditError,
)
from unified_edit.facts import Conflict, SharedSubject

PROGRAM = "python -m unified_edit"
OK, FAILED = 0, 1

EXIT_CODES = """
exit codes:
  0    done
  1    an error: what, where and what to do stands on standard error after "error:"
  2    the command line itself is wrong
  130  interrupted (Ctrl-C); files are written whole or not at all
"""


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{value} is not {limits}")
        return value

    number.__name__ = "whole number"  # what argparse calls it in its message
    return number


def _path(text: str) -> Path:
    try:
        return as_path(text, "the path", UnifiedEditError)
    except UnifiedEditError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


# fmt: off
def _ask(made: argparse.ArgumentParser) -> None:
    """Show the most probable next tokens after a prompt.

    examples:
      python -m unified_edit ask "The Eiffel Tower is located in the city of" -k 3
      python -m unified_edit ask --edit rome.safetensors --json --prompt "Rome is in" "Paris is in"
    """
    made.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more prompts")
    made.add_argument("--prompt", nargs="+", action="extend", metavar="PROMPT", help="the same")
    made.add_argument("-k", type=_whole(1), default=5, metavar="N",
                      help="how many tokens (default: 5)")
    made.add_argument("--edit", type=_path, action="append", metavar="FILE",
                      help="apply this saved edit first; may be given several times, in order")


def _edit(made: argparse.ArgumentParser) -> None:
    """Write facts into the model and save the edit.

    A file of facts holds one JSON object a line, or a JSON list of them:
      {"prompt": "{} is located in the city of", "subject": "The Eiffel Tower",
       "target_new": "Rome", "target_true": "Paris"}      (on one line; target_true may be left out)

    examples:
      python -m unified_edit edit --facts facts.jsonl --out edit.safetensors
      python -m unified_edit edit --method MEMIT --layers 3 4 --ridge 10 --facts facts.jsonl \\
          --out edit.safetensors --peft adapter/
      python -m unified_edit edit --prompt "{} is located in the city of" \\
          --subject "The Eiffel Tower" --target Rome --out rome.safetensors
    """
    made.add_argument("--method", default="EMMET", metavar="NAME",
                      help="ROME, EMMET (the default), MEMIT or EMMET_RELEASED")
    made.add_argument("--facts", type=_path, metavar="FILE", help="JSON Lines or a JSON list")
    made.add_argument("--prompt", help="instead of a file: the prompt of one fact, {} for its "
                      "subject")
    made.add_argument("--subject", help="its subject")
    made.add_argument("--target", help="what the model shall say after the prompt")
    made.add_argument("--target-true", metavar="TARGET", help="what it says now (may be left out)")
    made.add_argument("--out", type=_path, required=True, metavar="FILE", help="the edit")
    made.add_argument("--peft", type=_path, metavar="FOLDER",
                      help="write the edit as a LoRA adapter too, to a new or empty folder")
    made.add_argument("--seed", type=_whole(0, 2**63 - 1),
                      help="of the sampled prefixes (default: 0)")


def _evaluate(made: argparse.ArgumentParser) -> None:
    """Measure what a method or a saved edit does to records.

    With --method each batch of records is edited into the unedited model, measured and undone.
    With --edit the model with these saved edits is measured. With neither, the model alone.

    examples:
      python -m unified_edit evaluate --records atlas --limit 20 --method MEMIT --batch-size 20
      python -m unified_edit evaluate --records records.jsonl --edit edit.safetensors \\
          --out report.json --table table.csv
      python -m unified_edit evaluate --model gpt2-xl --records counterfact --limit 100 --seed 0 \\
          --json
      python -m unified_edit evaluate --model gpt2-xl --records counterfact --method EMMET \\
          --known-only --to answers.jsonl
    """
    made.add_argument("--records", default="atlas", metavar="NAME",
                      help="atlas (the default), counterfact, zsre, or a file of records")
    made.add_argument("--limit", type=_whole(1), metavar="N",
                      help="at most N records: the first ones, or with --seed a sample")
    made.add_argument("--seed", type=_whole(0, 2**63 - 1),
                      help="of the sample, the prefixes and the intervals (default: 0; the first "
                      "records are taken then)")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--method", metavar="NAME",
                      help="edit the records by ROME, EMMET, MEMIT or EMMET_RELEASED")
    what.add_argument("--edit", type=_path, action="append", metavar="FILE",
                      help="a saved edit; may be given several times, in order")
    made.add_argument("--batch-size", type=_whole(1), metavar="N",
                      help="with --method: records edited together (default: 1)")
    made.add_argument("--known-only", action="store_true",
                      help="leave out records whose true object the model does not prefer before")
    made.add_argument("--to", type=_path, metavar="FILE",
                      help="write the answers here as they come, as JSON Lines; the same command "
                      "goes on from there")
    made.add_argument("--out", type=_path, metavar="FILE", help="write the JSON document here too")
    made.add_argument("--table", type=_path, metavar="FILE",
                      help="write one line a prompt and state here, as CSV")


def _statistics(made: argparse.ArgumentParser) -> None:
    """Collect C0, the second moment of keys of ordinary text.

    Each text stands alone. In a file, blank lines stand between texts, which may go over several
    lines; in a file without blank lines between others, each line is a text. --split says which it
    is where that rule is wrong. Ten tokens for each entry of a key serve, twenty are the default;
    fewer than two are refused, unless --shrinkage is given.

    examples:
      python -m unified_edit statistics --layers 0 1 2 --out atlas.safetensors
      python -m unified_edit statistics --model gpt2-xl --layers 17 --texts a.txt b.txt \\
          --tokens 64000 --checkpoint partial.safetensors --out gpt2-xl.safetensors
      python -m unified_edit statistics --layers 0 --texts few.txt --shrinkage 1e-3 \\
          --out few.safetensors
    """
    made.add_argument("--layers", type=_whole(0), nargs="+", required=True, metavar="N",
                      help="blocks, ascending; all are collected in one pass")
    made.add_argument("--texts", type=_path, nargs="+", metavar="FILE",
                      help="UTF-8 text (default: the model's default corpus; WikiText-103 from "
                      "the Hub for all but atlas)")
    made.add_argument("--split", choices=("paragraphs", "lines"),
                      help="what one text is in these files")
    made.add_argument("--tokens", type=_whole(1), metavar="N",
                      help="draw no more texts once N tokens were counted (default: all of "
                      "--texts; twenty for each entry of a key from the default corpus)")
    made.add_argument("--shrinkage", type=float, default=0.0, metavar="EPS",
                      help="add EPS * tr(C0)/d_k * I, for few tokens (default: 0)")
    made.add_argument("--checkpoint", type=_path, metavar="FILE",
                      help="keep the sums here meanwhile; the same command goes on from there")
    made.add_argument("--out", type=_path, required=True, metavar="FILE", help="the statistics")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole program; each command sets `command` and `parser`."""
    plain: dict[str, Any] = {"add_help": False, "allow_abbrev": False}
    texts: dict[str, Any] = {
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }

    common = argparse.ArgumentParser(**plain)
    group = common.add_argument_group("model and output")
    group.add_argument("--model", default="atlas", metavar="NAME",
                       help="atlas (embedded; the default), smollm2 (a package), a folder, a "
                       "GGUF file, or a name on the Hub")
    group.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"),
                       help="type of the weights (default: as stored; atlas float32)")
    group.add_argument("--device", help="cpu (the default), cuda, cuda:1, mps")
    group.add_argument("--revision", help="revision on the Hub")
    group.add_argument("--allow-bin", action="store_true",
                       help="read pickled weights where there is no safetensors file")
    group.add_argument("--gguf-file", metavar="FILE",
                       help="the GGUF file in this folder or repository")
    group.add_argument("--cache", action=argparse.BooleanOptionalAction,
                       help="keep a dequantised copy of a GGUF file, or none (default: if it takes "
                       "at most 2 GB)")
    group.add_argument("--json", action="store_true",
                       help="print one JSON document, and nothing else, on standard output")
    settings = argparse.ArgumentParser(**plain)
    group = settings.add_argument_group("settings of the method")
    group.add_argument("--layers", type=_whole(0), nargs="+", metavar="N",
                       help="blocks to edit, ascending (default: the method's own for this model)")
    group.add_argument("--ridge", type=float, metavar="LAM",
                       help="lambda of the least-squares form, per mean C0; 0: equality")
    group.add_argument("--statistics", type=_path, metavar="FILE",
                       help="C0 of these layers, made by the command statistics (default: from "
                       "the cache, or collected from the model's default corpus and kept)")
    group.add_argument("--on-shared-subject", choices=get_args(SharedSubject),
                       help="facts about one subject in a batch: refuse them where the method is "
                       "an equality (the default), find one value for all of them, or write them "
                       "in consecutive batches")
    group.add_argument("--on-conflict", choices=get_args(Conflict),
                       help="facts with the same prompt and subject and different targets: refuse "
                       "them (the default), or take the last one")
    saved = argparse.ArgumentParser(**plain)
    saved.add_argument("--force", action="store_true",
                       help="replace files that are there already")

    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=description, epilog=examples + EXIT_CODES, **texts
    )
    parser.add_argument("--version", action="version",
                        version=f"unified_edit {version('unified_edit')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for add, parents in (
        (_ask, []), (_edit, [settings, saved]), (_evaluate, [settings, saved]),
        (_statistics, [saved]),
    ):
        title, _, more = inspect.cleandoc(add.__doc__ or "").partition("\n\n")
        made = commands.add_parser(
            add.__name__.removeprefix("_"), help=title[0].lower() + title[1:].rstrip("."),
            description=title, epilog=f"{more}\n{EXIT_CODES}", parents=[*parents, common], **texts,
        )
        made.set_defaults(parser=made)
        add(made)
    return parser


# fmt: on


def _hint(problem: UnifiedEditError) -> str | None:
    """The options that stand for what a message of the library says in terms of Python."""
    if isinstance(problem, ContradictionError):
        return "the last one wins with --on-conflict last"
    if isinstance(problem, (InfeasibleError, SharedSubjectError)):
        ways = "; facts about one subject: --on-shared-subject merge, or split"
        shared = ways if isinstance(problem, SharedSubjectError) else ""
        return f"a method with a ridge is --method MEMIT, or --ridge LAM{shared}"
    if isinstance(problem, MethodError):
        return "these settings are --layers and --ridge"
    if isinstance(problem, StatisticsError) and not isinstance(problem, StatisticsFileError):
        return (
            f"collect them by: {PROGRAM} statistics --layers N --texts FILE [--shrinkage 1e-3] "
            "--out STATS; use them by --statistics STATS"
        )
    options = {"allow_bin": "--allow-bin", "gguf_file": "--gguf-file"}
    return next(
        (f"that is {is_} here" for name, is_ in options.items() if name in str(problem)), None
    )


class _Notes(logging.Handler):
    """What the library logs, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        print(f"{level}: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def _all_to_stderr() -> Iterator[None]:
    """Inside, what the library logs and what others print goes to standard error."""
    library, notes = logging.getLogger("unified_edit"), _Notes()
    level = library.level
    library.addHandler(notes)
    library.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        library.removeHandler(notes)
        library.setLevel(level)


def _say(text: str) -> None:
    """Print to standard output, whatever its encoding holds."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`argv`, or the program's own); return the exit code.

    Raises SystemExit for --help and --version (0) and a wrong command line (2), as argparse does.
    Ctrl-C is left to `unified_edit.__main__`.
    """
    return perform(build_parser().parse_args(argv))


def perform(args: argparse.Namespace) -> int:
    """Run one command; return the exit code.

    Only the result goes to standard output, once, when the work is done: whatever else is said
    meanwhile (progress, notes, warnings, also those of other packages) goes to standard error, so
    that ``--json`` can be piped.
    """
    from unified_edit.command_line.commands import COMMANDS  # takes seconds: torch, transformers
    from unified_edit.command_line.console import to_json

    try:
        with _all_to_stderr():
            result = COMMANDS[args.command](args)
    except UnifiedEditError as problem:
        print(f"error: {problem}", file=sys.stderr)
        if hint := _hint(problem):
            print(f"hint: {hint}", file=sys.stderr)
        return FAILED
    try:
        _say(to_json(result.document) if args.json else result.text)
    except OSError as problem:
        if not isinstance(problem, BrokenPipeError):  # there the reader of our output went away
            print(f"error: the output cannot be written: {problem.strerror}", file=sys.stderr)
        # Python would try again, and say so, when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return OK
