"""Every check of the exercises against wrong answers of all kinds.

A wrong answer is the solution of the book, spoilt: of each check's calls of the reader's function,
those from the first, from the second, ... on. Whatever it is, the reader is told, by an
`ExerciseError`, and nothing is said that is not so.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from test_exercises import STUBS, run
from torch import Tensor

import unified_edit as ue
from unified_edit import exercises
from unified_edit.teaching.exercises import ExerciseError

MODULES = [
    importlib.import_module(f"{exercises.__name__}.{module.name}")
    for module in pkgutil.iter_modules(exercises.__path__)
]
CHECKS = sorted(
    name
    for module in MODULES
    for name, value in vars(module).items()
    if name.startswith("check_") and value.__module__ == module.__name__
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of five rows are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


each_check = pytest.mark.parametrize("check", CHECKS)
Change = Callable[[Any], Any]


# --- the solutions and what they answer -----------------------------------------------------------


@functools.cache
def solution(check: str) -> Callable[..., Any]:
    """The function of the book's solution, in whichever chapter the exercise stands."""
    (stub,) = [stub for stub in STUBS if stub.check == check]
    names: dict[str, Any] = {"ue": ue}
    run(stub.solution() + "\n", names, "the solution")
    function: Callable[..., Any] = names[stub.function]
    return function


@functools.cache
def calls(check: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Arguments and answer of every call that the check makes of the solution."""
    seen = []

    def listening(*given: Any) -> Any:
        answer = solution(check)(*given)
        seen.append((given, answer))
        return answer

    getattr(exercises, check)(listening)
    return seen


def answers(check: str) -> list[Any]:
    return [answer for _, answer in calls(check)]


def told(check: str, function: Any) -> str:
    """The message to somebody who hands in this function; any other error is let through."""
    with pytest.raises(ExerciseError) as problem:
        getattr(exercises, check)(function)
    message = str(problem.value)
    assert_sound(message)
    return message


def verdict(check: str, function: Any) -> str:
    """What the check says, right or wrong."""
    try:
        said: str = getattr(exercises, check)(function)
    except ExerciseError as problem:
        said = str(problem)
        assert_sound(said)
    return said


def assert_sound(message: str) -> None:
    """What no message may have, whatever the answer was."""
    assert len(message.replace("`", "")) < 460, message
    assert not re.search(r"(?<![\d.])1(\.0*)? times|\bnan\b|\binf\b|\s\s|\.\.|: :", message), (
        message
    )
    # a verb that does not fit its subject
    assert not re.match(r"the \w*[^s\W]s\b( of \d+ \w+)?,? (is|has) ", message), message
    assert not re.search(r"are not right: (it|its) |is not right: (they|their) ", message), message


def mapped(change: Change, answer: Any) -> Any:
    """The change, of each part of an answer."""
    if isinstance(answer, (tuple, list)):
        return type(answer)(mapped(change, part) for part in answer)
    return change(answer)


def same(a: Any, b: Any) -> bool:
    """Whether two answers cannot be told apart."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or not isinstance(b, (Tensor, float, int)):
        return a is b
    left, right = (torch.as_tensor(x).double() for x in (a, b))
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-7, atol=1e-12)


def from_call(first: int, check: str, change: Change) -> Callable[..., Any]:
    """The solution, but for a change of what it answers from the call number `first` on."""
    made = 0

    def reader(*given: Any) -> Any:
        nonlocal made
        made += 1
        answer = solution(check)(*given)
        return change(answer) if made > first else answer

    return reader


def spoilt(check: str, change: Change) -> Iterator[tuple[int, Callable[..., Any]]]:
    """The solution, its answers changed from the i-th call on; where that makes a difference."""
    for first in range(len(answers(check))):
        if all(same(answer, mapped(change, answer)) for answer in answers(check)[first:]):
            continue
        yield first, from_call(first, check, lambda answer: mapped(change, answer))


def numeric(change: Callable[[Any], Any]) -> Change:
    """A change of numbers; where True or False is asked for, the opposite."""
    return lambda x: not x if isinstance(x, bool) else change(x)


def as_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)


