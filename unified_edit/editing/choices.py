"""What methods differ in by a function: each is an object with a name, and a user may write one.

A method and the files made with it know a choice by its name. The built-in ones can be given by
name alone: ``method.replace(distribution="pmet")`` is the same as giving the object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from unified_edit.errors import MethodError, brief


@dataclass(frozen=True)
class Choice:
    """A function under the name that tables and files know it by.

    Raises MethodError for a name that is no text, or no function.
    """

    name: str
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not callable(self.function):
            raise MethodError(
                f"a choice is a name and a function, not {brief(self.name)} and "
                f"{brief(self.function)}: Choice('mine', function)"
            )

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives."""
        return self.function(*arguments)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return repr(self.name)


def chosen(value: object, known: Mapping[str, Choice], field: str) -> Choice:
    """`value` as a choice: one that is, a function, or the name of a `known` one.

    Raises MethodError for anything else.
    """
    if isinstance(value, Choice):
        return value
    if isinstance(value, str) and value in known:
        return known[value]
    if callable(value):
        return Choice(getattr(value, "__name__", type(value).__name__), value)
    raise MethodError(
        f"{field} is {brief(value)}; choose one of {tuple(known)}, or give a function: "
        f"Choice('mine', function)"
    )


def remembered(name: str, known: Mapping[str, Choice], field: str) -> Choice:
    """The choice of that name in a file: a function of the user's own is not stored there."""

    def absent(*_arguments: object) -> NoReturn:
        raise MethodError(
            f"{field} {name!r} was a function of the caller's own, which a file does not hold; "
            f"give it again: method.replace({field}=...)"
        )

    return known.get(name) or Choice(name, absent)
