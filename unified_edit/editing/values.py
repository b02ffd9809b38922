"""v*: the value that makes the model say the new object, optimised for all facts together.

For each fact, delta is added at the subject's last token to the output of one block (MEMIT,
EMMET) or of its MLP (ROME; every method where a norm follows the MLP, as in Gemma 2: what reaches
the block's output is norm(m + delta) - norm(m) then), and chosen by Adam to minimise

    mean over contexts of the mean over target tokens of -log p(token)
    + kl_weight * KL(current || initial), both read at the subject of "{subject} is a"
    + weight_decay * norm(delta) / norm(target_init)^2

(ROME, eq. 4; MEMIT, eq. 16; coefficients and order of steps as in their released code.) Facts of
one subject may be given one value (MEMIT-Merge, arXiv 2502.07322): its contexts are those of all of
them, each with the fact's own target, and target_init is the mean of theirs.

The loop stops for a fact when its total loss is below `stop_loss`, and always before the last
update; after each update delta is projected to norm(delta) <= clamp * norm(target_init). Two things
that ROME and MEMIT do not have are asked for by a method: an earlier stop (`early_stop`), and norms
that do not grow with edits (`anchors`).

What the published code recomputes at every step is constant and computed once (`prepared`). Logits
are made at target positions only. This changes the cost and not the result; `tests/test_values.py`
holds it against a literal transcription.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified_edit.editing.anchors import anchored
from unified_edit.editing.descent import descend
from unified_edit.editing.keys import SITES, column_means, values_at
from unified_edit.editing.methods import Method
from unified_edit.editing.prepared import prepare
from unified_edit.editing.sizes import batches_that_fit
from unified_edit.errors import FactError
from unified_edit.facts import Fact, members_of
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.devices import halving
from unified_edit.model.hooks import quiet
from unified_edit.model.progress import progress
from unified_edit.model.prompts import FactRows


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch of facts; columns are facts, or subjects where merged.

    delta, target_init: (d_out x columns, float64); the value to be written is their sum.
    losses: for each column its total loss at each step, the first at delta = 0.
    conditions: the model's state, prefixes and settings they were found under, as text.
    columns: for each fact the column of its value; without it, each has its own.
    """

    facts: tuple[Fact, ...]
    layer: int
    site: str
    delta: Tensor
    target_init: Tensor
    losses: tuple[tuple[float, ...], ...]
    conditions: str = ""
    columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.facts))))

    @property
    def z(self) -> Tensor:
        """v* at the site: (d_out x columns)."""
        return self.target_init + self.delta

    def of(self, facts: Sequence[Fact]) -> Values:
        """The values of some of the facts, in the order given; KeyError if one is missing.

        Raises FactError where only some of the facts that share a value are chosen: it was not
        found for these alone.
        """
        place = {fact: index for index, fact in enumerate(self.facts)}
        members = members_of(self.columns)
        wanted, kept, columns = set(facts), [], []
        for fact in facts:
            column = self.columns[place[fact]]
            merged = members[column] if len(members[column]) > 1 else []
            left_out = [self.facts[i] for i in merged if self.facts[i] not in wanted]
            if left_out:
                raise FactError(
                    f"{fact} shares its value with {left_out[0]}, which is left out; optimise the "
                    "values of the facts that are edited together"
                )
            if not merged or column not in kept:
                kept.append(column)
            columns.append(kept.index(column) if merged else len(kept) - 1)
        return replace(
            self,
            facts=tuple(facts),
            delta=self.delta[:, kept],
            target_init=self.target_init[:, kept],
            losses=tuple(self.losses[column] for column in kept),
            columns=tuple(columns),
        )

    @classmethod
    def joined(cls, each: Sequence[Values]) -> Values:
        """Values of several lists of facts as one, found under the same conditions."""
        before = itertools.accumulate((len(one.losses) for one in each), initial=0)
        return replace(
            each[0],
            facts=tuple(fact for one in each for fact in one.facts),
            delta=torch.cat([one.delta for one in each], dim=1),
            target_init=torch.cat([one.target_init for one in each], dim=1),
            losses=tuple(loss for one in each for loss in one.losses),
            columns=tuple(
                first + column
                for first, one in zip(before, each, strict=False)
                for column in one.columns
            ),
        )


def compute_values(
    parts: Anatomy,
    rows: FactRows,
    method: Method,
    conditions: str = "",
    columns: Sequence[int] = (),
) -> Values:
    """Optimise the values of the facts of `rows` for a resolved `method`.

    The loss is :eq:`value-loss`, the clamp :eq:`value-clamp`. Values do not influence each other: a
    batch gives what each gives alone. Deterministic. How many are optimised together follows from
    the memory that is free; where it runs out all the same, half as many are tried.

    columns: for each fact the number of its value, from 0, where some share one: the KL term is
        then read behind the subject as the first of them writes it. Without it, each has its own.

    Raises EditError if a loss is not finite, and ModelError if a single value does not fit.
    """
    layer, facts = method.value_layer, rows.facts
    columns = tuple(columns) or tuple(range(len(facts)))
    members = members_of(columns)
    texts = [[*(row for i in one for row in rows.behind[i]), rows.kl[one[0]]] for one in members]
    width, contexts = parts.weight(layer).d_out, len(rows.prefixes)
    losses: list[tuple[float, ...]] = [()] * len(members)
    bar = progress("optimising values", len(members), "fact")

    def optimise(chosen: Sequence[int]) -> None:
        batch = prepare(parts, [texts[index] for index in chosen], contexts, layer, method.site)
        firsts = [facts[members[index][0]] for index in chosen]
        counted = bar.n
        try:
            found, history = descend(parts, batch, method, firsts, bar)
        except Exception:
            bar.update(counted - bar.n)  # one that does not fit is begun again, in halves
            raise
        places = torch.tensor(chosen)
        delta[:, places] = found.T.cpu().double()
        init[:, places] = batch.target_init.T.cpu().double()
        for index, of_value in zip(chosen, history, strict=True):
            losses[index] = of_value

    # gradients are needed, whatever mode the caller is in
    with torch.inference_mode(False), quiet(parts.model), bar:
        delta = torch.zeros(width, len(members), dtype=torch.float64)
        init = torch.zeros_like(delta)
        for _ in halving(optimise, batches_that_fit(parts, texts, layer)):
            pass
        if method.norm_anchor:
            outputs = column_means(values_at(parts, rows, layer, SITES["mlp"]), columns)
            gain = parts.gain(layer, method.site(parts, layer))
            delta = gain * anchored(outputs, delta / gain, method.norm_anchor)
    return Values(facts, layer, method.site.name, delta, init, tuple(losses), conditions, columns)
