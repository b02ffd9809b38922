"""A grid of settings, and the cells it is made of: one evaluation each."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from unified_edit.arguments import as_list, as_path, real_number, whole_number
from unified_edit.editing.methods import Method
from unified_edit.editing.prefixes import Contexts
from unified_edit.editing.presets import METHODS
from unified_edit.errors import MethodError, brief
from unified_edit.model.tensor_files import read_json

#: Layers of one cell: None are the method's own for the model.
Layers = tuple[int, ...] | None

#: What becomes of the batches of a cell: each is edited into the base and taken out again, or they
#: follow each other into one model ("blind": without a history; "soft", "hard": with that one).
Course = Literal["base", "blind", "soft", "hard"]


@dataclass(frozen=True)
class Cell:
    """One evaluation of a grid: a method with these settings, so many records at a time.

    method: with this cell's ridge and layers in it. ridge, layers: as the grid names them; None is
    the method's own. history: what becomes of its batches (`Course`).
    """

    method: Method
    batch_size: int
    ridge: float | None = None
    layers: Layers = None
    seed: int = 0
    history: Course = "base"

    @property
    def name(self) -> str:
        """What the cell and its folder are called: ``EMMET_b10_lam0.5_l13-14_s0``."""
        parts = [re.sub(r"[^\w.+-]", "-", self.method.name), f"b{self.batch_size}"]
        parts += [] if self.history == "base" else [self.history]
        parts += [] if self.ridge is None else [f"lam{self.ridge:.12g}"]
        parts += [] if self.layers is None else ["l" + "-".join(map(str, self.layers))]
        return "_".join([*parts, f"s{self.seed}"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary."""
        return {**_shallow(self), "method": self.method.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """Inverse of `to_dict`."""
        layers = values["layers"]
        made = {**values, "layers": None if layers is None else tuple(layers)}
        return cls(**{**made, "method": Method.from_dict(values["method"])})


@dataclass(frozen=True)
class Grid:
    """Every combination of some methods, batch sizes, ridges, layers, seeds and histories.

    methods: each a `Method`, or the name of one in `METHODS`. batch_sizes: records edited together.
    ridges: lam of the least-squares form per mean C0, 0 the equality; None is the method's own.
    layers: groups of blocks such as (13, 14, 15), and single blocks; None are the method's own for
        the model.
    seeds: of the prefixes and of the intervals.
    histories: what becomes of batches. "base": each is edited into the unedited model, measured and
        taken out (`evaluate_edits`). "blind", "soft", "hard": they follow each other into one
        model, without a history or with that one, and all facts are asked about after the last
        (`evaluate_batches`). "soft" needs a lam: give equalities a grid of their own.

    A single thing may stand for a list of one. Raises MethodError for a name that is no method's,
    a number out of range, or an empty list.
    """

    methods: Sequence[Method]
    batch_sizes: Sequence[int] = (1,)
    ridges: Sequence[float | None] = (None,)
    layers: Sequence[Layers] = (None,)
    seeds: Sequence[int] = (0,)
    histories: Sequence[Course] = ("base",)

    def __post_init__(self) -> None:
        made = {
            "methods": tuple(_method(one) for one in _each(self.methods)),
            "batch_sizes": tuple(
                whole_number(one, "a batch size", MethodError, least=1)
                for one in as_list(self.batch_sizes)
            ),
            "ridges": tuple(
                None if one is None else real_number(one, "a ridge", MethodError, least=0)
                for one in as_list(self.ridges)
            ),
            "layers": tuple(_layers(one) for one in as_list(self.layers)),
            "seeds": tuple(
                whole_number(one, "a seed", MethodError, least=0) for one in as_list(self.seeds)
            ),
            "histories": tuple(_course(one) for one in as_list(self.histories)),
        }
        for name, values in made.items():
            if not values:
                raise MethodError(
                    f"{name} of the grid is empty; give at least one, or leave it out"
                )
            object.__setattr__(self, name, values)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The combinations, those that share the values of their facts beside each other."""
        order = itertools.product(
            self.methods, self.layers, self.seeds, self.ridges, self.batch_sizes, self.histories
        )
        return tuple(
            Cell(_changed(method, ridge, layers), size, ridge, layers, seed, history)
            for method, layers, seed, ridge, size, history in order
        )

    @classmethod
    def from_dict(cls, values: object) -> Grid:
        """A grid from a plain dictionary, as it stands in a file (`read_grid`)."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or "methods" not in values:
            raise MethodError(
                f"a grid is an object with methods and, where wanted, {', '.join(known[1:])}; got "
                f"{brief(values)}"
            )
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise MethodError(f"a grid has no {unknown[0]!r}; there is {', '.join(known)}")
        return cls(**values)


def cells_of(grids: Iterable[Grid] | Grid) -> tuple[Cell, ...]:
    """The cells of one or several grids, each once.

    Raises MethodError for no grid, and for two cells that are called the same and are not.
    """
    found: dict[str, Cell] = {}
    for grid in [grids] if isinstance(grids, Grid) else as_list(grids):
        if not isinstance(grid, Grid):
            raise MethodError(f"grid is {brief(grid)}; give a Grid, or a list of them")
        for cell in grid.cells:
            # folders are called by it, and not every system tells A from a
            known = found.setdefault(cell.name.lower(), cell)
            if known != cell:
                raise MethodError(
                    f"two cells of the grid would both be called {cell.name}, and differ in their "
                    "settings; give one of the methods another name: method.replace(name=...)"
                )
    if not found:
        raise MethodError("there is no grid to run: the list is empty. Give at least one Grid")
    return tuple(found.values())


def read_grid(path: str | os.PathLike[str]) -> tuple[Grid, ...]:
    """The grids of a JSON file: one object, or a list of them whose cells are run together.

        {"methods": ["ROME", {"method": "MEMIT", "name": "MEMIT at 17", "layers": [17]}],
         "batch_sizes": [1, 10], "ridges": [null, 1.0], "layers": [null, [3, 4]], "seeds": [0],
         "histories": ["base", "blind"]}

    Only `methods` is needed. A method is a name of `METHODS`, or an object with such a name and
    the fields of `Method` that differ. Raises MethodError for a file that cannot be read or says
    something else.
    """
    place = as_path(path, "the grid's file", MethodError)
    try:
        found = read_json(place)
    except (OSError, ValueError) as problem:
        raise MethodError(f"{place} cannot be read as a grid ({problem}); give JSON") from problem
    try:
        return tuple(Grid.from_dict(one) for one in _each(found))
    except MethodError as problem:
        raise MethodError(f"{place}: {problem}") from problem


def _each(found: object) -> list[Any]:
    """`as_list`, in which an object of JSON is a single thing."""
    return [found] if isinstance(found, Mapping) else as_list(found)


def _method(value: object) -> Method:
    """A method as it stands in a grid: itself, its name, or its name and what differs."""
    if isinstance(value, Method):
        return value
    given = dict(value) if isinstance(value, Mapping) else {"method": value}
    name = given.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise MethodError(
            f"{brief(value)} is no method; give one of {', '.join(METHODS)}, or in a file an "
            'object such as {"method": "EMMET", "name": "EMMET, wide", "clamp": 4}'
        )
    if isinstance(contexts := given.get("contexts"), Mapping):
        try:
            given["contexts"] = Contexts(**contexts)
        except TypeError as problem:
            raise MethodError(f"contexts of {name}: {problem}") from problem
    return METHODS[name].replace(**given)


def _course(value: object) -> Course:
    if value not in get_args(Course):
        raise MethodError(
            f"a history is {brief(value)}; choose among {', '.join(get_args(Course))}"
        )
    return cast("Course", value)


def _layers(value: object) -> Layers:
    if value is None:
        return None
    return tuple(whole_number(one, "a layer", MethodError, least=0) for one in as_list(value))


def _changed(method: Method, ridge: float | None, layers: Layers) -> Method:
    given = {"ridge": ridge, "layers": layers}
    changes = {name: value for name, value in given.items() if value is not None}
    return method.replace(**changes) if changes else method


def _shallow(cell: Cell) -> dict[str, Any]:
    values = {field.name: getattr(cell, field.name) for field in fields(cell)}
    return {**values, "layers": None if cell.layers is None else list(cell.layers)}
