"""The book and the code behind it: equations, pages, and how the book is made."""

from __future__ import annotations

import ast
import base64
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from book_source import BOOK, PARTS, equation_labels, fenced, notebooks, pages
from checkout import ROOT, load, make
from checkout import notebook_tools as tools

import unified_edit as ue
from unified_edit import errors
from unified_edit.teaching.exercises import ExerciseError

PAGES = pages()
LABELS = {page.name: equation_labels(page) for page in PAGES}
ALL_LABELS = [label for labels in LABELS.values() for label in labels]
CHECKS = re.compile(r"^# checks: (.+)$", re.MULTILINE)


# --- equations and code ---------------------------------------------------------------------------


def docstring_labels() -> Iterator[tuple[str, str]]:
    """Where and which: each equation that a docstring of the library names."""
    for path in sorted((ROOT / "unified_edit").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                where = f"{path.stem}.{getattr(node, 'name', '')}"
                yield from ((where, label) for label in re.findall(r":eq:`([^`<>]+)`", text))


def marked_labels() -> Iterator[tuple[str, str]]:
    """Where and which: each equation that a test is marked with."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.equation":
                for argument in node.args:
                    yield path.name, ast.literal_eval(argument)


def cell_labels() -> Iterator[tuple[str, str, bool]]:
    """Where and which: each equation that a cell says it checks; and whether it asserts."""
    for page in notebooks():
        for cell in page.code:
            for names in CHECKS.findall(cell.source):
                asserts = any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(cell.source)))
                for label in names.split(","):
                    yield f"{page.name}, cell {cell.number}", label.strip(), asserts


def test_labels_of_equations_are_unique() -> None:
    assert ALL_LABELS
    assert [label for label, count in Counter(ALL_LABELS).items() if count > 1] == []


def test_equations_named_in_docstrings_stand_in_the_book() -> None:
    assert [pair for pair in docstring_labels() if pair[1] not in ALL_LABELS] == []


def test_equations_named_in_docstrings_are_checked_by_a_test() -> None:
    marked = {label for _, label in marked_labels()}
    assert [pair for pair in docstring_labels() if pair[1] not in marked] == []


def test_markers_name_equations_of_the_book() -> None:
    assert [pair for pair in marked_labels() if pair[1] not in ALL_LABELS] == []


def test_cells_that_check_an_equation_name_one_of_the_book_and_assert() -> None:
    bad = [
        (where, label)
        for where, label, asserts in cell_labels()
        if label not in ALL_LABELS or not asserts
    ]
    assert bad == []


def test_every_equation_is_checked() -> None:
    checked = {label for _, label in marked_labels()} | {label for _, label, _ in cell_labels()}
    assert [label for label in ALL_LABELS if label not in checked] == []


@pytest.mark.parametrize(("part", "least"), [(0, 15), (1, 30)])
def test_parts_have_their_equations(part: int, least: int) -> None:
    assert sum(len(LABELS[name]) for name in PARTS[part]) >= least


# --- chapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for part in PARTS for name in part])
def test_a_chapter_has_its_parts(name: str) -> None:
    (page,) = [page for page in PAGES if page.name == name]
    text = "\n\n".join(cell.source for cell in page.text)
    assert re.match(r"# [^\n]+\n\n> \*\*The question of this chapter\.?\*\*", text)
    for part in ("After this chapter you can", "You need", "## Summary", "## Exercises"):
        assert part in text, part
    kinds = {block.name for cell in page.text for block in cell.blocks}
    assert {"math", "exercise", "solution"} <= kinds
    assert {"prf:definition", "prf:theorem"} & kinds


def test_nothing_is_left_to_do() -> None:
    for page in PAGES:
        for cell in page.cells:
            assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", cell.source), (page.name, cell.number)


def test_there_is_one_bibliography() -> None:
    """Two would give every citation two places, which Sphinx warns of."""
    holders = [page.name for page in PAGES if page.directives("bibliography")]
    assert holders == ["bibliography"]


def test_works_that_are_cited_are_in_the_bibliography() -> None:
    keys = set(re.findall(r"^@\w+\{([\w-]+),", (BOOK / "references.bib").read_text("utf-8"), re.M))
    text = "\n".join(cell.source for page in PAGES for cell in page.text)
    cited = {
        key.strip()
        for keys in re.findall(r"\{cite:\w+\}`([^`]+)`", text)
        for key in keys.split(",")
    }
    assert cited
    assert cited - keys == set()


@pytest.mark.parametrize("name", [page.name for page in notebooks()])
def test_a_figure_is_the_only_output_of_its_cell(name: str) -> None:
    """With a second one Sphinx makes two figures of the same name."""
    content = tools.read(BOOK / f"{name}.ipynb")
    for number, cell in enumerate(tools.code_cells(content), start=1):
        if "figure" in cell["metadata"].get("mystnb", {}):
            kinds = [set(output.get("data", {})) for output in cell["outputs"]]
            assert len(kinds) == 1, f"code cell {number}: {kinds}"
            drawn = "ue-drawing" in cell["outputs"][0]["data"].get("text/html", "")
            assert "image/png" in kinds[0] or drawn, f"code cell {number}"
            assert cell["metadata"]["mystnb"]["figure"].get("caption", "").strip()


# --- what a page shows of its code ----------------------------------------------------------------

#: What a folded cell says of itself, and what it then has to hold.
FOLDED = {
    "Show the code of this figure": r"plt\.show\(\)|slider\(",
    "Show the check": r"\bassert\b",
    "Show the set-up": r"\bimport\b|\bdef\b|=",
}
#: Lines of code that a chapter may show: half of what it showed when all of it was open.
SHOWN_LINES = {
    ("first_edit",): 48,
    ("a_fact", "judging"): 178,
    ("locating",): 123,
    ("memory", "storage"): 176,
    ("preserving",): 187,
    ("objective",): 214,
    ("rome",): 210,
    ("memit",): 157,
    ("emmet",): 210,
    ("bridge",): 293,
    ("values",): 226,
    ("spreading",): 228,
    ("which_method",): 41,
    ("real_model",): 86,
    ("real_locating",): 86,
    ("real_edits",): 88,
    ("one_fact",): 62,
    ("mass_editing",): 64,
    ("batches",): 100,
    ("hook_layers",): 138,
    ("four_corners",): 60,
    ("breaks",): 61,
    ("big_models",): 110,
    ("concepts",): 96,
    ("relations",): 61,
    ("where_this_goes",): 69,
}
COLUMNS = 80
#: Pixels: a hundred an inch. Letters of wider figures cannot be read on a phone.
FIGURE_WIDTH = 560


def cells_of(name: str) -> list[Any]:
    """The code cells of a notebook, with metadata and outputs."""
    cells: list[Any] = tools.code_cells(tools.read(BOOK / f"{name}.ipynb"))
    return cells


def is_folded(cell: Any) -> bool:
    return bool({"hide-input", "remove-input"} & set(cell["metadata"].get("tags", [])))


@pytest.mark.parametrize("name", [page.name for page in notebooks()])
def test_folded_cells_say_what_they_are(name: str) -> None:
    for number, cell in enumerate(cells_of(name), start=1):
        tags, source = set(cell["metadata"].get("tags", [])), cell["source"]
        assert not {"hide-cell", "hide-output", "remove-cell", "remove-output"} & tags, number
        if "remove-input" in tags:  # what is drawn or alive has no code that one would look for
            assert re.fullmatch(r"(from [^\n]+\n+)*(drawings|living)\.\w+\([^\n]*\)", source), (
                number
            )
        if "hide-input" in tags:
            said = cell["metadata"]["mystnb"]["code_prompt_show"]
            assert re.search(FOLDED[said], source), f"code cell {number}: {said}"
            unsaid = [
                ast.unparse(node)
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Assert) and node.msg is None
            ]
            assert unsaid == [], f"code cell {number}: asserts without a message"


@pytest.mark.parametrize("names", SHOWN_LINES)
def test_prose_leads(names: tuple[str, ...]) -> None:
    shown = sum(
        bool(line.strip())
        for name in names
        for cell in cells_of(name)
        if not is_folded(cell)
        for line in cell["source"].splitlines()
    )
    assert shown <= SHOWN_LINES[names]


@pytest.mark.parametrize("name", [page.name for page in notebooks()])
def test_code_is_as_wide_as_a_page(name: str) -> None:
    wide = [
        (number, line)
        for number, cell in enumerate(cells_of(name), start=1)
        for line in cell["source"].splitlines()
        if len(line) > COLUMNS
    ]
    assert wide == []


@pytest.mark.parametrize("name", [page.name for page in notebooks()])
def test_figures_are_not_wider_than_a_phone_can_show(name: str) -> None:
    for number, cell in enumerate(cells_of(name), start=1):
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                data = base64.b64decode(picture)
                width = int.from_bytes(data[16:20], "big")  # of the header of a PNG
                assert width <= FIGURE_WIDTH, f"code cell {number}: {width} pixels"


@pytest.mark.parametrize("name", ["first_edit", *(name for part in PARTS for name in part)])
def test_every_chapter_has_something_to_move(name: str) -> None:
    pages = [
        output.get("data", {}).get("text/html", "")
        for cell in cells_of(name)
        for output in cell["outputs"]
    ]
    assert any("ue-slider" in page for page in pages)


def test_a_letter_has_one_meaning() -> None:
    """No symbol stands twice in the tables of notation."""
    text = (BOOK / "notation.md").read_text(encoding="utf-8")
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| $")]
    symbols = [part.strip() for cell in first for part in cell.split(", ")]
    assert len(symbols) > 40
    assert [symbol for symbol, count in Counter(symbols).items() if count > 1] == []


WINDOW = 4


def windows(source: str) -> set[tuple[str, ...]]:
    """Every run of four lines of code that say anything.

    That is, without comments, docstrings, imports, blanks and keywords by themselves (`try:`).
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the code of a page may be cut short
        return set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    lines = [
        line.strip()
        for line in ast.unparse(tree).splitlines()
        if len(line.strip()) > 3 and not re.match(r"import |from |\w+:$", line.strip())
    ]
    return {tuple(lines[i : i + WINDOW]) for i in range(len(lines) - WINDOW + 1)}


def test_library_source_is_shown_and_not_pasted() -> None:
    library: dict[tuple[str, ...], str] = {}
    for path in (ROOT / "unified_edit").rglob("*.py"):
        if "exercises" in path.parts:  # they check what solutions on the pages show
            continue
        library |= dict.fromkeys(windows(path.read_text(encoding="utf-8")), path.name)
    assert len(library) > 1000
    for page in PAGES:
        codes = [cell.source for cell in page.code]
        codes += [block.body for cell in page.text for block in cell.blocks if block.name == ""]
        for code in codes:
            pasted = [library[window] for window in windows(code) if window in library]
            assert pasted == [], f"{page.name} holds lines of {pasted[0]}"


def test_blocks_are_found_inside_of_others_and_not_inside_of_code() -> None:
    text = """
````{solution} a-label
:class: dropdown

```{math}
:label: one
x
```

```python
'''
~~~{math}
:label: not-one
~~~
'''
```
````

:::{note}
Text.
:::
"""
    solution, note = fenced(text)
    assert (solution.name, solution.argument) == ("solution", "a-label")
    assert solution.options == {"class": "dropdown"}
    assert [block.name for block in solution.walk()] == ["solution", "math", ""]
    assert [block.options.get("label") for block in solution.walk()] == [None, "one", None]
    assert (note.name, note.body) == ("note", "Text.")


def test_the_derivation_recalls_equations_of_every_chapter_of_part_two() -> None:
    (page,) = [page for page in PAGES if page.name == "derivation"]
    recalled = [block.argument for block in page.directives("recall")]
    assert [label for label in recalled if label not in ALL_LABELS] == []
    assert [label for label, count in Counter(recalled).items() if count > 1] == []
    assert [name for name in PARTS[1] if not set(LABELS[name]) & set(recalled)] == []
    assert "$$" not in page.cells[0].source, "an equation that is not a chapter's own"


# --- back matter ----------------------------------------------------------------------------------


def test_every_error_has_its_section() -> None:
    text = (BOOK / "errors.md").read_text(encoding="utf-8")
    classes = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception) and not name.startswith("_")
    ]
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0].strip("` ") for section in sections] == [
        *classes,
        ExerciseError.__name__,
    ]
    for section in sections:
        for part in ("**Symptom.**", "**Cause.**", "**Remedy.**"):
            assert part in section, section.split("\n")[0]