def noise(seed: int) -> Change:
    def draw(x: Any) -> Any:
        generator = np.random.default_rng(1000 + seed)  # not one of the examples
        found = torch.from_numpy(np.asarray(generator.standard_normal(as_tensor(x).shape)))
        return found if isinstance(x, Tensor) else float(found)

    return numeric(draw)


def is_verdict(check: str) -> bool:
    """Whether the answer is True or False."""
    return isinstance(answers(check)[0], bool)


# --- what is looked at ----------------------------------------------------------------------------


def test_every_check_is_tried() -> None:
    assert {name for name in exercises.__all__ if name.startswith("check_")} == set(CHECKS)
    assert len(set(CHECKS)) == len(CHECKS)
    assert min(len(calls(check)) for check in CHECKS) >= 2, "one example can be guessed"


# --- numbers --------------------------------------------------------------------------------------

#: What is said of a number that is off, and of nothing else.
OFF = (
    r"entries differ from the right ones, by [\d.e+-]+ relative to their norm",
    r"you have [\d.e+-]+, (it|they) should be [\d.e+-]+",
    r"entr(y is|ies are) off: at \[[\d, ]+\](, for one,)? you have [\d.e+-]+, and [\d.e+-]+ should",
    r"(it is|they are) too (large|small) by [\d.e+-]+ of the right value: was something small",
    r"(it|they) should be zero, and (its|their) largest entry is",
    r"Delta K misses R by .*, where 1e-08 is asked for. Keys that are less alike went well",
)
#: What may follow: a property that the result has to have, and whether this one has it.
PROPERTIES = (
    r"Delta [kK] = [rR] (does not hold: it is off|holds, and the update costs)",
    r"It must do to K what Delta does, and is off|It does to K what Delta does, and costs",
    r"Its objective is [\d.e+]+( times|  ?% more than) the smallest",
    r"The norm of W K - V is|W K can be V here, and misses it by|W K is as near to V as",
    r"W'k misses v by|W'k is v, but",
    r"The last share is 1, so they have to add|The last layer has to take all|They must be MEMIT's",
    r"There are no more digits in it than float32 holds",
    r"A share lies between 0 and 1|A sum of k k' is symmetric",
    r"Delta past must be zero, and is|Delta past = 0 holds",
    r"Delta must be zero above theta, and has|With mu = 0 Delta K must be R, and is off",
)


def assert_neutral(message: str) -> None:
    """No cause is named: only by how much the result is off, and what it should have been like."""
    found = [match for cause in OFF if (match := re.search(cause, message))]
    assert found, message
    rest = message[found[0].end() :]
    if ". " in rest and "Keys that are less alike" not in message:
        assert any(re.match(cause, rest.split(". ", 1)[1]) for cause in PROPERTIES), message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x: -x, r"sign"),
        (lambda x: 2 * x, r"(?<![\d.])2 times"),
        (lambda x: x / 2, r"(?<![\d.])0\.5 times|half"),
        (lambda x: -3 * x, r"-3 times"),
        (lambda x: 0 * x, r"zero"),
        (lambda x: x * (1 + 5e-4), r"(it is|they are) too large by 5\.0e-04 of"),
        (lambda x: x * (1 - 5e-4), r"(it is|they are) too small by 5\.0e-04 of"),
    ],
    ids="minus twice half thrice zero more less".split(),
)
@each_check
def test_a_multiple_is_called_a_multiple(check: str, change: Change, word: str) -> None:
    for _, reader in spoilt(check, numeric(change)):
        message = told(check, reader)
        if is_verdict(check):
            assert re.search(r"says (yes|no), and the answer is (yes|no)", message)
        else:
            assert re.search(word, message), message


@each_check
def test_of_noise_no_cause_is_named(check: str) -> None:
    for seed in (1, 2):
        for _, reader in spoilt(check, noise(seed)):
            message = told(check, reader)
            if not is_verdict(check):
                assert_neutral(message)


def one_entry(x: Any) -> Any:
    x = as_tensor(x).contiguous().clone()
    x.view(-1)[-1] += 0.37 * x.abs().max() + 0.1
    return x


