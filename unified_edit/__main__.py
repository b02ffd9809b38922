"""``unified-edit`` and ``python -m unified_edit``: the command line, and what Ctrl-C does to it."""

import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130


def _end() -> NoReturn:
    """Leave at once, whatever is loading or being cleared away."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def _unraisable(problem: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C is not lost where Python would report an exception and go on."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(problem)


def main() -> int:
    """Run the command line; return the exit code. This is the entry of a process.

    Ctrl-C ends the process with "interrupted" and exit code 130. While packages are loading that is
    at once; later the work is broken off in order, so that no half of a file is left behind, and
    a second Ctrl-C does not wait for that.
    """
    working = False

    def interrupt(*_: object) -> None:
        nonlocal working
        if not working:
            _end()
        working = False
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not under nohup
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = _unraisable
    try:
        from unified_edit.command_line.cli import build_parser, perform

        args = build_parser().parse_args()
        from unified_edit.command_line import sweeping  # noqa: F401  (seconds: torch, transformers)

        working = True
        return perform(args)
    except KeyboardInterrupt:
        _end()
    finally:
        working = False


if __name__ == "__main__":
    sys.exit(main())
