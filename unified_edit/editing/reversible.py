"""An edit that knows its ledger: put into its model, taken out bit for bit, used for a while."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import nn

from unified_edit.editing.provenance import Record, check_alone, check_arrived
from unified_edit.errors import EditError
from unified_edit.model.hooks import lock_of
from unified_edit.model.ledger import Entry, WeightLedger

OwnLedger = TypeVar("OwnLedger", bound=WeightLedger)


@dataclass(frozen=True, eq=False)
class Reversible(Generic[OwnLedger]):
    """What `Edit` and `ConceptEdit` have in common: each is bound to a model, and has an id there.

    The model is the module that has a ledger: the language model, or the UNet of a pipeline.
    """

    #: What it is applied to, as messages call it.
    _applied_to: ClassVar[str] = "model"

    # by name only: it has a default, and stands in front of the fields of those that inherit it
    _bound: weakref.ref[nn.Module] | None = field(default=None, repr=False, kw_only=True)

    def _described(self) -> Mapping[str, Any]:
        """Everything about the edit but its matrices, as JSON can hold it."""
        raise NotImplementedError

    def _ledger_of(self, model: Any) -> OwnLedger:
        """The ledger of a model that it is bound to."""
        raise NotImplementedError

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits, from everything that the edit does and comes from."""
        digest = hashlib.sha256(json.dumps(self._described(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @property
    def ledger(self) -> OwnLedger:
        """The ledger of the model that the edit is bound to; EditError if none is in memory."""
        found = self._found()
        if found is None:
            raise EditError(
                f"this edit is not bound to a {self._applied_to} in memory; say which: "
                f"edit.apply({self._applied_to})"
            )
        return found

    @property
    def is_applied(self) -> bool:
        """Whether it is in force in what it is bound to (False if that is gone)."""
        ledger = self._found()
        return ledger is not None and self._is_in(ledger)

    def apply(self, to: Any = None, /) -> Self:
        """Put the edit into a model, or into the one it is bound to; return the edit."""
        raise NotImplementedError

    def undo(self) -> Self:
        """Take the edit out again, bit for bit, whatever was applied after it; return the edit.

        Raises EditError if it is not applied, ModelChangedError if a touched weight was changed
        by something else (nothing is overwritten then).
        """
        ledger = self.ledger
        with lock_of(ledger.model):
            if not self._is_in(ledger):
                raise EditError("this edit is not applied, so it cannot be undone; apply it first")
            ledger.activate([edit for edit in ledger.active if edit.id != self.id])
        return self

    @contextmanager
    def applied(self) -> Iterator[Self]:
        """Inside, the edit is in force; after, the model or pipeline is as it was found.

        Meanwhile it belongs to this thread: others that ask or edit it wait. So do not wait inside
        for one of them.
        """
        with self.ledger.state_kept():
            if not self.is_applied:
                self.apply()
            yield self

    @contextmanager
    def undone(self) -> Iterator[Self]:
        """Inside, the edit is not in force; after, the model or pipeline is as it was found.

        As with `applied`, other threads wait meanwhile.
        """
        with self.ledger.state_kept():
            if self.is_applied:
                self.undo()
            yield self

    def _found(self) -> OwnLedger | None:
        """The ledger of the model that it is bound to, as long as that is in memory."""
        model = self._bound() if self._bound else None
        return None if model is None else self._ledger_of(model)

    def _is_in(self, ledger: OwnLedger) -> bool:
        return any(edit.id == self.id for edit in ledger.active)

    def _put_in(self, ledger: OwnLedger, entry: Entry, recorded: Record) -> Self:
        """Put it in behind the edits in force, as `entry`, if it still is what was recorded."""
        with lock_of(ledger.model):
            if self._is_in(ledger):
                raise EditError(
                    f"this edit is already applied to this {self._applied_to}; undo it first"
                )
            for name in recorded.weights:
                check_alone(ledger, ledger.named(name), entry, recorded)
            self._activate(ledger, ledger.active, entry, recorded)
        return self

    def _activate(
        self, ledger: OwnLedger, earlier: Sequence[Entry], entry: Entry, recorded: Record
    ) -> None:
        """Have it in force behind `earlier`, and no other; on any failure nothing has changed."""
        with ledger.rollback():
            ledger.activate((*earlier, entry))
            for name in recorded.weights:
                check_arrived(ledger, ledger.named(name), entry, earlier)
        object.__setattr__(self, "_bound", weakref.ref(ledger.model))