def last_rows(x: Any) -> Any:
    x = as_tensor(x).contiguous().clone()
    if x.ndim:
        x[-1] += x.abs().max() * torch.arange(1.0, x[-1].numel() + 1).reshape(x[-1].shape) / 3
        return x
    return x + 0.37


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1 + abs(as_tensor(x)).max(),
        lambda x: 1.37 * x.abs() + 0.11 if isinstance(x, Tensor) else 1.37 * abs(x) + 0.11,
        one_entry,
        last_rows,
        lambda x: x + 0.01 * torch.sin(1e3 * as_tensor(x) + 1),
        lambda x: x.sort(0).values + 0.21 if isinstance(x, Tensor) and x.ndim else x + 0.21,
    ],
    ids="shifted bent entry row nearly sorted".split(),
)
@each_check
def test_of_what_fits_no_mistake_no_cause_is_named(check: str, change: Change) -> None:
    for _, reader in spoilt(check, numeric(change)):
        message = told(check, reader)
        if not is_verdict(check):
            assert_neutral(message)


@each_check
def test_one_answer_for_every_question_is_refused(check: str) -> None:
    first = answers(check)[0]
    assert told(check, lambda *given: first)


#: Whose answer is two things.
PAIRS = {
    "check_bridge", "check_frontier", "check_objective_errors", "check_paired_interval",
    "check_resampled_interval",
}  # fmt: skip


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: 2 * x, lambda x: 0 * x, noise(4)])
@each_check
def test_one_of_two_answers_is_enough_to_be_wrong(check: str, change: Change) -> None:
    pair = isinstance(answers(check)[0], tuple)
    for place in (0, 1) if pair else ():

        def change_one(answer: Any, place: int = place) -> Any:
            return tuple(change(part) if i == place else part for i, part in enumerate(answer))

        for first in range(len(calls(check))):
            assert " not right: " in told(check, from_call(first, check, change_one))
    assert pair == (check in PAIRS)


# --- shapes and types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x: x.T if isinstance(x, Tensor) and x.ndim == 2 else x, r"shape|transpose"),
        (lambda x: x[1:] if isinstance(x, Tensor) and x.ndim else x, r"must have shape"),
        (lambda x: x[..., :-1] if isinstance(x, Tensor) and x.ndim else x, r"must have shape"),
        (
            lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x,
            r"must have shape",
        ),
        (lambda x: x.sum() if isinstance(x, Tensor) else x, r"must have shape .* \(one number\)"),
        (lambda x: as_tensor(x)[..., None], r"an axis of length one is too many|must have shape"),
        (lambda x: as_tensor(x).expand(2, *as_tensor(x).shape), r"must have shape"),
        (lambda x: torch.zeros(0), r"must have shape"),
        (lambda x: torch.zeros(2, 0), r"must have shape"),
    ],
    ids="transposed row column twice scalar axis batch empty hollow".split(),
)
@each_check
def test_shapes_are_compared_before_values(check: str, change: Change, word: str) -> None:
    for _, reader in spoilt(check, lambda x: x if isinstance(x, bool) else change(x)):
        assert re.search(word, told(check, reader))


@pytest.mark.parametrize(("value", "everywhere"), [(math.nan, True), (-math.inf, False)])
@each_check
def test_what_is_not_finite_is_called_so(check: str, value: float, everywhere: bool) -> None:
    def change(x: Any) -> Any:
        x = as_tensor(x).contiguous().clone()
        x.view(-1)[0 if not everywhere else slice(None)] = value
        return x

    for _, reader in spoilt(check, change):
        message = told(check, reader)
        assert is_verdict(check) or "must be finite, and in yours there is NaN" in message


def unfinished() -> Iterator[int]:
    yield 1


