"""Exercises of the book: a solution for each; checks refuse the stub and pass the solution."""

from __future__ import annotations

import ast
import builtins
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from book_source import PARTS, Block, Page, notebooks
from checkout import ROOT
from torch import Tensor

import unified_edit as ue
from unified_edit import exercises
from unified_edit.teaching.exercises import ExerciseError, calling, checking

CHAPTERS = {page.name: page for page in notebooks()}
CALL = re.compile(r"^# (?P<call>ue\.exercises\.(?P<check>check_\w+)\((?P<function>\w+)\))")
HEAD = re.compile(r"^\*(●○○|●●○|●●●) · [1-9]\d* minutes\.\*")


@dataclass(frozen=True)
class Stub:
    """A code cell that a reader fills in, with its exercise and the exercise's solution."""

    chapter: str
    source: str
    check: str
    function: str
    exercise: Block | None

    def solution(self) -> str:
        """The code of the solution: the one Python block that defines the function.

        It is looked for in all chapters, so that an exercise may move to another one.
        """
        assert self.exercise is not None, "no exercise stands before the cell"
        label = self.exercise.options["label"]
        (solution,) = [
            block
            for chapter in CHAPTERS.values()
            for block in chapter.directives("solution")
            if block.argument == label
        ]
        codes = [
            block.body
            for block in solution.walk()
            if block.name == "" and block.argument == "python" and defines(block.body)
        ]
        (code,) = [code for code in codes if self.function in defines(code)]
        return code


def defines(code: str) -> set[str]:
    """Names of functions at the top of `code`."""
    return {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}


def stubs() -> list[Stub]:
    """Every stub of the book, in order."""
    found = []
    for chapter in CHAPTERS.values():
        latest: Block | None = None
        for cell in chapter.cells:
            for block in cell.blocks:
                latest = block if block.name == "exercise" else latest
            for line in cell.source.splitlines() if cell.kind == "code" else []:
                if match := CALL.match(line):
                    found.append(
                        Stub(chapter.name, cell.source, match["check"], match["function"], latest)
                    )
    return found


STUBS = stubs()
each_stub = pytest.mark.parametrize("stub", STUBS, ids=[stub.check for stub in STUBS])
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


