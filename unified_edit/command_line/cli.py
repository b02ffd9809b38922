"""Edit facts in language models with ROME, EMMET and MEMIT.

examples:
  python -m unified_edit ask "The Eiffel Tower is located in the city of"
  python -m unified_edit edit --prompt "{} is located in the city of" \\
      --subject "The Eiffel Tower" --target Rome --out rome.safetensors
  python -m unified_edit ask --edit rome.safetensors "The Eiffel Tower is located in the city of"
  python -m unified_edit evaluate --records atlas --limit 20 --method EMMET --batch-size 10
  python -m unified_edit statistics --layers 17 --model gpt2-xl --texts wiki.txt \\
      --out xl.safetensors
  python -m unified_edit suggest --records atlas --clamps 1.25
  python -m unified_edit sweep --methods EMMET MEMIT --batch-sizes 1 10 100 --to sweep
  python -m unified_edit figures sweep --to pictures
  python -m unified_edit run many --records atlas --limit 100 --method MEMIT
  python -m unified_edit status many

"python -m unified_edit COMMAND --help" tells more about each command.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, get_args

from unified_edit.command_line import options, run_options, sweep_options
from unified_edit.command_line.options import path_of, whole
from unified_edit.errors import (
    ContradictionError,
    FactError,
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


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole program; each command sets `command` and `parser`."""
    plain: dict[str, Any] = {"add_help": False, "allow_abbrev": False}
    texts: dict[str, Any] = {
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }

    common, begun = _model(**plain), _model(default=None, **plain)
    as_json = argparse.ArgumentParser(**plain)
    for one in (common, begun, as_json):
        one.add_argument("--json", action="store_true",
                         help="print one JSON document, and nothing else, on standard output")
    method = argparse.ArgumentParser(**plain)
    group = method.add_argument_group("settings of the method")
    group.add_argument("--layers", type=whole(0), nargs="+", metavar="N",
                       help="blocks to edit, ascending (default: the method's own for this model)")
    group.add_argument("--ridge", type=float, metavar="LAM",
                       help="lambda of the least-squares form, per mean C0; 0: equality")
    settings = argparse.ArgumentParser(**plain)
    group = settings.add_argument_group("settings of every method")
    group.add_argument("--statistics", type=path_of, metavar="FILE",
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
        (options.ask, [common]), (options.edit, [method, settings, saved, common]),
        (options.evaluate, [method, settings, saved, common]),
        (options.statistics, [saved, common]), (options.suggest, [method, settings, common]),
        (sweep_options.sweep, [settings, common]), (sweep_options.figures, [as_json]),
        (run_options.run, [method, settings, begun]), (run_options.status, [as_json]),
    ):
        title, _, more = inspect.cleandoc(add.__doc__ or "").partition("\n\n")
        made = commands.add_parser(
            add.__name__, help=title[0].lower() + title[1:].rstrip("."),
            description=title, epilog=f"{more}\n{EXIT_CODES}", parents=parents, **texts,
        )
        made.set_defaults(parser=made)
        add(made)
    return parser


def _model(default: str | None = "atlas", **plain: Any) -> argparse.ArgumentParser:
    """What all commands that open a model are told."""
    made = argparse.ArgumentParser(**plain)
    group = made.add_argument_group("model and output")
    group.add_argument("--model", default=default, metavar="NAME",
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
    return made


# fmt: on


def _hint(problem: UnifiedEditError, command: str) -> str | None:
    """The options that stand for what a message of the library says in terms of Python."""
    if "preserve" in str(problem) and isinstance(problem, (FactError, InfeasibleError)):
        return "what is preserved by name is given a weight by --preserve-weight W"
    if isinstance(problem, ContradictionError):
        return "the last one wins with --on-conflict last"
    if isinstance(problem, (InfeasibleError, SharedSubjectError)):
        ways = "; facts about one subject: --on-shared-subject merge, or split"
        shared = ways if isinstance(problem, SharedSubjectError) else ""
        return f"a method with a ridge is --method MEMIT, or --ridge LAM{shared}"
    if isinstance(problem, MethodError):
        return f"these settings are --layers and --ridge{'s' if command == 'sweep' else ''}"
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
    from unified_edit.command_line.console import to_json
    from unified_edit.command_line.sweeping import COMMANDS  # takes seconds: torch, transformers

    try:
        with _all_to_stderr():
            result = COMMANDS[args.command](args)
    except UnifiedEditError as problem:
        print(f"error: {problem}", file=sys.stderr)
        if hint := _hint(problem, args.command):
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
    return result.code
