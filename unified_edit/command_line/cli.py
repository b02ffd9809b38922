"""The command line: ``python -m unified_edit ask|edit|evaluate|statistics``.

A command returns a `Result`: one JSON document and the same for people. Only `main` writes to
standard output, once, when the work is done; whatever else is said meanwhile (progress, notes,
warnings, also those of other packages) goes to standard error. So ``--json`` can be piped.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unified_edit.command_line.commands import (
    Result,
    run_ask,
    run_edit,
    run_evaluate,
    run_statistics,
)
from unified_edit.command_line.console import to_json
from unified_edit.errors import (
    InfeasibleError,
    MethodError,
    SharedSubjectError,
    StatisticsError,
    StatisticsFileError,
    UnifiedEditError,
)

PROGRAM = "python -m unified_edit"
OK, FAILED, INTERRUPTED = 0, 1, 130

EXIT_CODES = """\
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole program; each command sets `run` and `parser`."""
    from unified_edit import __version__
    from unified_edit.editing.methods import METHODS
    from unified_edit.statistics.cache import TOKENS_PER_DIMENSION

    def arguments(add_help: bool = False, **options: Any) -> argparse.ArgumentParser:
        return argparse.ArgumentParser(add_help=add_help, allow_abbrev=False, **options)

    # fmt: off
    common = arguments()
    group = common.add_argument_group("model and output")
    group.add_argument("--model", default="atlas", metavar="NAME",
                       help="atlas (embedded; the default), a folder, or a name on the Hub")
    group.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"),
                       help="type of the weights (default: as stored; atlas float32)")
    group.add_argument("--device", help="cpu (the default), cuda, cuda:1, mps")
    group.add_argument("--revision", help="revision on the Hub")
    group.add_argument("--allow-bin", action="store_true",
                       help="read pickled weights where there is no safetensors file")
    group.add_argument("--json", action="store_true",
                       help="print one JSON document, and nothing else, on standard output")
    settings = arguments()
    group = settings.add_argument_group("settings of the method")
    group.add_argument("--layers", type=_whole(0), nargs="+", metavar="N",
                       help="blocks to edit, ascending (default: the method's own for this model)")
    group.add_argument("--ridge", type=float, metavar="LAM",
                       help="lambda of the least-squares form, per mean C0; 0: equality")
    group.add_argument("--statistics", type=Path, metavar="FILE",
                       help="C0 of these layers, made by the command statistics (default: from "
                       "the cache, or collected from the model's default corpus and kept)")
    seed_help = "of the sampled prefixes (default: 0)"
    force: dict[str, Any] = {"action": "store_true", "help": "replace files that are there already"}

    parser = arguments(
        add_help=True, prog=PROGRAM, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Edit facts in language models with ROME, EMMET and MEMIT.",
        epilog=f"""\
examples:
  {PROGRAM} ask "The Eiffel Tower is located in the city of"
  {PROGRAM} edit --prompt "{{}} is located in the city of" \\
      --subject "The Eiffel Tower" --target Rome --out rome.safetensors
  {PROGRAM} ask --edit rome.safetensors "The Eiffel Tower is located in the city of"
  {PROGRAM} evaluate --records atlas --limit 20 --method EMMET --batch-size 10
  {PROGRAM} statistics --layers 17 --model gpt2-xl --texts wiki.txt --out xl.safetensors

"{PROGRAM} COMMAND --help" tells more about each command.

{EXIT_CODES}""",
    )
    parser.add_argument("--version", action="version", version=f"unified_edit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], Result], text: str, epilog: str,
        parents: Sequence[argparse.ArgumentParser],
    ) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("run_")
        made: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
            epilog=f"{epilog}\n{EXIT_CODES}", parents=[*parents, common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, parser=made)
        return made

    made = command(run_ask, "show the most probable next tokens after a prompt", f"""\
examples:
  {PROGRAM} ask "The Eiffel Tower is located in the city of" -k 3
  {PROGRAM} ask --edit rome.safetensors --json --prompt "Rome is in" "Paris is in"
""", [])
    made.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more prompts")
    made.add_argument("--prompt", nargs="+", action="extend", metavar="PROMPT", help="the same")
    made.add_argument("-k", type=_whole(1), default=5, metavar="N",
                      help="how many tokens (default: 5)")
    made.add_argument("--edit", type=Path, action="append", metavar="FILE",
                      help="apply this saved edit first; may be given several times, in order")

    made = command(run_edit, "write facts into the model and save the edit", f"""\
A file of facts holds one JSON object a line, or a JSON list of them:
  {{"prompt": "{{}} is located in the city of", "subject": "The Eiffel Tower",
   "target_new": "Rome", "target_true": "Paris"}}        (on one line; target_true may be left out)

examples:
  {PROGRAM} edit --facts facts.jsonl --out edit.safetensors
  {PROGRAM} edit --method MEMIT --layers 3 4 --ridge 10 --facts facts.jsonl \\
      --out edit.safetensors --peft adapter/
  {PROGRAM} edit --prompt "{{}} is located in the city of" \\
      --subject "The Eiffel Tower" --target Rome --out rome.safetensors