NO_ANSWERS = [
    (None, "returned nothing: put your code in"),
    (..., "returned nothing: put your code in"),
    ([], "shape|two things are asked for|a list"),
    ([None], "a list|True or False"),
    (["1", "2"], "a list|a str|True or False"),
    ([[1.0], [1.0, 2.0]], "shape|a list|True or False"),
    ([torch.ones(2), torch.ones(3)], "a list|shape|True or False"),
    ("1.5", "a str"),
    ({"Delta": 1}, "a dict"),
    ({1, 2}, "a set"),
    (object(), "an object"),
    (Tensor, "you returned"),
    (len, "you returned"),
    (unfinished(), "a generator"),
    (1.5, "shape|you have|two things|True or False"),
    (3, "shape|you have|two things|True or False"),
    (np.ones(7), r"shape|two things|True or False"),
    (np.array(["a"]), r"a ndarray|two things|True or False"),
    (torch.ones(7), r"shape|two things|True or False"),
    (torch.tensor([True]), r"True or False|two things|says|of shape"),
    (torch.ones(2, dtype=torch.complex64), r"complex|two things|True or False"),
    (torch.ones(2, device="meta"), r"Tensor|two things|True or False"),
]


@each_check
def test_what_is_no_answer_at_all_is_called_so(check: str) -> None:
    last = len(calls(check)) - 1
    for value, word in NO_ANSWERS:
        for first in {0, last}:
            message = told(check, from_call(first, check, lambda answer, value=value: value))
            assert re.search(word, message), (value, message)


@pytest.mark.parametrize("value", [True, False])
@each_check
def test_a_verdict_is_no_number_and_a_number_no_verdict(check: str, value: bool) -> None:
    message = told(check, lambda *given: value)
    expected = r"says (yes|no), and" if is_verdict(check) else r"True or False|two things|a bool"
    assert re.search(expected, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.numpy() if isinstance(x, Tensor) else np.float64(x),
        lambda x: x.tolist() if isinstance(x, Tensor) else x,
        lambda x: as_tensor(x).to_sparse(),
        lambda x: torch.nn.Parameter(as_tensor(x)),
    ],
    ids="numpy list sparse parameter".split(),
)
@each_check
def test_right_numbers_are_right_in_any_container(check: str, change: Change) -> None:
    def reader(*given: Any) -> Any:
        answer = solution(check)(*given)
        return answer if isinstance(answer, bool) else mapped(change, answer)

    assert getattr(exercises, check)(reader).startswith("Right. ")


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_check
def test_rounded_answers_are_right_or_called_rounded(check: str, dtype: torch.dtype) -> None:
    def change(x: Any) -> Any:
        return x if isinstance(x, bool) else as_tensor(x).to(dtype)

    for _, reader in spoilt(check, change):
        assert re.match(r"Right\. |.*(float32|must be finite)", verdict(check, reader))


def in_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return [in_float32(part) for part in value] if isinstance(value, list) else value


@each_check
def test_single_precision_all_the_way_raises_nothing_else(check: str) -> None:
    said = verdict(check, lambda *given: solution(check)(*map(in_float32, given)))
    assert re.match(r"Right\. |.*(float32|enormous|says |has no inverse)", said)


# --- errors and arguments -------------------------------------------------------------------------


ERRORS: list[Exception] = [
    ValueError("no such thing"),
    KeyError("k"),
    AssertionError(),
    NotImplementedError(),
    ZeroDivisionError("division by zero"),
    RuntimeError("expected m1 and m2 to have the same dtype, but got: float != double"),
    torch.linalg.LinAlgError("the input matrix is singular"),
    RecursionError("maximum recursion depth exceeded"),
    StopIteration(),
]


@each_check
def test_an_error_of_the_reader_is_told_as_one(check: str) -> None:
    for problem in ERRORS:

        def fail(answer: Any, problem: Exception = problem) -> Any:
            raise problem

        for first in {0, len(calls(check)) - 1}:
            message = told(check, from_call(first, check, fail))
            zero = check == "check_harmonic" and isinstance(problem, ZeroDivisionError)
            expected = "divides by zero" if zero and first > 1 else type(problem).__name__
            assert expected in message
            assert ("`torch.zeros` and `torch.eye`" in message) == ("same dtype" in str(problem))


@each_check
def test_what_is_no_function_is_called_so(check: str) -> None:
    for value in (None, 1.5, "move", torch.ones(2), [len]):
        assert "the check wants your function itself" in told(check, value)


