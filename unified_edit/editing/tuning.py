"""Plain fine-tuning of one matrix, the baseline of the papers: no keys, no values, no closed form.

Adam lowers the mean over facts of the mean over target tokens of -log p(token), at the bare
prompts, by changing the down-projection of one block and nothing else; after each step the
change is cut to |Delta_ij| <= norm, entry by entry. So does the released code of ROME and MEMIT
(kmeng01/rome 0874014 and kmeng01/memit 80426fd, baselines/ft; "FT+L" in ROME's tables), and
EasyEdit's after it. One thing is otherwise: theirs reads all tokens of a target off where the
prompt ends, here each is predicted behind the ones before it ("FT-M" in EasyEdit). For targets of
one token that is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from unified_edit.arguments import real_number, whole_number
from unified_edit.errors import EditError, MethodError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, quiet
from unified_edit.model.likelihoods import log_probabilities
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Row

#: Tokens (with padding) of one forward with gradients; bounds memory, does not change results.
GRADIENT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How one matrix is fine-tuned; what `Edit.method` is for edits made by `fine_tune`.

    layers: the block whose down-projection is trained.
    norm: no entry of Delta is larger in size; None: no bound.
    steps: passes over the facts at most.
    learning_rate: of Adam.
    weight_decay: of Adam, on the weight itself (not on Delta).
    batch_size: facts of one step.
    stop_loss: a batch below it takes no step, and training ends when the mean of a pass is.

    Raises MethodError for a setting out of range.
    """

    layers: tuple[int]
    norm: float | None
    steps: int = 25
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    batch_size: int = 128
    stop_loss: float = 1e-2

    def __post_init__(self) -> None:
        bounds: Mapping[str, dict[str, Any]] = {
            "learning_rate": {"above": 0}, "weight_decay": {"least": 0}, "stop_loss": {},
            **({} if self.norm is None else {"norm": {"above": 0}}),
        }  # fmt: skip
        made: dict[str, Any] = {
            name: real_number(getattr(self, name), f"fine_tune: {name}", MethodError, **bound)
            for name, bound in bounds.items()
        }
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            made[name] = whole_number(value, f"fine_tune: {name}", MethodError, least=1)
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """What it is called in the papers' tables: FT+L with a bound, FT-W with decay, else FT."""
        return "FT+L" if self.norm is not None else "FT-W" if self.weight_decay else "FT"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FineTuning:
        """Inverse of `to_dict`."""
        return cls(**{**values, "layers": tuple(values["layers"])})


class Tuned(NamedTuple):
    """delta: (d_out x d_in, float64). losses: of each fact at each pass, the first unchanged."""

    delta: Tensor
    losses: tuple[tuple[float, ...], ...]


def tuned(
    parts: Anatomy, weight: NamedWeight, facts: Sequence[Fact], rows: Sequence[Row], how: FineTuning
) -> Tuned:
    """Fine-tune `weight` on the targets of `rows`, one of each fact. The model is never written to.

    Deterministic: facts are taken in the order given. Raises EditError if a loss is not finite.
    """
    start = weight.parameter.detach()
    # Adam's steps are below what half precision resolves beside a weight
    change = torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
    optimizer = torch.optim.Adam([change], lr=how.learning_rate)
    losses: list[list[float]] = [[] for _ in rows]
    with torch.inference_mode(False), quiet(parts.model), progress(
        "fine-tuning", how.steps, "step"
    ) as bar:  # fmt: skip
        for step in range(how.steps):
            for first in range(0, len(rows), how.batch_size):
                places = range(first, min(first + how.batch_size, len(rows)))
                found, gradient = _losses(parts, weight, change, [rows[i] for i in places])
                for place, value in zip(places, found, strict=True):
                    losses[place].append(value)
                    if value != value or value == float("inf"):
                        raise EditError(
                            f"the loss of {facts[place].text!r} -> {facts[place].target_new!r} is "
                            f"{value} at step {step}; lower learning_rate or norm"
                        )
                if sum(found) / len(found) >= how.stop_loss:
                    change.grad = gradient.add(start + change, alpha=how.weight_decay)
                    optimizer.step()
                if how.norm is not None:
                    change.clamp_(-how.norm, how.norm)
            bar.update()
            if sum(one[-1] for one in losses) / len(losses) < how.stop_loss:
                break
    delta = weight.to_stored(change.detach().cpu().double())
    if how.norm is not None:
        delta = delta.clamp(-how.norm, how.norm)  # float32 rounds the bound itself, upward perhaps
    return Tuned(delta, tuple(map(tuple, losses)))


def _losses(
    parts: Anatomy, weight: NamedWeight, change: Tensor, rows: Sequence[Row]
) -> tuple[list[float], Tensor]:
    """The loss of each row with `change` on the weight, and the gradient of their mean there."""
    found = [0.0] * len(rows)
    total = torch.zeros_like(change)
    for chosen in batches_by_length([len(row.ids) for row in rows], GRADIENT_TOKENS):
        with torch.enable_grad():
            leaf = change.detach().requires_grad_()
            each = torch.stack(list(_of_rows(parts, weight, leaf, [rows[i] for i in chosen])))
            (gradient,) = torch.autograd.grad(each.sum() / len(rows), leaf)
        total += gradient
        for place, value in zip(chosen, each.tolist(), strict=True):
            found[place] = value
    return found, total


def _of_rows(
    parts: Anatomy, weight: NamedWeight, change: Tensor, rows: Sequence[Row]
) -> Iterator[Tensor]:
    """-log p of the target's tokens, the mean over them, of each row."""
    body, parameter = parts.model.base_model, weight.parameter
    name = next(name for name, one in body.named_parameters() if one is parameter)
    moved = (parameter.detach() + change).to(parameter.dtype)
    given = {**left_padded([row.ids for row in rows], parts.model.device), "use_cache": False}
    output = functional_call(body, {name: moved}, kwargs={**given, **PLAIN_OUTPUT})
    for hidden, row in zip(output.last_hidden_state, rows, strict=True):
        target = torch.tensor(row.target, device=hidden.device)
        found = log_probabilities(parts, hidden[-len(target) :], checked=False)
        yield -found.gather(1, target[:, None]).mean()
