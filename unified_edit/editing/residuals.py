"""What is missing at an edited layer: to which target, and what stands there now."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unified_edit.editing.keys import column_means, keys_of, values_at
from unified_edit.editing.plans import Plan
from unified_edit.editing.spreading import has_own_targets
from unified_edit.editing.values import Values
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, per_token, quiet, replaced_output
from unified_edit.objective import MetricProtocol, divided


class Goal(NamedTuple):
    """z (d_out x columns): what the site of `layer` shall give at the subject's last token."""

    layer: int
    z: Tensor


def goals_of(parts: Anatomy, plan: Plan, values: Values) -> list[Goal]:
    """The target that each edited layer is asked for.

    For all of them the value itself, unless the distribution gives each its own (`Spread`). Read
    before anything is written.
    """
    if not has_own_targets(plan.method.distribution):
        return [Goal(values.layer, values.z)] * len(plan.layers)
    return [Goal(values.layer, values.z), *_replayed(parts, plan, values)]


@torch.no_grad()
def _replayed(parts: Anatomy, plan: Plan, values: Values) -> list[Goal]:
    """What stands at the later layers when the value is set at the first: one forward a prompt.

    On the bare prompts, as `values_at` reads what is there now (FE, precompute_z.py).
    """
    later, site = plan.layers[1:], plan.method.site
    texts = [row.up_to_subject for row in plan.rows.bare]
    added = values.delta[:, list(plan.columns)].T
    found = {layer: torch.zeros_like(added) for layer in later}
    sites = {layer: (site(parts, layer), "output") for layer in later}
    for batch in batches_by_length([len(text) for text in texts]) if later else ():
        given = left_padded([texts[index] for index in batch], parts.model.device)

        def moved(hidden: Tensor, batch: list[int] = batch) -> Tensor:
            hidden = hidden.clone()
            hidden.view(len(batch), -1, hidden.shape[-1])[:, -1] += added[batch].to(hidden)
            return hidden

        with (
            quiet(parts.model),
            replaced_output(site(parts, values.layer), moved),
            captured(sites) as seen,
        ):
            parts.model.base_model(**given, use_cache=False, **PLAIN_OUTPUT)
        for layer in later:
            value = per_token(
                parts.model, seen.get(layer), given["input_ids"].shape, sites[layer][0], "output"
            )
            found[layer][batch] = value[:, -1].cpu().double()
    return [Goal(layer, column_means(found[layer].T, plan.columns)) for layer in later]


def missing(parts: Anatomy, plan: Plan, goal: Goal) -> Tensor:
    """What the MLP has still to give for a goal to be met: (d_out x columns)."""
    method = plan.method
    now = values_at(parts, plan.rows, goal.layer, method.site, method.output_mean)
    return goal.z - column_means(now, plan.columns)


def divided_residual(
    parts: Anatomy,
    plan: Plan,
    weight: NamedWeight,
    metric: MetricProtocol,
    keys: Tensor,
    residual: Tensor,
) -> Tensor:
    """The residual that makes the update hold at the keys of `divisor_mean` instead of `keys`."""
    mean = plan.method.divisor_mean
    if mean is None:
        return residual
    other = keys_of(parts, plan.rows, [weight.layer], mean)[weight.layer]
    held = column_means(other, plan.columns)
    return divided(metric, keys, held, residual, ridge=plan.ridge).cpu()
