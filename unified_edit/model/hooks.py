"""Reading and replacing activations: for the calling thread alone, always cleaned up.

A hook or a replaced forward belongs to a module, and a module to every thread that runs the model.
So all that is put in here acts only on forwards of the thread that put it in.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from unified_edit.errors import ModelError
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.families import FAMILIES

Name = TypeVar("Name", bound=Hashable)

#: Passed to every forward: what the model's configuration says about outputs does not matter.
PLAIN_OUTPUT = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


class _MaskedInFloat64(TorchFunctionMode):
    """Inside, attention scores of a float64 model survive that their softmax is taken in float32.

    What is masked is the lowest number of float64 there, which float32 does not have: a row that is
    masked wholly (padding) would be NaN, and 0 * NaN would reach the others. With the lowest number
    of float32 such a row is anything but NaN, and all others are what they were, bit for bit.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if given.get("dtype") is torch.float32 and getattr(func, "__name__", "") == "softmax":
            args = (args[0].clamp(min=torch.finfo(torch.float32).min), *args[1:])
        return func(*args, **given)


class _Stop(Exception):
    """Raised by a hook when everything that was asked for has been seen."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: some families return a tuple, some a tensor."""
    return output[0] if isinstance(output, tuple) else output


def lock_of(model: nn.Module) -> Any:
    """The lock that whatever switches the state of `model` for a while must hold; re-entrant."""
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients on weights, no autocast; every flag is put back after.

    One thread at a time for each model: another one that comes here waits. Flags that are right
    already are not touched.
    """
    with lock_of(model), ExitStack() as stack:
        training = [module for module in model.modules() if module.training]
        gradients = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for kind in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        own = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if own == "eager" and getattr(model, "dtype", None) == torch.float64:
            stack.enter_context(_MaskedInFloat64())
        try:
            for module in training:
                module.training = False
            for parameter in gradients:
                parameter.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in gradients:
                parameter.requires_grad_(True)


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
    own = threading.get_ident()

    def keep(name: Name, value: Any, side: str) -> None:
        if threading.get_ident() != own:
            return
        hidden = hidden_of(value)
        # a copy of what comes out: Falcon adds its attention to what its MLP gave, in place
        seen[name] = hidden.clone() if side == "output" else hidden
        if stop and len(seen) == len(sites):
            raise _Stop

    with ExitStack() as stack:
        for name, (module, side) in sites.items():
            if side == "input":
                handle = module.register_forward_pre_hook(
                    lambda _module, args, name=name: keep(name, args, "input")
                )
            else:
                handle = module.register_forward_hook(
                    lambda _module, _args, output, name=name: keep(name, output, "output")
                )
            stack.callback(handle.remove)
        with suppress(_Stop):
            yield seen


@contextmanager
def replaced_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `change` is applied to the hidden states that `module` gives, in this thread."""
    own = threading.get_ident()

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        if threading.get_ident() != own:
            return None
        hidden = change(hidden_of(output))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def noticing_tuples(block: nn.Module) -> Iterator[list[bool]]:
    """Yield a list that notes, at each forward of `block`, whether it gives a tuple."""
    returned: list[bool] = []
    own = threading.get_ident()

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == own:
            returned.append(isinstance(output, tuple))

    with block.register_forward_hook(note):
        yield returned