@each_check
def test_other_arguments_are_not_taken(check: str) -> None:
    wanted = len(calls(check)[0][0])
    assert f"must take {wanted} argument" in told(check, lambda: 1)
    extra = eval(f"lambda {', '.join(f'x{i}' for i in range(wanted + 1))}: 1")
    assert f"must take {wanted} argument" in told(check, extra)


def changed_in_place(value: Any) -> Iterator[Callable[[Any], None]]:
    """Every way to spoil an argument of this kind."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield lambda x: x.mul_(2).add_(1)
        else:
            yield lambda x: x.add_(1)
        yield lambda x: x.unsqueeze_(0)
        yield lambda x: x.view(-1)[-1:].fill_(7)
    if isinstance(value, list):
        yield lambda x: x.append(x[0])
        yield lambda x: x.clear()
        yield lambda x: x.__setitem__(0, None)
        if any(not same(a, b) for a, b in zip(value, value[::-1], strict=True)):
            yield lambda x: x.reverse()
        for change in changed_in_place(value[0]):
            yield lambda x, change=change: change(x[0])  # type: ignore[misc]


@each_check
def test_whoever_changes_an_argument_is_told_which(check: str) -> None:
    tried = 0
    for place, value in enumerate(calls(check)[0][0]):
        for change in changed_in_place(value):

            def reader(*given: Any, change: Any = change, place: int = place) -> Any:
                answer = solution(check)(*given)
                answer = answer.clone() if isinstance(answer, Tensor) else answer
                change(given[place])
                return answer

            assert "changed its argument" in told(check, reader)
            tried += 1
    assert tried or check == "check_harmonic", "three numbers cannot be changed"


# --- the mistakes that are known ------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A mistake that a check looks for: at which call, beside which result, and what it gives."""

    call: int
    expected: Tensor
    message: str
    wrong: Tensor


@functools.cache
def known(check: str) -> list[list[Known]]:
    """The mistakes of every comparison that the check makes; those that make no difference not."""
    module = importlib.import_module(getattr(exercises, check).__module__)
    original, found, made = module.agree, [], 0

    def listening(*given: Any) -> Any:
        nonlocal made
        made += 1
        return solution(check)(*given)

    def noting(
        got: Any, expected: Any, what: str, mistakes: Any = None, *rest: Any, **named: Any
    ) -> None:
        right = as_tensor(expected).double()
        entries = []
        for message, wrong in (mistakes or {}).items():
            for one in wrong if isinstance(wrong, tuple) else (wrong,):
                candidate = as_tensor(one).double()
                if candidate.shape == right.shape and not torch.allclose(candidate, right, 1e-5, 0):
                    entries.append(Known(made - 1, right, message, candidate))
        found.append(entries)
        original(got, expected, what, mistakes, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "agree", noting)
        getattr(exercises, check)(listening)
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / max(float(a.norm()), float(b.norm()), 1e-300))


@each_check
def test_no_two_mistakes_look_the_same(check: str) -> None:
    """Nor does one look like a common slip that has nothing to do with it."""
    alike = []
    for entries in known(check):
        for i, one in enumerate(entries):
            alike += [
                (one.message, other.message)
                for other in entries[i + 1 :]
                if other.message != one.message and distance(one.wrong, other.wrong) < 1e-4
            ]
    assert alike == []


@each_check
def test_a_known_mistake_is_told_when_it_is_made(check: str) -> None:
    for entries in known(check):
        for one in entries:
            place = [
                i
                for i, part in enumerate(flat(answers(check)[one.call]))
                if part.shape == one.expected.shape and distance(part, one.expected) < 1e-6
            ]
            if not place:
                continue  # compared in other coordinates

            def make(answer: Any, place: int = place[0], wrong: Tensor = one.wrong) -> Any:
                if not isinstance(answer, tuple):
                    return wrong
                return tuple(wrong if i == place else part for i, part in enumerate(answer))

            message = told(check, from_call(one.call, check, make))
            assert message.endswith(f" not right: {one.message}")


def flat(answer: Any) -> list[Tensor]:
    if isinstance(answer, bool):
        return []
    return [as_tensor(x).double() for x in (answer if isinstance(answer, tuple) else (answer,))]