""", [settings])
    made.add_argument("--method", choices=METHODS, default="EMMET", help="default: EMMET")
    made.add_argument("--facts", type=Path, metavar="FILE", help="JSON Lines or a JSON list")
    made.add_argument("--prompt", help="instead of a file: the prompt of one fact, {} for its "
                      "subject")
    made.add_argument("--subject", help="its subject")
    made.add_argument("--target", help="what the model shall say after the prompt")
    made.add_argument("--target-true", metavar="TARGET", help="what it says now (may be left out)")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="the edit")
    made.add_argument("--peft", type=Path, metavar="FOLDER",
                      help="write the edit as a LoRA adapter too, to a new or empty folder")
    made.add_argument("--seed", type=_whole(0, 2**63 - 1), help=seed_help)
    made.add_argument("--force", **force)

    made = command(run_evaluate, "measure what a method or a saved edit does to records", f"""\
With --method each batch of records is edited into the unedited model, measured and undone. With
--edit the model with these saved edits is measured. With neither, the model alone.

examples:
  {PROGRAM} evaluate --records atlas --limit 20 --method MEMIT --batch-size 20
  {PROGRAM} evaluate --records records.jsonl --edit edit.safetensors \\
      --out report.json --table table.csv
  {PROGRAM} evaluate --model gpt2-xl --records counterfact --limit 100 --seed 0 --json
""", [settings])
    made.add_argument("--records", default="atlas", metavar="NAME",
                      help="atlas (the default), counterfact, zsre, or a file of records")
    made.add_argument("--limit", type=_whole(1), metavar="N",
                      help="at most N records: the first ones, or with --seed a sample")
    made.add_argument("--seed", type=_whole(0, 2**63 - 1),
                      help="of the sample, the prefixes and the intervals (default: 0; the first "
                      "records are taken then)")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--method", choices=METHODS, help="edit the records by this method")
    what.add_argument("--edit", type=Path, action="append", metavar="FILE",
                      help="a saved edit; may be given several times, in order")
    made.add_argument("--batch-size", type=_whole(1), metavar="N",
                      help="with --method: records edited together (default: 1)")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the JSON document here too")
    made.add_argument("--table", type=Path, metavar="FILE",
                      help="write one line a prompt and state here, as CSV")
    made.add_argument("--force", **force)

    made = command(run_statistics, "collect C0, the second moment of keys of ordinary text", f"""\
Each text stands alone. In a file, blank lines stand between texts, which may go over several
lines; in a file without blank lines between others, each line is a text. --split says which it is
where that rule is wrong. Ten tokens for each entry of a key serve, twenty are the default; fewer
than two are refused, unless --shrinkage is given.

examples:
  {PROGRAM} statistics --layers 0 1 2 --out atlas.safetensors
  {PROGRAM} statistics --model gpt2-xl --layers 17 --texts a.txt b.txt --tokens 64000 \\
      --checkpoint partial.safetensors --out gpt2-xl.safetensors
  {PROGRAM} statistics --layers 0 --texts few.txt --shrinkage 1e-3 --out few.safetensors
""", [])
    made.add_argument("--layers", type=_whole(0), nargs="+", required=True, metavar="N",
                      help="blocks, ascending; all are collected in one pass")
    made.add_argument("--texts", type=Path, nargs="+", metavar="FILE",
                      help="UTF-8 text (default: the model's default corpus; WikiText-103 from "
                      "the Hub for all but atlas)")
    made.add_argument("--split", choices=("paragraphs", "lines"),
                      help="what one text is in these files")
    made.add_argument("--tokens", type=_whole(1), metavar="N",
                      help="draw no more texts once N tokens were counted (default: all of "
                      f"--texts; {TOKENS_PER_DIMENSION} for each entry of a key from the default "
                      "corpus)")
    made.add_argument("--shrinkage", type=float, default=0.0, metavar="EPS",
                      help="add EPS * tr(C0)/d_k * I, for few tokens (default: 0)")
    made.add_argument("--checkpoint", type=Path, metavar="FILE",
                      help="keep the sums here meanwhile; the same command goes on from there")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="the statistics")
    made.add_argument("--force", **force)
    # fmt: on
    return parser


def _hint(problem: UnifiedEditError) -> str | None:
    """The options that stand for what a message of the library says in terms of Python."""
    if isinstance(problem, (InfeasibleError, SharedSubjectError)):
        return "a method with a ridge is --method MEMIT, or --ridge LAM"
    if isinstance(problem, MethodError):
        return "these settings are --layers and --ridge"
    if isinstance(problem, StatisticsError) and not isinstance(problem, StatisticsFileError):
        return (
            f"collect them by: {PROGRAM} statistics --layers N --texts FILE [--shrinkage 1e-3] "
            "--out STATS; use them by --statistics STATS"
        )
    return "that is --allow-bin" if "allow_bin" in str(problem) else None


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        return f"{level}: {record.getMessage()}"


@contextlib.contextmanager
def _notes_to_stderr() -> Iterator[None]:
    """Inside, what the library logs goes to standard error."""
    library = logging.getLogger("unified_edit")
    handler, level = logging.StreamHandler(sys.stderr), library.level
    handler.setFormatter(_Formatter())
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def _say(text: str) -> None:
    """Print to standard output, whatever its encoding holds."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`argv`, or the program's own); return the exit code.

    Raises SystemExit for --help and --version (0) and a wrong command line (2), as argparse does.
    """
    args = build_parser().parse_args(argv)
    try:
        with _notes_to_stderr(), contextlib.redirect_stdout(sys.stderr):
            result = args.run(args)
        _say(to_json(result.document) if args.json else result.text)
    except UnifiedEditError as problem:
        print(f"error: {problem}", file=sys.stderr)
        hint = _hint(problem)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away; Python would say so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return OK
