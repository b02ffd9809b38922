"""What the tests of bad input and of failures share.

`refused` asserts the exact class of an error, that its message holds the essential words (what was
wrong, where, what to do), and that nothing about the model or the process has changed
(`fixtures_tiny.snapshot`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fixtures_tiny import assert_unchanged, snapshot
from safetensors import safe_open
from torch import nn

import unified_edit as ue
from unified_edit.editing import Contexts
from unified_edit.errors import EditFileError, StatisticsFileError, UnifiedEditError
from unified_edit.statistics import KeyStatistics

SHORT: dict[str, Any] = {"steps": 4, "contexts": Contexts(starts=("The",), lengths=(4,))}
ONE = ue.EMMET.replace(layers=(1,), **SHORT)
SPREAD = ue.MEMIT.replace(layers=(0, 1, 2), ridge=1.0, **SHORT)
IN_TURN = ue.ROME.replace(layers=(1,), steps=4, contexts=Contexts(starts=("",), lengths=(4,)))
EVERY = pytest.mark.parametrize("method", [ONE, SPREAD, IN_TURN], ids=lambda method: method.name)

TOWER = ue.Fact("{} is in the city of", "The tower", "Rome", "Paris")
VIENNA = ue.Fact("{} was born in", "Vienna", "Madrid", "Oslo")
OSLO = ue.Fact("I walked from {} to the", "Oslo", "harbour", "river")
FACTS = [TOWER, VIENNA, OSLO]


def essential(text: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


@contextmanager
def refused(model: nn.Module, kind: type[BaseException], *words: str) -> Iterator[None]:
    """The block must raise exactly `kind` with all `words`, and leave `model` as it is."""
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind, f"{caught.type.__name__}: {caught.value}"
    essential(str(caught.value), words)
    assert_unchanged(model, before)


def by_name(value: Any) -> str:
    """An id for a parameter that is a dictionary of fields; none for its other values."""
    fields = value.items() if isinstance(value, dict) else ()
    return ",".join(f"{name}={given}" for name, given in fields)


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt where a test must be sure that it was its own."""


def raising(error: BaseException, at: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, whose call number `at` (from 1) raises `error` instead."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(*args, **kwargs)

    return called


def counted(original: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """`original`, and a list that grows by the arguments of each call."""
    calls: list[Any] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    return called, calls


def collect(model: nn.Module, tokenizer: Any, texts: Any, **more: Any) -> KeyStatistics:
    return KeyStatistics.collect(model, tokenizer, texts, [0, 1], **more)


def with_moments(statistics: KeyStatistics, moments: dict[int, Any]) -> KeyStatistics:
    """The same statistics with other matrices."""
    return KeyStatistics(statistics.source, moments, statistics.agreement)


def same_content(first: Path, second: Path) -> bool:
    """safetensors writes the metadata in any order, so bytes may differ."""
    both = []
    for path in (first, second):
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name).tolist() for name in handle.keys()}  # noqa: SIM118
            both.append((handle.metadata(), tensors))
    return both[0] == both[1]


@pytest.fixture(scope="session")
def kept_statistics(tiny_statistics, tmp_path_factory) -> Path:
    """The file of the statistics of `tiny`: for reading only."""
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    tiny_statistics.save(path)
    return path


@pytest.fixture(scope="session")
def ready_made(make_gpt2, tiny_tokenizer, tiny_statistics, tmp_path_factory) -> Path:
    """The file of an edit of `tiny` at one layer: for reading only."""
    path = tmp_path_factory.mktemp("edits") / "edit.safetensors"
    model = make_gpt2()
    ue.edit(model, tiny_tokenizer, FACTS, ONE, statistics=tiny_statistics, apply=False).save(path)
    return path


@pytest.fixture
def statistics_file(kept_statistics, tmp_path) -> Path:
    return Path(shutil.copy(kept_statistics, tmp_path / "statistics.safetensors"))


@pytest.fixture
def edit_file(ready_made, tmp_path) -> Path:
    return Path(shutil.copy(ready_made, tmp_path / "edit.safetensors"))


LOADERS: dict[str, tuple[Callable[[Path], Any], type[UnifiedEditError]]] = {
    "statistics": (KeyStatistics.load, StatisticsFileError),
    "edit": (ue.Edit.load, EditFileError),
}


@pytest.fixture(params=list(LOADERS))
def stored(request, statistics_file, edit_file):
    """(a file of the library's own, its loader, the error the loader raises)."""
    path = statistics_file if request.param == "statistics" else edit_file
    return path, *LOADERS[request.param]