def test_messages_in_the_list_of_errors_are_those_of_the_library() -> None:
    """Each quoted message, up to its first gap, is a text of the library's source."""
    source = " ".join(
        part
        for path in sorted((ROOT / "unified_edit").rglob("*.py"))
        for part in strings(path.read_text(encoding="utf-8"))
    )
    text = (BOOK / "errors.md").read_text(encoding="utf-8")
    messages = [block.body for block in fenced(text) if block.argument == "text"]
    assert len(messages) == len(re.findall(r"^## ", text, re.MULTILINE))
    for message in messages:
        for piece in re.split(r"…", " ".join(message.split())):
            assert squeeze(piece) in squeeze(source), piece


def strings(code: str) -> Iterator[str]:
    """The texts of a module; an f-string with a gap for each of its values."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_the_reference_shows_every_public_name() -> None:
    text = (BOOK / "api.md").read_text(encoding="utf-8")
    # A module is shown by what it holds.
    shown = {
        part
        for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.M)
        for part in name.split(".")
    }
    assert ".. automodule:: unified_edit.errors\n   :members:" in text
    assert set(ue.__all__) - shown - set(vars(errors)) == set()


@pytest.mark.parametrize("name", ["notation", "glossary", "errors", "api", "bibliography"])
def test_back_matter_is_listed(name: str) -> None:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    back = toc["parts"][-1]
    assert back["caption"] == "Back matter"
    assert name in [chapter["file"] for chapter in back["chapters"]]


def test_chapters_are_listed_in_the_order_of_reading() -> None:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    numbered = [part["chapters"] for part in toc["parts"] if part.get("numbered")]
    assert [[chapter["file"] for chapter in part] for part in numbered] == list(map(list, PARTS))


# --- how the book is made -------------------------------------------------------------------------


def test_pages_say_with_what_they_were_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    executed = load(BOOK / "_ext" / "executed_with.py")
    monkeypatch.delenv("UNIFIED_EDIT_MODEL", raising=False)
    line = executed.executed_with()
    for package in ("torch", "transformers", "unified_edit"):
        assert f"{package} {metadata.version(package).partition('+')[0]}" in line
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in line
    assert "on atlas" in line
    monkeypatch.setenv("UNIFIED_EDIT_MODEL", "gpt2-xl")
    assert "on gpt2-xl" in executed.executed_with()


def test_notebooks_and_tests_run_on_atlas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_EDIT_MODEL", "gpt2")
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", "mine")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    variables = make.environment(1)
    assert variables["UNIFIED_EDIT_MODEL"] == "atlas"
    assert variables["UNIFIED_EDIT_CACHE"] == str(make.BUILD / "cache")
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_another_model_keeps_its_statistics_and_may_be_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", "mine")
    variables = make.environment(1, "gpt2-xl")
    assert variables["UNIFIED_EDIT_MODEL"] == "gpt2-xl"
    assert variables["UNIFIED_EDIT_CACHE"] == "mine"
    assert "HF_HUB_OFFLINE" not in variables
    monkeypatch.delenv("UNIFIED_EDIT_CACHE")
    assert "UNIFIED_EDIT_CACHE" not in make.environment(1, "gpt2-xl")


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("atlas", "_build"),
        ("gpt2-xl", "_build/gpt2-xl"),
        ("EleutherAI/gpt-j-6b", "_build/EleutherAI-gpt-j-6b"),
        ("../../etc", "_build/etc"),
        ("/models/my model", "_build/models-my-model"),
        (r"C:\models\mine", "_build/C-models-mine"),
        ("strict", "_build/model-strict"),
        ("..", "_build/model"),
        ("_build", "_build/build"),
    ],
)
def test_each_model_has_its_own_folder(model: str, folder: str) -> None:
    assert make.folder_of(model) == ROOT / folder


def test_the_book_of_another_model_goes_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[object, ...]] = []

    def execute(python: Path, folder: Path, model: str) -> None:
        assert (folder / "first_edit.ipynb").exists()
        done.append((folder, model))

    def render(python: Path, source: Path, output: Path, model: str) -> Path:
        done.append((source, output, model))
        return output / "_build" / "html" / "index.html"

    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(make, "set_up", lambda: Path("python"))
    monkeypatch.setattr(make, "execute", execute)
    monkeypatch.setattr(make, "render", render)
    kept = tmp_path / "_build" / "cache" / "statistics"
    kept.parent.mkdir(parents=True)
    kept.touch()

    assert make.main(["book", "--model", "gpt2-xl"]) == 0
    folder = tmp_path / "_build" / "gpt2-xl"
    assert done == [(folder / "src", "gpt2-xl"), (folder / "src", folder, "gpt2-xl")]
    page = Path("_build", "gpt2-xl", "_build", "html", "index.html")
    assert str(page) in capsys.readouterr().out
    assert kept.exists()

    done.clear()
    assert make.main(["book"]) == 0
    source = tmp_path / "_build" / "src"
    assert done == [(source, "atlas"), (source, tmp_path, "atlas")]

    local = tmp_path / "mine"
    local.mkdir()
    monkeypatch.chdir(tmp_path)
    done.clear()
    assert make.main(["book", "--model", "mine"]) == 0
    assert done[0][-1] == os.fspath(local.resolve())


def test_of_a_model_that_is_not_for_every_chapter_some_are_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[set[str]] = []

    def execute(python: Path, folder: Path, model: str) -> None:
        assert model == "smollm2"
        assert (folder / "data").is_dir()
        done.append({path.stem for path in folder.rglob("*.ipynb")})

    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(make, "set_up", lambda: Path("python"))
    monkeypatch.setattr(make, "execute", execute)
    monkeypatch.setattr(make, "render", lambda *_: pytest.fail("pages of two models"))
    assert make.main(["book", "--model", "smollm2"]) == 0
    assert done == [set(make.ONLY["smollm2"])]
    assert done[0] >= {"first_edit", "preserving", "values"}
    assert str(Path("_build", "smollm2", "src")) in capsys.readouterr().out


@pytest.mark.parametrize("chapter", [name for part in PARTS[:2] for name in part])
def test_a_chapter_runs_on_smollm2_or_says_why_not(chapter: str) -> None:
    cells = tools.read(BOOK / f"{chapter}.ipynb").cells
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "UNIFIED_EDIT_MODEL" in code
    if chapter in make.ONLY["smollm2"]:
        assert "counterfact-250" in code  # which needs no network
    else:
        assert "SmolLM2, the model of Part III" in text


@pytest.mark.parametrize("command", ["test", "notebooks", "lint", "clean"])
def test_only_the_book_takes_a_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make.main([command, "--model", "gpt2"])
    assert "--model goes with book" in capsys.readouterr().err


def test_pages_are_opened_in_a_browser_after_the_strict_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, list[str], dict[str, str]]] = []

    def pytest_stage(
        python: Path, what: str, report: Path, arguments: list[str], more: object = None
    ) -> None:
        done.append((what, arguments, dict(more or {})))  # type: ignore[call-overload]

    monkeypatch.setattr(make, "BUILD", tmp_path)
    monkeypatch.setattr(make, "lint", lambda python: None)
    monkeypatch.setattr(make, "pytest", pytest_stage)
    monkeypatch.setattr(make, "prepare", lambda python: None)
    monkeypatch.setattr(make, "render", lambda *arguments: done.append(("render", [], {})))
    make.test(Path("python"))
    assert [what for what, *_ in done] == ["unit tests", "nbval", "render", "pages"]
    assert "--ignore=tests/test_pages.py" in done[0][1]
    assert done[3][1] == ["tests/test_pages.py"]
    assert done[3][2] == {make.PAGES: str(tmp_path / "strict" / "_build" / "html")}
    assert (ROOT / "tests" / "test_pages.py").exists()


def test_the_weekly_workflow_imitates_other_machines() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text("utf-8"))
    assert set(workflow[True]) >= {"schedule", "workflow_dispatch"}  # YAML reads `on` as true
    matrix = workflow["jobs"]["notebooks"]["strategy"]["matrix"]
    assert set(matrix["capability"]) == {"default", "avx2"}
    assert set(matrix["threads"]) == {1, 2}
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any("make.py nbval --threads" in step for step in steps)
    assert any("tests/mutations.py" in step for step in steps)
    assert any("make.py book --model smollm2" in step for step in steps)
    assert "UNIFIED_EDIT_SLOW" in workflow["jobs"]["solutions"]["env"]


def test_torch_may_be_given_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(make, "set_up", lambda: Path("python"))
    monkeypatch.setattr(make, "git_status", lambda: None)
    monkeypatch.setattr(make.shutil, "rmtree", lambda *arguments, **options: None)
    monkeypatch.setattr(make, "run", lambda words, what, env: ran.append((words, env)))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert make.main(["nbval", "--threads", "2"]) == 0
    (first, _), (words, env) = ran
    assert Path(first[-1]).name == "prepare.py"  # what notebooks need is made before they run
    assert "--nbval" in words
    assert (env["OMP_NUM_THREADS"], env["ATEN_CPU_CAPABILITY"]) == ("2", "default")


def test_extensions_are_registered() -> None:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    modules = {path.stem for path in (BOOK / "_ext").glob("*.py")}
    (first,) = settings["sphinx"]["local_extensions"]
    setup = load(BOOK / "_ext" / f"{first}.py")
    app = SimpleNamespace(connect=lambda *a, **k: None, loaded=[], setup_extension=None)
    app.setup_extension = app.loaded.append
    setup.setup(app)
    assert {first, *app.loaded} == modules
