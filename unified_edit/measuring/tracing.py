"""Causal tracing: which activations carry a fact from its subject to the answer.

Three sorts of runs are compared (ROME, arXiv 2202.05262, sec. 2). In the *clean* run the model
reads the prompt and gives the object the probability P. In a *corrupted* run noise is added to
the embeddings of the subject's tokens, and the object becomes less probable. In a *restored* run
the noise is the same, but one activation, at one token and layer, is put back to what it was in
the clean run: how much of the probability returns says how much of the fact passes through there.

The runs themselves are made in `unified_edit.traced_runs`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.errors import MethodError
from unified_edit.facts.batches import check_items
from unified_edit.facts.facts import Fact
from unified_edit.measuring.traced_runs import KINDS, Prompt, Runs, read_prompt
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.likelihoods import next_token
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder, Row

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
    the place, and NaN intervals where only one has it. n: the number of facts that have it.
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
        of several layers, the layer is the middle one.
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
        gained = self.restored[_traced(kind, self.restored)]
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
    facts by place.
    """

    facts: tuple[TracedFact, ...]
    kinds: tuple[str, ...]
    window: int
    noise: float
    samples: int
    seed: int
    sigma: float

    def average(self, kind: str) -> Average:
        """Mean effect by place over the facts that have it, :eq:`locate-average`.

        Intervals are 2.5 % and 97.5 % quantiles over 2,000 resamples of the facts, seeded.
        Raises MethodError for a kind not traced.
        """
        import numpy as np

        _traced(kind, self.kinds)
        each = torch.stack([one.at_places(kind) for one in self.facts]).numpy()
        present = ~np.isnan(each[:, :, 0])
        value, low, high = (np.full(each.shape[1:], math.nan) for _ in range(3))
        for place in range(len(PLACES)):
            have = each[present[:, place], place]
            if len(have):
                value[place] = have.mean(axis=0)
            if len(have) > 1:
                drawn = np.random.default_rng(self.seed).integers(
                    len(have), size=(BOOTSTRAP, len(have))
                )
                means = have[drawn].mean(axis=1)
                low[place], high[place] = np.quantile(means, [0.025, 0.975], axis=0)
        return Average(value, low, high, tuple(int(count) for count in present.sum(axis=0)))

    def effects(self, kind: str) -> pd.DataFrame:
        """Effects of one kind as a table: a row a token (or place), a column a layer."""
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
        layer, effect, low, high, n, as in `average`.
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
                    for i in range(effect.shape[0]) for layer in range(effect.shape[1])
                ]  # fmt: skip
            else:
                average = self.average(kind)
                rows += [
                    {"kind": kind, "place": place, "layer": layer,
                     "effect": average.value[i, layer], "low": average.low[i, layer],
                     "high": average.high[i, layer], "n": average.n[i]}
                    for i, place in enumerate(PLACES) if average.n[i]
                    for layer in range(average.value.shape[1])
                ]  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, axes: Any = None) -> Any:
        """Heat maps side by side, one a kind, on one colour scale.

        axes: as many `Axes` as kinds, or None for a new figure. Returns the `Axes`, or an array
        of them if there are several kinds. See `unified_edit.figures.effect_maps`.
        """
        from unified_edit.measuring.figures import effect_maps

        titles = {"state": "residual stream", "mlp": "MLP", "attention": "attention"}
        frames = {
            titles[kind] + (f", windows of {self.window}" if self._windowed(kind) else ""):
            self.effects(kind)
            for kind in self.kinds
        }  # fmt: skip
        return effect_maps(frames, axes)

    def _windowed(self, kind: str) -> bool:
        return kind != "state" and self.window > 1

    def __repr__(self) -> str:
        clean = sum(one.clean for one in self.facts) / len(self.facts)
        corrupted = sum(one.corrupted for one in self.facts) / len(self.facts)
        what = self.facts[0].fact.text if len(self.facts) == 1 else f"{len(self.facts)} facts"
        return (
            f"Trace of {what} (noise of {self.noise:g} sigma, {self.samples} samples)\n"
            f"probability of the object: {clean:.2f} clean, {corrupted:.2f} corrupted"
        )


def subject_sigma(
    model: PreTrainedModel, tokenizer: Tokenizer, facts: Iterable[Fact] | Fact
) -> float:
    """The standard deviation of the embeddings of subjects, :eq:`locate-sigma`.

    Taken over all entries of the token embeddings of all subject tokens in the facts' prompts (a
    token that occurs twice counts twice), as in the released code of ROME.

    Raises FactError for no facts, TokenizationError if the model cannot read them, ModelError for
    a model that `anatomy` refuses.
    """
    parts = anatomy(model)
    encoder = Encoder(tokenizer, parts)
    return _sigma(parts, [read_prompt(encoder, fact) for fact in check_items(facts)])