def run(code: str, names: dict[str, Any], what: str) -> Any:
    """Execute `code`; the value of its last line, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, what, "exec"), names)
    return eval(compile(ast.Expression(last.value), what, "eval"), names) if last else None


# --- the book's exercises -------------------------------------------------------------------------


@each_stub
def test_the_unfilled_stub_is_refused(stub: Stub) -> None:
    assert stub.function in defines(stub.source)
    lines = [
        match["call"] if (match := CALL.match(line)) else line for line in stub.source.splitlines()
    ]
    with pytest.raises(ExerciseError, match=r"\w+ \w+"):
        run("\n".join(lines), {"ue": ue, "torch": torch}, "the stub")


@each_stub
def test_the_solution_passes_its_check(stub: Stub) -> None:
    names: dict[str, Any] = {"ue": ue}
    run(stub.solution() + "\n", names, "the solution")
    answer = run(f"ue.exercises.{stub.check}({stub.function})", names, "the check")
    assert re.match(r"Right\. \w.*", answer, re.DOTALL)


@each_stub
def test_a_stub_holds_nothing_but_the_function_and_its_check(stub: Stub) -> None:
    """So that the notebook runs from top to bottom with every exercise unsolved."""
    kinds = (ast.FunctionDef, ast.Import, ast.ImportFrom)
    assert all(isinstance(node, kinds) for node in ast.parse(stub.source).body)
    assert len(CALL.findall("\n".join(stub.source.splitlines()[-1:]))) == 1, "the check comes last"


def test_every_check_belongs_to_exactly_one_exercise() -> None:
    exported = {name for name in exercises.__all__ if name.startswith("check_")}
    used = Counter(stub.check for stub in STUBS)
    assert {name for name, count in used.items() if count > 1} == set()
    assert set(used) == exported


@each_chapter
def test_every_exercise_has_a_folded_solution_behind_it(name: str) -> None:
    blocks = [block for cell in CHAPTERS[name].text for block in cell.blocks]
    pairs = [block for block in blocks if block.name in ("exercise", "solution")]
    assert not [block.name for block in blocks if block.name.endswith(("-start", "-end"))]
    assert [block.name for block in pairs] == ["exercise", "solution"] * (len(pairs) // 2)
    for exercise, solution in zip(pairs[::2], pairs[1::2], strict=True):
        assert solution.argument == exercise.options["label"]
        assert solution.options.get("class") == "dropdown", solution.argument
        assert solution.body.strip()


@each_chapter
def test_every_exercise_has_a_title_a_difficulty_and_minutes(name: str) -> None:
    for exercise in CHAPTERS[name].directives("exercise"):
        assert exercise.argument, exercise.options
        assert HEAD.match(exercise.body), f"{exercise.argument}: {exercise.body[:40]!r}"


@each_chapter
def test_hints_are_folded(name: str) -> None:
    for admonition in CHAPTERS[name].directives("admonition"):
        if admonition.argument.startswith("Hint"):
            assert admonition.options.get("class") == "dropdown"


#: Chapters with fewer exercises, and with fewer that are checked: they are halves of one chapter,
#: and what *storage* asks is a matter of reading, not of writing a function.
FEWER = {
    "a_fact": (3, 1), "storage": (3, 0), "real_model": (3, 1), "real_locating": (4, 1),
    "real_edits": (4, 1),
    "one_fact": (4, 1), "mass_editing": (4, 1),
    "batches": (4, 1), "hook_layers": (4, 1),
    "four_corners": (4, 1), "breaks": (4, 1), "big_models": (4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for part in PARTS for name in part])
def test_a_chapter_has_four_exercises_and_two_checks(name: str) -> None:
    exercises, checks = FEWER.get(name, (4, 2))
    assert len(CHAPTERS[name].directives("exercise")) >= exercises
    assert len([stub for stub in STUBS if stub.chapter == name]) >= checks


def solution_codes(chapter: Page) -> list[str]:
    """Python blocks of the chapter's solutions."""
    return [
        block.body
        for solution in chapter.directives("solution")
        for block in solution.walk()
        if block.name == "" and block.argument == "python"
    ]


@each_chapter
def test_names_in_solutions_are_those_of_the_chapter(name: str) -> None:
    """Code of a solution may use what the chapter's cells have defined, and nothing else."""
    known = set(dir(builtins))
    for cell in CHAPTERS[name].code:
        known |= bound(ast.parse(cell.source))
    for code in solution_codes(CHAPTERS[name]):
        tree = ast.parse(code)
        used = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        assert used - known - bound(tree) == set()


