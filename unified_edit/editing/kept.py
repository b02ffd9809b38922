"""What became of what was to be preserved by name: how far it moved, and what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.ledger import Ledger
from unified_edit.model.likelihoods import next_token
from unified_edit.model.prompts import Encoder, Row
from unified_edit.objective import Update

#: Rows whose distributions of the next token are made at a time.
_AT_ONCE = 64


@dataclass(frozen=True)
class Kept:
    """What became of one item that was to be preserved.

    columns: of its keys among those of all items. token, said: what the model found likeliest
    behind its prompt, its id and text; before, after: its probability without and with the edit.
    says: the likeliest token with the edit. moved: for each edited layer, ascending,
    norm(Delta k) / norm(W0 k), by how much the values of its keys were changed.
    """

    item: Fact | str
    columns: tuple[int, ...]
    token: int
    said: str
    before: float
    after: float
    says: str
    moved: tuple[float, ...]

    @property
    def prompt(self) -> str:
        """The item as text."""
        return self.item if isinstance(self.item, str) else self.item.text


class Said(NamedTuple):
    """What a model says behind a prompt: the likeliest token, as text, and a probability."""

    token: int
    text: str
    probability: float


def said_behind(
    parts: Anatomy, encoder: Encoder, rows: Sequence[Row], tokens: Sequence[int] | None = None
) -> list[Said]:
    """The likeliest token behind each row now; the probability is its own, or that of `tokens`."""
    found: list[Said] = []
    for start in range(0, len(rows), _AT_ONCE):
        for each in next_token(parts, rows[start : start + _AT_ONCE]):
            token = int(each.argmax())
            asked = token if tokens is None else tokens[len(found)]
            found.append(Said(token, encoder.tokenizer.decode([token]), float(each[asked])))
    return found


def moved_of(
    ledger: Ledger,
    updates: Mapping[str, Update],
    keys: Mapping[str, Tensor],
    columns: Sequence[Sequence[int]],
) -> list[tuple[float, ...]]:
    """For each item how far its values move at each weight, norm(Delta k) / norm(W0 k).

    updates, keys: {name: Delta}, {name: K_p (d_in x keys)}. columns: those of each item's keys.
    Layers ascend.
    """
    changes = []
    for weight in sorted(map(ledger.parts.named, updates), key=lambda weight: weight.layer):
        K, update = keys[weight.name], updates[weight.name]
        W0 = weight.to_stored(ledger.base_weight(weight)).cpu().double()
        changes.append((update.left.cpu() @ (update.right.cpu() @ K), W0 @ K))
    return [
        tuple(
            float(change[:, list(own)].norm() / value[:, list(own)].norm())
            for change, value in changes
        )
        for own in columns
    ]
