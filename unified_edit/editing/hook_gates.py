"""When a hook layer takes the place of its weight: the published gate, and a causal one.

A hook layer holds W_h beside the weight W0 of a down-projection. At each token it knows the key x
and what it would change, (W_h - W0) x. Its gate opens where a score of that reaches a threshold.

**published** (arXiv 2403.05330; Syon-Li/CoachHook at 0f741a9). The score is

    Z = (M - mean(M)) / std(M),   M = ||(W_h - W0) x||,

with mean and (unbiased) standard deviation over the tokens of the sequence, whatever they are. So
it depends on what stands behind a token and on padding; n tokens reach at most (n - 1) / sqrt(n),
which is below 2.2 for n <= 6; and one token alone, as in decoding with a cache, has Z = 0 / 0. The
threshold starts at alpha = 2.2, and after each batch falls to the least of its prompts' largest Z.
Where the library itself runs texts, each is whole and without padding, so that what is written does
not depend on their company; the published code pads, and differs by that.

**causal**. The score is M itself, of the token alone, and the threshold the 1 - q quantile of M
over keys to preserve. It is made anew whenever W_h changes, so that it neither falls nor drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from unified_edit.errors import EditError, MethodError, brief
from unified_edit.model.anatomy import Anatomy
from unified_edit.objective import Metric

#: The gates by name.
GateName = Literal["causal", "published"]


def moved_by(moved: Tensor) -> Tensor:
    """M: how far each token's value is moved, (... x width) -> (...), in at least float32."""
    precise = torch.promote_types(moved.dtype, torch.float32)
    return torch.linalg.vector_norm(moved, dim=-1, dtype=precise)


def z_score(moved: Tensor) -> Tensor:
    """Z of each token in its sequence: (... x tokens x width) -> (... x tokens)."""
    size = moved_by(moved)
    apart = size - size.mean(dim=-1, keepdim=True)
    # torch.std warns of one token; this is the same number, NaN there
    variance = apart.square().sum(dim=-1, keepdim=True) / (size.shape[-1] - 1)
    return apart / variance.sqrt()


@dataclass(frozen=True)
class Gate:
    """A gate: it opens at the tokens whose `score` is at least the threshold of the layer.

    score: from what the tokens of a sequence are moved by (... x tokens x width), (... x tokens).
    causal: whether the score of a token is its own affair. start: the threshold before any batch.
    """

    name: GateName
    score: Callable[[Tensor], Tensor]
    causal: bool
    start: float


def gate_of(name: object, alpha: float) -> Gate:
    """The gate of that name; `alpha` is where the published threshold starts.

    Raises MethodError for another name.
    """
    if name == "causal":
        return Gate("causal", moved_by, True, float("inf"))
    if name == "published":
        return Gate("published", z_score, False, alpha)
    raise MethodError(f"gate is {brief(name)}; choose one of {get_args(GateName)}")


def quantile_threshold(scores: Tensor, q: float) -> float:
    """The 1 - q quantile of the scores of keys to preserve: (tokens,)."""
    return float(torch.quantile(scores.double(), 1 - q))


def fallen_threshold(before: float, best: Iterable[float]) -> float:
    """min(before, the least of the prompts' largest Z); prompts without any (NaN) do not count."""
    return min([before, *(one for one in best if one == one)])


@dataclass(frozen=True, eq=False)
class HookLayer:
    """What stands beside one weight W0.

    delta: W_h - W0 (d_out x d_in, float64, on the CPU). metric: of C0 + sum of K K' / lam over the
    facts written so far. threshold: at which the gate opens. temporary: it is always open.
    """

    delta: Tensor
    metric: Metric
    threshold: float
    temporary: bool = False
    _made: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def plus(self, delta: Tensor) -> HookLayer:
        """The layer with W_h moved by `delta`, validated."""
        moved = (self.delta + delta.to(self.delta)).contiguous()
        if not bool(torch.isfinite(moved).all()):
            raise EditError("W_h is not finite: use a larger ridge or a smaller clamp")
        return replace(self, delta=moved, temporary=False, _made={})

    def preserving(self, keys: Tensor, weight: float) -> HookLayer:
        """The layer with the cost of `weight` ||Delta K||^2 added for some keys (d_in x E)."""
        sum_ = self.metric.plus(keys, weight)
        # laid out as it is after a file was read: the same bits come of it then
        factor = sum_.factor.contiguous()
        return replace(self, metric=Metric.from_factor(factor, sum_.alive, sum_.dim))

    def moved(self, keys: Tensor) -> Tensor:
        """(W_h - W0) x of keys (... x d_in): (... x d_out), in their type and on their device."""
        matrix = self._made.get("matrix")
        if matrix is None or (matrix.device, matrix.dtype) != (keys.device, keys.dtype):
            matrix = self._made["matrix"] = self.delta.to(keys.dtype).to(keys.device)
        return linear(keys, matrix)

    def opens(self, gate: Gate, moved: Tensor) -> Tensor:
        """At which tokens: (... x tokens), bool."""
        return gate.score(moved) >= self.threshold

    def output(self, gate: Gate, keys: Tensor, given: Tensor) -> Tensor:
        """What the projection gives: W_h x where the gate is open, and `given` elsewhere."""
        moved = self.moved(keys)
        if self.temporary:
            return given + moved
        return torch.where(self.opens(gate, moved)[..., None], given + moved, given)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        held = [self.delta, self.metric.factor, *self._made.values()]
        return sum(one.numel() * one.element_size() for one in held)


class Hooks:
    """The hooks at the down-projections of one model, and the layers that they act by.

    layers: {layer: `HookLayer`}; what is put there is in force at once. Where there is none, the
    projection's output stays as it is.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.layers: Mapping[int, HookLayer] = {}
        self._handles: list[RemovableHandle] = []

    def register(self, parts: Anatomy, layers: Iterable[int]) -> None:
        """Put a hook at each of some layers."""
        for layer in layers:
            hook = parts.down(layer).register_forward_hook(partial(self._act, layer))
            self._handles.append(hook)

    def remove(self) -> None:
        """Take them out."""
        while self._handles:
            self._handles.pop().remove()

    def _act(self, layer: int, _module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        hook = self.layers.get(layer)
        return None if hook is None else hook.output(self.gate, args[0], output)

    def put(self, layer: int, hook: HookLayer) -> None:
        """The layers with one of them replaced."""
        self.layers = {**self.layers, layer: hook}

    @contextmanager
    def rollback(self) -> Iterator[None]:
        """If the block fails, the layers are as before."""
        before = self.layers
        try:
            yield
        except BaseException:
            self.layers = before
            raise

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, the hooks do nothing."""
        before, self.layers = self.layers, {}
        try:
            yield
        finally:
            self.layers = before
