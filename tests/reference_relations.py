"""The published estimator of a relation's matrix, written out: no cache, one backward a coordinate.

Hernandez et al., *Linearity of Relation Decoding in Transformer Language Models* (ICLR 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def forward(
    model: Any, blocks: Any, ids: list[int], layer: int, place: int, s: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(s, o) of one whole prompt, unpadded; with `s` put in at `place` of block `layer`."""
    seen: dict[str, Tensor] = {}

    def put(_module: Any, _args: Any, output: Any) -> Any:
        hidden = state(output)
        if s is not None:
            hidden = torch.cat([hidden[:, :place], s[None, None], hidden[:, place + 1 :]], dim=1)
        seen["s"] = hidden[0, place]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen["o"] = state(output)[0, -1].clone()

    handles = [blocks[layer].register_forward_hook(put), blocks[-1].register_forward_hook(keep)]
    try:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen["s"], seen["o"]


def jacobian(model: Any, blocks: Any, ids: list[int], layer: int, place: int) -> Tensor:
    """do/ds (d x d), one row of autograd at a time."""
    with torch.no_grad():
        s, _ = forward(model, blocks, ids, layer, place)
    leaf = s.detach().clone().requires_grad_()
    _, o = forward(model, blocks, ids, layer, place, leaf)
    rows = [torch.autograd.grad(o[k], leaf, retain_graph=True)[0] for k in range(len(o))]
    return torch.stack(rows)


def estimate(
    model: Any, blocks: Any, tokenizer: Any, template: str, examples: list[tuple[str, str]],
    layer: int, front: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W = mean of do/ds, b = mean of o - (do/ds) s: each example behind the others."""
    weights, biases = [], []
    for subject, _ in examples:
        others = [f"{template.format(a)} {b}" for a, b in examples if a != subject]
        prompt = "\n".join([*others, template.format(subject)])
        found = tokenizer(prompt, return_offsets_mapping=True)
        end = prompt.rindex(subject) + len(subject)
        place = max(
            i for i, (first, last) in enumerate(found["offset_mapping"]) if first < end <= last
        )
        ids = front + found["input_ids"]
        place += len(front)
        matrix = jacobian(model, blocks, ids, layer, place)
        with torch.no_grad():
            s, o = forward(model, blocks, ids, layer, place)
        weights.append(matrix)
        biases.append(o - matrix @ s)
    return torch.stack(weights).mean(0), torch.stack(biases).mean(0)
