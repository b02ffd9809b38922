"""The edits of one UNet: the ledger of the library, for matrices that read text."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from unified_edit.concepts.cross_attention import Opened
from unified_edit.errors import ModelError
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.fingerprints import glance, model_fingerprint
from unified_edit.model.ledger import WeightLedger
from unified_edit.objective import Update, matmul


class Mapped(Protocol):
    """What the ledger needs to know of a concept edit: an identity and its one map D."""

    @property
    def id(self) -> str:
        """What tells this edit from others."""

    @property
    def text_map(self) -> Update:
        """D (d_text x d_text): every matrix W0 becomes W0 (I + D)."""


class UNetLedger(WeightLedger):
    """The base of the matrices of a UNet that read text, and the concept edits in force.

    `weights` are these matrices, as they were found when the pipeline was last opened.
    """

    weights: Mapping[str, NamedWeight]

    def named(self, name: str) -> NamedWeight:
        """The matrix of that name; raises ModelError if no such one of the UNet reads text."""
        if name not in self.weights:
            raise ModelError(
                f"this {type(self.model).__name__} has no matrix {name!r} that reads text; they "
                f"are called like {next(iter(self.weights))!r}"
            )
        return self.weights[name]

    @property
    def entries(self) -> tuple[InForce, ...]:
        """What is in force, in the order in which it was applied."""
        return tuple(entry for entry in self.active if isinstance(entry, InForce))


class InForce:
    """A concept edit as the ledger of a UNet sees it: its one map, as an update of each matrix."""

    def __init__(self, edit: Mapped, ledger: UNetLedger) -> None:
        self.edit = edit
        self.id = edit.id
        self.updates: Mapping[str, Update] = OfMatrices(edit.text_map, ledger)


class OfMatrices(Mapping[str, Update]):
    """One map D as an update of each matrix of a UNet: W0 D, made when it is asked for.

    The products have the same bits on every machine, so that a file that holds D alone gives the
    weights whose hashes it carries. Dense, those of Stable Diffusion XL take 3 GB: none is kept.
    """

    def __init__(self, text_map: Update, ledger: UNetLedger) -> None:
        self._map, self._ledger = text_map, ledger
        self._left: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Update:
        if name not in self._ledger.weights:
            raise KeyError(name)
        left = self._left.get(name)
        if left is None:
            base = self._ledger.base_weight(self._ledger.named(name)).cpu()
            left = matmul(base, self._map.left)
            if not self._map.is_dense:
                self._left[name] = left
        return Update(left, self._map.right, self._map.diagnosis)

    def __contains__(self, name: object) -> bool:  # that of `Mapping` would make the product
        return name in self._ledger.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._ledger.weights)

    def __len__(self) -> int:
        return len(self._ledger.weights)


_LEDGERS: weakref.WeakKeyDictionary[nn.Module, UNetLedger] = weakref.WeakKeyDictionary()

#: Of each text encoder, a glance at it and its fingerprint.
_ENCODERS: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def ledger_in(parts: Opened) -> UNetLedger:
    """The ledger of a pipeline's UNet; it lives as long as the UNet and does not keep it alive."""
    ledger = _LEDGERS.setdefault(parts.unet, UNetLedger(parts.unet))
    ledger.weights = parts.weights
    return ledger


def ledger_of_unet(unet: nn.Module) -> UNetLedger:
    """The ledger of a UNet that was opened before."""
    return _LEDGERS[unet]


def encoder_fingerprints(parts: Opened) -> tuple[str, ...]:
    """The fingerprints of a pipeline's text encoders, made once for each as it is."""
    found = []
    for encoder in parts.encoders:
        now = glance(encoder)
        before, fingerprint = _ENCODERS.get(encoder, (None, ""))
        if before != now:
            fingerprint = model_fingerprint(encoder)
            _ENCODERS[encoder] = (now, fingerprint)
        found.append(fingerprint)
    return tuple(found)
