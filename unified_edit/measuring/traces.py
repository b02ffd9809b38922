"""What causal tracing found: effects of one fact, and of several by place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unified_edit.errors import MethodError
from unified_edit.facts import Fact
from unified_edit.measuring.figures import effect_maps

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

#: The places by which facts of different length are aligned; see `TracedFact.places`.
PLACES = FIRST, MIDDLE, LAST, AFTER, FURTHER, END = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)

#: Resamples of facts behind an interval.
BOOTSTRAP = 2000


class Average(NamedTuple):
    """Effects of one kind averaged over facts, with their 95 % intervals.

    value, low, high: (places x layers), places in the order of `PLACES`; NaN where no fact has
    the place and in layers that were not traced, and NaN intervals where only one fact has it.
    n: the number of facts that have it.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TracedFact:
    """What tracing found for one fact.

    object: the text whose probability is followed.
    tokens: the prompt's tokens as text, T of them.
    subject: index of the first and of the last subject token.
    clean: probability of the object in the clean run.
    corrupted_samples: (samples,) its probability in each corrupted run.
    restored: kind -> (samples x T x layers), its probability in each restored run; for a window
        of several layers, the layer is the middle one. NaN in layers that were not asked for.
    noise: (samples x subject tokens x width), what was added to the embeddings.

    All tensors are float64 on the CPU.
    """

    fact: Fact
    object: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float
    corrupted_samples: Tensor
    restored: Mapping[str, Tensor]
    noise: Tensor

    @property
    def corrupted(self) -> float:
        """Probability of the object with noise on the subject, mean over the samples."""
        return float(self.corrupted_samples.mean())

    @property
    def total_effect(self) -> float:
        """What the noise takes away: clean minus corrupted probability, :eq:`locate-total`."""
        return self.clean - self.corrupted

    def effect(self, kind: str) -> Tensor:
        """What restoring gives back: (T x layers), :eq:`locate-indirect`.

        The probability of the object in the restored runs minus that in the corrupted runs with
        the same noise, mean over the samples. Raises MethodError for a kind not traced.
        """
        gained = self.restored[checked_kind(kind, self.restored)]
        return (gained - self.corrupted_samples[:, None, None]).mean(dim=0)

    @property
    def places(self) -> tuple[str | None, ...]:
        """The place in `PLACES` of each token; None for tokens before the subject.

        A subject of one token is its own last token. The prompt's last token is always "last
        token", also where it directly follows the subject or is part of it.
        """
        first, last = self.subject
        names: list[str | None] = []
        for index in range(len(self.tokens)):
            if index == len(self.tokens) - 1:
                names.append(END)
            elif index < first:
                names.append(None)
            elif index <= last:
                names.append(LAST if index == last else FIRST if index == first else MIDDLE)
            else:
                names.append(AFTER if index == last + 1 else FURTHER)
        return tuple(names)

    @property
    def labels(self) -> tuple[str, ...]:
        """The tokens; those of the subject carry a star."""
        first, last = self.subject
        return tuple(
            f"{token}*" if first <= index <= last else token
            for index, token in enumerate(self.tokens)
        )

    def at_places(self, kind: str) -> Tensor:
        """`effect` by place: (places x layers), a mean over the tokens of a place, NaN if none."""
        effect, places = self.effect(kind), self.places
        rows = []
        for place in PLACES:
            chosen = [index for index, name in enumerate(places) if name == place]
            rows.append(effect[chosen].mean(dim=0) if chosen else effect[0] * math.nan)
        return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Trace:
    """What `locate` found: one `TracedFact` a fact, and the settings.

    With one fact, `effects`, `table` and `plot` show its tokens; with several, averages over
    facts by place. `layers` are those that were restored, None for all; `windows` holds the kinds
    that have a window of their own, see `width`.
    """

    facts: tuple[TracedFact, ...]
    kinds: tuple[str, ...]
    window: int
    noise: float
    samples: int
    seed: int
    sigma: float
    windows: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None

    def width(self, kind: str) -> int:
        """How many neighbouring layers were restored together.

        Raises MethodError for a kind not traced.
        """
        usual = 1 if checked_kind(kind, self.kinds) == "state" else self.window
        return self.windows.get(kind, usual)

    def average(self, kind: str) -> Average:
        """Mean effect by place over the facts that have it, :eq:`locate-average`.

        Intervals are 2.5 % and 97.5 % quantiles over 2,000 resamples of the facts, seeded.
        Raises MethodError for a kind not traced.
        """
        checked_kind(kind, self.kinds)
        return averaged(torch.stack([one.at_places(kind) for one in self.facts]), self.seed)

    def effects(self, kind: str) -> pd.DataFrame:
        """Effects of one kind as a table: a row a token (or place), a column a layer.

        Columns of layers that were not traced are NaN.
        """
        import pandas as pd

        if len(self.facts) == 1:
            one = self.facts[0]
            rows, values = list(one.labels), one.effect(kind).numpy()
        else:
            average = self.average(kind)
            chosen = [index for index, n in enumerate(average.n) if n]
            rows, values = [PLACES[index] for index in chosen], average.value[chosen]
        name = "token" if len(self.facts) == 1 else "place"
        columns = pd.RangeIndex(values.shape[1], name="layer")
        return pd.DataFrame(values, pd.Index(rows, name=name), columns)

    def table(self) -> pd.DataFrame:
        """All effects, one a row.

        One fact: columns kind, position, token, place, layer, effect. Several: kind, place,
        layer, effect, low, high, n, as in `average`. Layers that were not traced are left out.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for kind in self.kinds:
            if len(self.facts) == 1:
                one = self.facts[0]
                effect = one.effect(kind)
                rows += [
                    {"kind": kind, "position": i, "token": one.tokens[i], "place": one.places[i],
                     "layer": layer, "effect": float(effect[i, layer])}
                    for i in range(effect.shape[0]) for layer in self._traced(effect.shape[1])
                ]  # fmt: skip
            else:
                average = self.average(kind)
                rows += [
                    {"kind": kind, "place": place, "layer": layer,
                     "effect": average.value[i, layer], "low": average.low[i, layer],
                     "high": average.high[i, layer], "n": average.n[i]}
                    for i, place in enumerate(PLACES) if average.n[i]
                    for layer in self._traced(average.value.shape[1])
                ]  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, axes: Any = None) -> Any:
        """Heat maps side by side, one a kind, on one colour scale; a column a traced layer.

        axes: as many `Axes` as kinds, or None for a new figure. Returns the `Axes`, or an array
        of them if there are several kinds. See `unified_edit.measuring.figures.effect_maps`.
        """
        titles = {"state": "residual stream", "mlp": "MLP", "attention": "attention"}
        frames = {}
        for kind in self.kinds:
            width, effects = self.width(kind), self.effects(kind)
            title = titles[kind] + (f", windows of {width}" if width > 1 else "")
            frames[title] = effects[self._traced(effects.shape[1])]
        return effect_maps(frames, axes)

    def _traced(self, n_layers: int) -> list[int]:
        return list(range(n_layers) if self.layers is None else self.layers)

    def __repr__(self) -> str:
        clean = sum(one.clean for one in self.facts) / len(self.facts)
        corrupted = sum(one.corrupted for one in self.facts) / len(self.facts)
        what = self.facts[0].fact.text if len(self.facts) == 1 else f"{len(self.facts)} facts"
        if self.layers is not None:
            what += f" in layers {', '.join(map(str, self.layers))}"
        return (
            f"Trace of {what} (noise of {self.noise:g} sigma, {self.samples} samples)\n"
            f"probability of the object: {clean:.2f} clean, {corrupted:.2f} corrupted"
        )


def checked_kind(kind: str, kinds: Iterable[str]) -> str:
    """`kind` itself; MethodError if it is none of those that were traced."""
    if kind not in kinds:
        raise MethodError(f"{kind!r} was not traced; traced are {', '.join(kinds)}")
    return kind


def averaged(effects: Tensor, seed: int) -> Average:
    """Effects (facts x places x layers, from `TracedFact.at_places`) as `Trace.average` has them.

    For facts that were traced one by one, with one sigma.
    """
    import numpy as np

    each = effects.numpy()
    present = ~np.isnan(each).all(axis=2)
    value, low, high = (np.full(each.shape[1:], math.nan) for _ in range(3))
    for place in range(len(PLACES)):
        have = each[present[:, place], place]
        if len(have):
            value[place] = have.mean(axis=0)
        if len(have) > 1:
            drawn = np.random.default_rng(seed).integers(len(have), size=(BOOTSTRAP, len(have)))
            means = have[drawn].mean(axis=1)
            low[place], high[place] = np.quantile(means, [0.025, 0.975], axis=0)
    return Average(value, low, high, tuple(int(count) for count in present.sum(axis=0)))
