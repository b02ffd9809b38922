"""The house that the library is: which floor may stand on which, and what may be used from outside.

What is read here is source, so that it also holds for imports that a test would not reach: those
inside of functions, and those for types only.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from book_source import Page, pages
from checkout import ROOT

import unified_edit as ue

PACKAGE = "unified_edit"
#: From the ground up: a floor stands on those before it and never on one behind it.
FLOORS = (
    "errors",
    "arguments",
    "objective",
    "facts",
    "model",
    "atlas",
    "statistics",
    "editing",
    "measuring",
    "running",
    "concepts",
    "relations",
    "teaching",
    "command_line",
)
LONGEST = 350  # lines of a module that can be read in one go


def module_name(path: Path) -> str:
    """The name under which a file of the library is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
#: The front door and the program: they lead to every floor, and nothing leads back to them.
OUTSIDE = {PACKAGE, f"{PACKAGE}.__main__"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def floor(module: str) -> int:
    """How high a module stands; the front door is above all floors."""
    return len(FLOORS) if module in OUTSIDE else FLOORS.index(module.split(".")[1])


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import of the library in one of its modules, wherever it stands."""
    is_package = FILES[module].name == "__init__.py"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *base.split(".")]).rstrip(".")
            whole = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else base for name in whole]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == PACKAGE)


def uses() -> Iterator[tuple[str, str, str]]:
    """Place, module, and what it imports, of all modules but those outside of the floors."""
    for module in FILES.keys() - OUTSIDE:
        for line, used in imports(module):
            yield f"{FILES[module].relative_to(ROOT).as_posix()}:{line}", module, used


# --- floors ---------------------------------------------------------------------------------------


def test_every_module_stands_on_a_floor() -> None:
    found = {name.split(".")[1] for name in FILES.keys() - OUTSIDE}
    assert found == set(FLOORS)


def test_imports_are_there_and_point_downward() -> None:
    upward = []
    for place, module, used in uses():
        assert used in FILES, f"{place} imports {used}, which is no module"
        if floor(used) > floor(module):
            upward.append(f"{place} imports {used}")
    assert sorted(upward) == []


def test_imports_lead_nowhere_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, module, used in uses():
        graph.setdefault(module, set()).add(used)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]), pytrace=False)


def test_nobody_inside_a_package_imports_the_package() -> None:
    """It would get what the package has made so far, which depends on who was imported first."""
    own = [
        f"{place} imports {used}"
        for place, module, used in uses()
        if used == module or module.startswith(f"{used}.")
    ]
    assert sorted(own) == []


@pytest.mark.parametrize("module", FILES)
def test_a_module_can_be_read_in_one_go(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{FILES[module].relative_to(ROOT)} has {lines} lines; divide it"


# --- the front door -------------------------------------------------------------------------------


PACKAGES = [PACKAGE, *(name for name, path in FILES.items() if path.name == "__init__.py")]


@pytest.mark.parametrize("name", dict.fromkeys(PACKAGES))
def test_public_names_are_there(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert [part for part in public if not hasattr(module, part)] == []
    assert len(set(public)) == len(public)
    assert set(public) <= set(dir(module))


def test_type_checkers_see_what_the_front_door_shows() -> None:
    """Names are fetched when they are asked for; what is imported there is for types only."""
    typed = {
        alias.asname or alias.name
        for node in ast.walk(TREES[PACKAGE])
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        for alias in node.names
    }
    assert typed == set(ue.__all__)


DEEP = re.compile(r"^\s*(?:from|import)\s+(unified_edit\.\w+\.[\w.]+)", re.MULTILINE)
BELOW = re.compile(
    r"^\s*from\s+unified_edit\.(\w+)\s+import|^\s*import\s+unified_edit\.(\w+)", re.M
)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_book_comes_in_by_the_front_door(page: Page) -> None:
    """Code that is run or shown imports `unified_edit`, or one name below it, nothing deeper."""
    codes = [cell.source for cell in page.code]
    blocks = [block for cell in page.text for block in cell.blocks]
    codes += [block.body for block in blocks if block.name in ("", "code", "code-block")]
    assert [name for code in codes for name in DEEP.findall(code)] == []
    below = {part for code in codes for parts in BELOW.findall(code) for part in parts if part}
    assert below <= {*ue.__all__, *FLOORS}


# --- the back door --------------------------------------------------------------------------------

PATCHERS = {"setattr", "delattr", "object", "patch"}  # of monkeypatch and of unittest.mock
OWN = {path.stem for path in (ROOT / "tests").glob("*.py")}


#: Private names of transformers for which it has no public one: GPT-J computes its attention in
#: float32 there, whatever the type of the model.
OF_OTHERS = {"_attn"}


def is_private(name: object) -> bool:
    """Whether the last part of a name says that it is nobody else's business."""
    last = name.rpartition(".")[2] if isinstance(name, str) else ""
    return last.startswith("_") and not last.endswith("__") and last not in OF_OTHERS


def patched(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what a test replaces in somebody else's module: the texts in the call."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in PATCHERS and re.search(
            r"\b(monkeypatch|patch|mock)\b", ast.unparse(node.func)
        ):
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
            yield from ((node.lineno, text) for text in texts if isinstance(text, str))


def reached(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what a test imports of others, and of what it takes out of an import.

    Python's own library is left out: an underscore may belong to a documented name there.
    """
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in sys.stdlib_module_names:
                    continue
                yield node.lineno, alias.name
                foreign.add((alias.asname or alias.name).split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module not in OWN:
            if (node.module or "").split(".")[0] in sys.stdlib_module_names:
                continue
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
                foreign.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", whole) and whole.split(".")[0] in foreign:
                yield node.lineno, whole


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_tests_leave_private_names_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {f"line {line} replaces {name}" for line, name in patched(tree) if is_private(name)}
    found |= {f"line {line} reaches for {name}" for line, name in reached(tree) if is_private(name)}
    assert sorted(found) == []


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("monkeypatch.setattr(values, '_losses', f)", ["_losses"]),
        ("monkeypatch.setattr('unified_edit.editing.values._losses', f)", ["_losses"]),
        ("mock.patch.object(values, '_losses')", ["_losses"]),
        ("monkeypatch.setattr(values, 'losses', '_f')", []),
        ("monkeypatch.setattr(values, '__call__', f)", []),
        ("from unified_edit.editing.values import _losses", ["_losses"]),
        ("from unified_edit.editing import values as v\nv._losses(1)", ["_losses"]),
        ("from reference import _own", []),
        ("import sys, torch\nself._own = sys._getframe(), torch.float64", []),
    ],
)
def test_what_is_private_is_seen(code: str, faults: list[str]) -> None:
    tree = ast.parse(code)
    names = [name for _, name in [*patched(tree), *reached(tree)] if is_private(name)]
    assert [name.rpartition(".")[2] for name in names] == faults
