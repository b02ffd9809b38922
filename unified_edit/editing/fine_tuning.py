"""Fine-tuning as an edit: what the closed forms are compared with, undone and saved like them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from unified_edit.arguments import whole_number
from unified_edit.editing.edits import Edit
from unified_edit.editing.keys import keys_of
from unified_edit.editing.named import check_none
from unified_edit.editing.provenance import Outcome, provenance_of
from unified_edit.editing.tuning import FineTuning, tuned
from unified_edit.errors import EditError, ModelError
from unified_edit.facts import Fact, check_batch
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.prompts import Encoder
from unified_edit.objective import Diagnosis, Update

log = logging.getLogger(__name__)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    *,
    layer: int,
    norm: float | None,
    steps: int = 25,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    apply: bool = True,
    preserve: None = None,
) -> Edit:
    """Fine-tune the down-projection of one block on facts: the papers' baseline, as an `Edit`.

    The mean over facts of the mean over target tokens of -log p is lowered by Adam at the bare
    prompts, all facts together (`batch_size` of them in a step), until it is below 0.01 or for
    `steps` passes; after each step no entry of Delta is larger than `norm` in size. There is no
    chance in it, and so no seed. Edits already active stay.

    layer: the block. norm: of the released settings 2e-3, 1e-3, 5e-4 and 5e-5 for GPT-2 medium,
    large, XL and GPT-J, each at layer 0 (kmeng01/rome, hparams/FT, 2022-02-10 and 2022-07-30),
    with 25 steps and rate 5e-4; None: no bound. For another model choose it as everything else, on
    facts that are not scored. weight_decay: of Adam, on the weight. With `norm` it is FT+L of
    ROME's tables, with a decay and no norm the FT-W of MEMIT's (which trains the whole block 21 of
    GPT-J); both differ from the released code for targets of several tokens only, as
    `unified_edit.editing.tuning` says.

    What differs in the edit: `method` is a `FineTuning`; Delta is dense; `keys` are those of the
    bare prompts, for which nothing was solved, so that the numbers of its diagnosis are NaN and
    its form is "fine-tuning"; the losses of an outcome are those of the fact at each pass, its
    `clamped` says whether any entry of Delta stands at `norm`, and `relative_norm` is NaN.

    preserve: what `edit` preserves by name has no counterpart here, and is refused.

    Raises FactError for facts that contradict each other or cannot be tokenised, MethodError for
    settings out of range, ModelError for a model or layer that cannot be edited, EditError if the
    loss is not finite or nothing is to be done. The model is then, and with `apply=False`, bit for
    bit as it was.
    """
    check_none(
        preserve,
        "fine_tune",
        "it goes down a gradient, and what that does to a key is known only afterwards; a closed "
        "form holds Delta k = 0",
    )
    parts, items = anatomy(model), check_batch(facts)
    place = whole_number(layer, "fine_tune: layer", ModelError)
    how = FineTuning(
        layers=(parts.check_layers([place])[0],), norm=norm, steps=steps,
        learning_rate=learning_rate, weight_decay=weight_decay, batch_size=batch_size,
    )  # fmt: skip
    weight, ledger = parts.weight(place), ledger_of(model)
    with quiet(model):
        ledger.verify()
        state = ledger.state()
        rows = Encoder(tokenizer, parts).fact_rows(items, [""])
        before = likelihoods(parts, rows.bare)
        keys = keys_of(parts, rows, how.layers)[place]
        delta, losses = tuned(parts, weight, items, rows.bare, how)
        if not delta.any():
            raise EditError(
                "fine-tuning changes nothing: the model says every target already; give others"
            )
        update = Update(*_dense(delta), Diagnosis(math.nan, 0, math.nan, math.nan, "fine-tuning"))
        updates = {weight.name: update}
        with ledger.trying() as add:
            add(weight, update)
            after = likelihoods(parts, rows.bare)
        at_norm = norm is not None and float(delta.abs().max()) >= norm * (1 - 1e-5)
        outcomes = tuple(
            Outcome(loss, math.nan, at_norm, old.probability, new.probability, new.greedy)
            for loss, old, new in zip(losses, before, after, strict=True)
        )
        failed = sum(not outcome.likeliest for outcome in outcomes)
        warnings: tuple[str, ...] = ()
        if failed:
            warnings = (
                f"{failed} of {len(items)} facts did not take: their target is not the likeliest "
                "continuation (Edit.table). Try more steps, a larger norm, or another layer",
            )
            log.warning("%s", warnings[0])
        edit = Edit(
            facts=rows.facts,
            method=how,
            updates=updates,
            keys={weight.name: keys},
            outcomes=outcomes,
            provenance=provenance_of(
                ledger,
                [weight],
                updates,
                state=state,
                seed=0,
                prefixes=rows.prefixes,
                statistics={},
            ),
            warnings=warnings,
        ).bound_to(model)
        return edit.apply() if apply else edit


def _dense(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta as two factors, one of them an identity of the smaller side."""
    identity = torch.eye(min(delta.shape), dtype=delta.dtype)
    return (identity, delta) if delta.shape[0] <= delta.shape[1] else (delta, identity)