@contextmanager
def own_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` answers with `forward` in this thread, and as ever in all others."""
    own, usual = threading.get_ident(), module.forward
    # an attribute of the instance hides the class's method; one may have been there before
    before = module.__dict__.get("forward")

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (forward if threading.get_ident() == own else usual)(*args, **kwargs)

    try:
        module.forward = chosen
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before


@contextmanager
def one_kernel(modules: nn.Module) -> Iterator[None]:
    """Inside, activations that are written out in eight steps are computed by one, in this thread.

    Those of GPT-2 and GPT-J take as long on a CPU as one of the two products beside them. It is the
    same function; of a float32 the last two bits may differ.
    """
    fused = partial(functional.gelu, approximate="tanh")
    with ExitStack() as stack:
        for module in modules.modules():
            if type(module) is NewGELUActivation:
                stack.enter_context(own_forward(module, fused))
        yield


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

    with ExitStack() as stack:
        for block in blocks[:-1]:
            stack.enter_context(own_forward(block, passing))
        stack.enter_context(own_forward(blocks[-1], returning))
        yield


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Next-token logits (... x vocabulary) of final hidden states (... x width).

    They go through the model's own head, with whatever it does to them there (a softcap, a scale):
    its forward runs around a body that hands out `hidden`. OPT's asks the decoder within its body.
    """
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    body = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows)
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
    with ExitStack() as stack:
        for asked in {model.base_model, model.get_decoder()}:
            stack.enter_context(own_forward(asked, lambda *_args, **_kwargs: body))
        logits: Tensor = model(input_ids=ids, use_cache=False, **PLAIN_OUTPUT).logits
    return logits.reshape(*hidden.shape[:-1], -1)


def per_token(
    model: PreTrainedModel,
    value: Tensor | None,
    tokens: Sequence[int],
    module: nn.Module,
    side: str,
) -> Tensor:
    """What was captured at one side of `module`, as it is: (rows x tokens x width).

    Where the family hands its MLP one list of vectors for all rows, it is taken apart.

    Raises ModelError unless it is a vector for each of the `tokens` (rows, tokens) of a batch.
    """
    flat = FAMILIES[model.config.model_type].flat
    if flat and value is not None and value.ndim == 2 and len(value) == tokens[0] * tokens[1]:
        value = value.unflatten(0, tuple(tokens))
    if value is None or value.ndim != 3 or tuple(value.shape[:2]) != tuple(tokens):
        shape = "nothing" if value is None else tuple(value.shape)
        raise ModelError(
            f"the {side} of {type(module).__name__} is {shape}, where a vector for each of "
            f"{tuple(tokens)} tokens was expected (rows x tokens x width); this model cannot be "
            "read there"
        )
    return value


@torch.no_grad()
def read_last_token(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sites: Mapping[Name, tuple[nn.Module, str]],
) -> dict[Name, Tensor]:
    """Activations at the last token of each row of ids: {name: (rows x width)}.

    The rows are batched by length and left-padded; the forward stops at the deepest site.

    Raises ModelError for a module that does not give a vector for each token of each row.
    """
    found: dict[Name, dict[int, Tensor]] = {name: {} for name in sites}
    for batch in batches_by_length([len(row) for row in rows]):
        inputs = left_padded([rows[index] for index in batch], model.device)
        with captured(sites) as seen:
            model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        for name, (module, side) in sites.items():
            value = per_token(model, seen.get(name), inputs["input_ids"].shape, module, side)
            for position, index in enumerate(batch):
                found[name][index] = value[position, -1].clone()
    order = range(len(rows))
    return {name: torch.stack([at[i] for i in order]) for name, at in found.items()}


def of_one_length(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of rows that can be run together without padding."""
    found: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(len(row), []).append(index)
    return list(found.values())


@torch.no_grad()
def read_tokens(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    places: Sequence[int],
    sites: Mapping[Name, tuple[nn.Module, str]],
) -> dict[Name, Tensor]:
    """Activations at one place of each row of ids, run whole and unpadded: {name: (rows x width)}.

    Raises ModelError for a module that does not give a vector for each token of each row.
    """
    found: dict[Name, dict[int, Tensor]] = {name: {} for name in sites}
    for name, index, value in _row_by_row(model, rows, sites):
        found[name][index] = value[places[index]].clone()
    return {name: torch.stack([at[i] for i in range(len(rows))]) for name, at in found.items()}


@torch.no_grad()
def read_every_token(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sites: Mapping[Name, tuple[nn.Module, str]],
) -> dict[Name, list[Tensor]]:
    """Activations at all tokens of each row of ids, run whole and unpadded.

    {name: one (tokens x width) a row}. Raises ModelError for a module that does not give a vector
    for each token of each row.
    """
    found: dict[Name, dict[int, Tensor]] = {name: {} for name in sites}
    for name, index, value in _row_by_row(model, rows, sites):
        found[name][index] = value.clone()
    return {name: [at[i] for i in range(len(rows))] for name, at in found.items()}


def _row_by_row(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sites: Mapping[Name, tuple[nn.Module, str]],
) -> Iterator[tuple[Name, int, Tensor]]:
    """Site, number of the row, and what stands at its tokens (tokens x width), run unpadded."""
    for chosen in of_one_length(rows):
        inputs = left_padded([rows[index] for index in chosen], model.device)
        with captured(sites) as seen:
            model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        for name, (module, side) in sites.items():
            value = per_token(model, seen.get(name), inputs["input_ids"].shape, module, side)
            yield from ((name, index, value[place]) for place, index in enumerate(chosen))