def bound(tree: ast.AST) -> set[str]:
    """Every name that is given a meaning anywhere in the code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


@pytest.mark.slow
@each_chapter
def test_all_code_of_solutions_runs_behind_its_chapter(name: str, tmp_path: Path) -> None:
    """The chapter, then each solution as a cell of its own, in one kernel."""
    content = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
    codes = solution_codes(CHAPTERS[name])
    content.cells += [nbformat.v4.new_code_cell(code) for code in codes]
    path = tmp_path / "chapter.ipynb"
    shutil.copytree(ROOT / "book" / "data", tmp_path / "data")
    nbformat.write(content, path)
    command = [sys.executable, str(ROOT / "tools" / "notebooks.py"), "execute", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- what the checks share ------------------------------------------------------------------------


def test_the_checks_are_there_when_asked_for() -> None:
    """That they are not imported before is held by tests/test_frame.py."""
    assert ue.exercises is exercises
    with pytest.raises(AttributeError, match="no attribute 'exercise'"):
        _ = ue.exercise


def double(K: Tensor) -> Tensor:
    return 2 * K


def forgets_to_return(K: Tensor) -> None:
    2 * K


def stub(K: Tensor) -> None: ...


def works_in_place(K: Tensor) -> Tensor:
    K *= 2
    return K


def divides(K: Tensor) -> float:
    return 1 / (len(K) - 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "was given nothing: write the name"),
        (torch.ones(3), "was given a Tensor"),
        (lambda: 1, "must take 1 argument, and does not"),
        (lambda K, V: 1, r"missing a required argument: 'V'"),
        (forgets_to_return, "`forgets_to_return` returned nothing"),
        (stub, "`stub` returned nothing"),
        (lambda K: ..., "returned nothing"),
        (works_in_place, r"changed its argument `K`.*clone"),
        (divides, r"`divides` raised ZeroDivisionError: .*in the line `return 1 / \(len\(K\) - 3"),
    ],
    ids=range(9),
)
def test_functions_that_fail_are_told_why(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        calling.call(function, torch.ones(3))


def test_a_function_gets_copies_and_gives_back_its_result() -> None:
    K = torch.ones(3)
    assert torch.equal(calling.call(double, K), 2 * K)
    with pytest.raises(ExerciseError, match="changed"):
        calling.call(works_in_place, K)
    assert torch.equal(K, torch.ones(3))
    assert calling.call(len, [1, 2]) == 2
    assert calling.call(lambda K, *, lam: lam, K, lam=0.5) == 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["list"].append(1),
        lambda values: values["list"][0].zero_(),
        lambda values: values["array"].fill(0),
        lambda values: values["set"].add(2),
        lambda values: values.pop("set"),
        lambda values: values.update(nan=0.0),
    ],
)
def test_any_change_of_an_argument_is_noticed(change: Callable[[Any], Any]) -> None:
    values = {
        "list": [torch.tensor([1.0, math.nan])],
        "array": np.array([1.0, math.nan]),
        "set": {1},
        "nan": math.nan,
    }
    assert calling.call(lambda values: 1, values) == 1
    with pytest.raises(ExerciseError, match="changed its argument `values`"):
        calling.call(lambda values: (change(values), 1), values)


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (torch.ones(2, 3), (3, 2), r"must have shape \(3, 2\), yours has \(2, 3\): .*transpose"),
        (torch.ones(3, 1), (3,), r"yours has \(3, 1\): an axis of length one"),
        (torch.ones(2, 3, 4), (3, 2, 4), "axes are in another order"),
        (torch.ones(3), (), r"shape \(\) \(one number\).* one number is asked for"),
        (torch.ones(4), (3,), r"yours has \(4,\)$"),
        ((torch.ones(3), 1), (3,), "one tensor .*, and you returned a tuple of 2"),
        ("W", (3,), "you returned a str"),
        (torch.tensor([1.0, math.inf]), (2,), "must be finite"),
        (torch.ones(2, dtype=torch.complex64), (2,), "complex"),
    ],
    ids=range(9),
)
def test_results_of_another_shape_are_told_which(
    value: object, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ExerciseError, match=rf"W .*{message}"):
        checking.tensor(value, shape, "W")


def test_results_are_read_as_float64() -> None:
    for value in ([1, 2], np.array([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True)):
        read = checking.tensor(value, (2,), "W")
        assert torch.equal(read, torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert not read.requires_grad
    assert checking.number(np.float32(0.5), "lam") == 0.5


A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (A.T, "it is the transpose"),
        (-A, "its sign is the wrong way round"),
        (A / 2, r"it is 0\.5 times what it should be$"),
        (0 * A, "it is zero"),
        (A + 1, "the mean was subtracted"),
        (A + torch.eye(2), r"its entries differ from the right ones, by 0\.26 relative"),
    ],
    ids=range(6),
)
def test_wrong_results_are_told_how(got: Tensor, message: str) -> None:
    mistakes = {"this is right after all": A, "the mean was subtracted": A + 1}
    with pytest.raises(ExerciseError, match=rf"^W is not right: {message}"):
        checking.agree(got, A, "W", mistakes)


def test_right_results_agree() -> None:
    checking.agree(A * (1 + 1e-9), A, "W")
    checking.agree(0.0, 0.0, "lam")
    with pytest.raises(ExerciseError, match="you have 2, it should be 3"):
        checking.agree(2.0, 3.0, "lam", tolerance=1e-3)
    assert checking.right("All is well.") == "Right. All is well."
    assert torch.equal(checking.draw(0, 2, 3), checking.draw(0, 2, 3))
    assert checking.draw(0, 2, 3).dtype == torch.float64


def test_a_notebook_shows_the_message_alone() -> None:
    assert ExerciseError("W is zero")._render_traceback_() == ["ExerciseError: W is zero"]
