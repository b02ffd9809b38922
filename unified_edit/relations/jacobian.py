"""The Jacobian do/ds of one prompt, at several blocks by one way back through the model.

o depends on s, the output of a block at the subject's last token, with everything else at that
block left as it is. What stands before that token does not depend on s: it is run once, without
gradients, and only the tokens from there on are differentiated (all of them where somebody's hooks
stand in the blocks: one may want whole texts). Backward from o with one row for
each of its coordinates gives all of do/ds, and on its way down passes the s of every block, so
that several layers cost what the lowest of them costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unified_edit.errors import ModelError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.beginnings import hooked
from unified_edit.model.hooks import captured, quiet, replaced_output
from unified_edit.model.prompts import Row
from unified_edit.relations.states import batch_of, run_prefix

#: Coordinates of o taken back together: on a CPU what they need stays in its caches (at the size of
#: SmolLM2 half the time of all 576 at once), on a card there is room for them.
CPU_COORDINATES, COORDINATES = 64, 256


@dataclass(frozen=True)
class Linearised:
    """What one prompt gives: {layer: do/ds (d x d)}, {layer: s (d,)}, and o (d,).

    Jacobians are at least float32; s and o are in the model's type.
    """

    jacobian: dict[int, Tensor]
    s: dict[int, Tensor]
    o: Tensor


def linearise(parts: Anatomy, row: Row, layers: Sequence[int]) -> Linearised:
    """do/ds of one prompt at each of the (ascending) layers.

    Raises ModelError for the last block, above which nothing is left to be linear, and for a
    Jacobian that is not finite.
    """
    chosen = parts.check_layers(layers)
    if chosen[-1] == parts.n_layers - 1:
        raise ModelError(
            f"block {chosen[-1]} is the last one: s must be the output of an earlier block, "
            f"0..{parts.n_layers - 2}"
        )
    last = {"o": (parts.blocks[parts.n_layers - 1], "output")}
    shared = 0 if hooked(parts.blocks) else row.subject
    at = row.subject - shared
    with quiet(parts.model):
        with torch.no_grad():
            batch = batch_of(parts, [row], shared, run_prefix(parts, row.ids[:shared]))
        nodes: dict[int, Tensor] = {}

        def opened(layer: int, hidden: Tensor) -> Tensor:
            s = hidden[:, at].clone()
            if not nodes:  # the lowest block: whatever lies below it is a constant
                s = s.detach().requires_grad_()
            nodes[layer] = s
            return torch.cat([hidden[:, :at], s[:, None], hidden[:, at + 1 :]], dim=1)

        # of the fused attentions' ways back not all can be batched; the plain one can
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
            for layer in chosen:
                change = lambda hidden, layer=layer: opened(layer, hidden)  # noqa: E731
                stack.enter_context(replaced_output(parts.blocks[layer], change))
            with captured(last) as seen:
                batch.run(parts)
            o = seen["o"][:, -1]
            found = _jacobians(o, [nodes[layer] for layer in chosen])
    if not all(bool(torch.isfinite(one).all()) for one in found):
        raise ModelError(
            "the Jacobian is not finite: the model's weights are damaged or overflow "
            f"{o.dtype}; load it again, or in a wider type"
        )
    return Linearised(
        dict(zip(chosen, found, strict=True)),
        {layer: nodes[layer].detach()[0] for layer in chosen},
        o.detach()[0],
    )


def _jacobians(o: Tensor, nodes: Sequence[Tensor]) -> list[Tensor]:
    """d o / d node, (d x d) for each node (1 x d), in at least float32."""
    d = o.shape[1]
    precise = torch.promote_types(o.dtype, torch.float32)
    found = [o.new_empty(d, d, dtype=precise) for _ in nodes]
    ones = torch.eye(d, dtype=o.dtype, device=o.device)[:, None]
    at_once = CPU_COORDINATES if o.device.type == "cpu" else COORDINATES
    for start in range(0, d, at_once):
        some = ones[start : start + at_once]
        grads = torch.autograd.grad(
            o, nodes, some, retain_graph=start + at_once < d, is_grads_batched=True
        )
        for whole, grad in zip(found, grads, strict=True):
            whole[start : start + at_once] = grad[:, 0]
    return found
