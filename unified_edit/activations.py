"""Reading and replacing activations, always cleaning up, also on an exception."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Name = TypeVar("Name", bound=Hashable)

#: Tokens (with padding) of one batched forward; bounds memory, does not change results.
BATCH_TOKENS = 8192


#: Passed to every forward: what the model's configuration says about outputs does not matter.
PLAIN_OUTPUT = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}


class _Stop(Exception):
    """Raised by a hook when everything that was asked for has been seen."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: some families return a tuple, some a tensor."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients on weights inside; every flag is put back after."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)


@contextmanager
def captured(
    sites: Mapping[Name, tuple[nn.Module, str]], stop: bool = True
) -> Iterator[dict[Name, Tensor]]:
    """Collect activations of a forward that runs inside the ``with`` block.

    `sites` maps a name to (module, ``"input"`` or ``"output"``); the dictionary that is yielded
    then maps the name to the tensor (batch x tokens x width). With `stop`, the forward ends as
    soon as the last of them was seen, and the ``with`` block is left there without an error.
    """
    seen: dict[Name, Tensor] = {}

    def keep(name: Name, value: Any) -> None:
        seen[name] = hidden_of(value)
        if stop and len(seen) == len(sites):
            raise _Stop

    with ExitStack() as stack:
        for name, (module, side) in sites.items():
            if side == "input":
                handle = module.register_forward_pre_hook(
                    lambda _module, args, name=name: keep(name, args)
                )
            else:
                handle = module.register_forward_hook(
                    lambda _module, _args, output, name=name: keep(name, output)
                )
            stack.callback(handle.remove)
        with suppress(_Stop):
            yield seen


@contextmanager
def stubbed(blocks: Sequence[nn.Module], last_output: Tensor, as_tuple: bool) -> Iterator[None]:
    """Inside, the given leading blocks cost nothing: the last of them returns `last_output`.

    The model's own forward still makes masks, positions and rotary tables, so the rest of the
    network runs as it always does. Works for every family because only the instances' forwards
    are replaced; they are put back on leaving.
    """

    def passing(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden,) if as_tuple else hidden

    def returning(_hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (last_output,) if as_tuple else last_output

    # an attribute of the instance hides the class's method; one may have been there before
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks[:-1]:
            block.forward = passing
        blocks[-1].forward = returning
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids, attention mask and position ids (each rows x longest) of left-padded rows.

    Position ids are always passed: GPT-2 counts positions from the left edge of the batch
    otherwise, and a padded row then gets other logits than the same row alone.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        if row:
            ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in batch.items()}


def batches_by_length(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Yield lists of indices of similar length, each with at most `tokens` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def read_last_token(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sites: Mapping[Name, tuple[nn.Module, str]],
) -> dict[Name, Tensor]:
    """Activations at the last token of each row of ids: {name: (rows x width)}.

    The rows are batched by length and left-padded; the forward stops at the deepest site.
    """
    found: dict[Name, dict[int, Tensor]] = {name: {} for name in sites}
    for batch in batches_by_length([len(row) for row in rows]):
        inputs = left_padded([rows[index] for index in batch], model.device)
        with captured(sites) as seen:
            model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        for name, value in seen.items():
            for position, index in enumerate(batch):
                found[name][index] = value[position, -1].clone()
    order = range(len(rows))
    return {name: torch.stack([at[i] for i in order]) for name, at in found.items()}