def locate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    *,
    noise: float = 3.0,
    samples: int = 8,
    window: int = 1,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    sigma: float | None = None,
) -> Trace:
    """Find where `model`, as it is now, keeps facts: causal tracing over tokens and layers.

    What is followed is the probability of `fact.target_true` after `fact.text`; where that is
    None, of the token that the model itself finds most probable. (`fact.target_new` plays no part.)
    The probability of an object of several tokens is the geometric mean over them, as in every
    score of this library. A fact that the model does not know gives effects close to zero.

    noise: of the Gaussian noise, :eq:`locate-corruption`, in units of sigma. The same noise is
        used for all restorations of a fact; it depends on `seed` and the fact's text alone, so
        that a fact is traced alike by itself and in a list, given the same sigma.
    samples: how many draws of it.
    window: how many neighbouring layers are restored together (an odd number), for MLP and
        attention; fewer at the first and last layer. The residual stream is always restored at
        one layer, as in the released code of ROME.
    kinds: of `KINDS`.
    sigma: if not given, `subject_sigma` of the facts. For a single fact, that of a larger sample
        of facts is the better scale.

    The model's weights, hooks and flags are left as they are, also on an exception.

    Raises FactError for no facts or what are no facts, MethodError for a setting out of range,
    TokenizationError for a prompt or object that the model cannot read, and ModelError for a model
    that `anatomy` refuses or whose logits are NaN.
    """
    _check_settings(noise, samples, window, sigma)
    chosen = _check_kinds(kinds)
    parts = anatomy(model)
    encoder, items = Encoder(tokenizer, parts), check_items(facts)
    prompts = [read_prompt(encoder, fact) for fact in items]
    asked = _objects(parts, encoder, items, prompts)
    scale = _sigma(parts, prompts) if sigma is None else float(sigma)
    traced = []
    with torch.no_grad(), quiet(model), progress("tracing", len(items), "fact") as bar:
        for fact, prompt, (text, continuation) in zip(items, prompts, asked, strict=True):
            draws = noise * scale * _standard_noise(parts, fact, prompt, samples, seed)
            run = Runs(parts, prompt, continuation, draws)
            traced.append(
                TracedFact(
                    fact=fact,
                    object=text,
                    tokens=prompt.tokens,
                    subject=prompt.subject,
                    clean=run.clean,
                    corrupted_samples=run.corrupted,
                    restored=run.restored(chosen, window),
                    noise=draws,
                )
            )
            bar.update()
    return Trace(tuple(traced), chosen, window, float(noise), samples, seed, scale)


def _objects(
    parts: Anatomy, encoder: Encoder, facts: Sequence[Fact], prompts: Sequence[Prompt]
) -> list[tuple[str, Row]]:
    """The object of each fact as text, and the prompt with it."""
    own = [index for index, fact in enumerate(facts) if fact.target_true is None]
    rows = [Row(prompts[index].ids) for index in own]
    found = dict(zip(own, next_token(parts, rows), strict=True))
    objects = []
    for index, fact in enumerate(facts):
        if index in found:
            best = int(found[index].argmax())
            text = encoder.tokenizer.decode([best]).strip()
            objects.append((text, Row(prompts[index].ids, target=(best,))))
        else:
            text = cast(str, fact.target_true)
            objects.append((text, encoder.continuations([(fact.text, text)])[0]))
    return objects


def _sigma(parts: Anatomy, prompts: Sequence[Prompt]) -> float:
    ids = [i for one in prompts for i in one.ids[one.subject[0] : one.subject[1] + 1]]
    return float(parts.embeddings.detach()[ids].cpu().double().std())


def _standard_noise(parts: Anatomy, fact: Fact, prompt: Prompt, samples: int, seed: int) -> Tensor:
    """Standard normal noise (samples x subject tokens x width), by seed and the fact's text."""
    mixed = zlib.crc32(f"{seed} {fact.text}".encode())
    count = prompt.subject[1] - prompt.subject[0] + 1
    return torch.randn(
        samples,
        count,
        parts.embeddings.shape[1],
        generator=torch.Generator().manual_seed(mixed),
        dtype=torch.float64,
    )


def _traced(kind: str, kinds: Iterable[str]) -> str:
    if kind not in kinds:
        raise MethodError(f"{kind!r} was not traced; traced are {', '.join(kinds)}")
    return kind


def _check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    each = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not each or not set(each) <= set(KINDS) or len(set(each)) < len(each):
        raise MethodError(f"kinds is {kinds!r}; choose one or more of {KINDS}, each once")
    return each


def _check_settings(noise: float, samples: int, window: int, sigma: float | None) -> None:
    """Raise MethodError for a setting out of range."""

    def is_number(value: object, whole: bool) -> bool:
        kinds = (int,) if whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)

    if not is_number(noise, whole=False) or noise <= 0:
        raise MethodError(f"noise is {noise!r}; give a number above 0, in units of sigma")
    if not is_number(samples, whole=True) or samples < 1:
        raise MethodError(f"samples is {samples!r}; give a whole number, at least 1")
    if not is_number(window, whole=True) or window < 1 or window % 2 == 0:
        raise MethodError(
            f"window is {window!r}; give an odd number of layers, so that it has a middle"
        )
    if sigma is not None and (not is_number(sigma, whole=False) or sigma <= 0):
        raise MethodError(f"sigma is {sigma!r}; give a number above 0, or None to measure it")
