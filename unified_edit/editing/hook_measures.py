"""At which tokens gates of hook layers open: what thresholds are made from and held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from unified_edit.editing.editor import Editor
from unified_edit.editing.hook_gates import Gate, HookLayer, quantile_threshold
from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, of_one_length, per_token
from unified_edit.model.prompts import Encoder
from unified_edit.statistics.key_sample import KeySample, collect_sample, ends_at, keys_in

if TYPE_CHECKING:
    import pandas as pd

#: Keys whose scores are made at a time.
_AT_ONCE = 4096


class Opened(NamedTuple):
    """At how many of some tokens gates open.

    tokens: how many there are. share: {layer: which part of them}.
    """

    tokens: int
    share: dict[int, float]


@dataclass(frozen=True, eq=False)
class Preserved:
    """Keys to preserve: a sample of ordinary text without the last tokens of edited subjects.

    used: which tokens of the sample count, (tokens,) bool.
    """

    sample: KeySample
    used: Tensor

    @classmethod
    def of(cls, sample: KeySample, subjects: Iterable[str]) -> Preserved:
        """A sample without the last tokens of some subjects."""
        return cls(sample, ~sample.ends(subjects))

    def without(self, subjects: Iterable[str]) -> Preserved:
        """The same without those of some more subjects."""
        return Preserved(self.sample, self.used & ~self.sample.ends(subjects))

    def threshold(
        self, layer: int, hook: HookLayer, gate: Gate, q: float, device: torch.device
    ) -> float:
        """The 1 - q quantile of the scores of the keys at a layer.

        Raises StatisticsError where all keys belong to edited subjects.
        """
        keys = self.sample.keys[layer]
        scores = [gate.score(hook.moved(some.to(device))).cpu() for some in keys.split(_AT_ONCE)]
        kept = torch.cat(scores)[self.used]
        if not len(kept):
            raise StatisticsError(
                "all tokens of the texts to preserve are edited subjects; give other texts"
            )
        return quantile_threshold(kept, q)


@torch.no_grad()
def scores_of(
    parts: Anatomy,
    rows: Sequence[Sequence[int]],
    layers: Mapping[int, HookLayer],
    gate: Gate,
) -> dict[int, list[Tensor]]:
    """Scores at each layer of all tokens of each row, run without padding, as the model is now.

    {layer: one (tokens,) a row}.
    """
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    sites = {layer: (parts.down(layer), "input") for layer in layers}
    for chosen in of_one_length(rows):
        inputs = left_padded([rows[index] for index in chosen], parts.model.device)
        with captured(sites) as seen:
            parts.model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        for layer, (module, _) in sites.items():
            keys = per_token(
                parts.model, seen.get(layer), inputs["input_ids"].shape, module, "input"
            )
            scores = gate.score(layers[layer].moved(keys)).cpu()
            for place, index in enumerate(chosen):
                found[layer][index] = scores[place]
    return found


def sampled(
    editor: Editor,
    texts: Iterable[str],
    layers: Sequence[int],
    count: int,
    seed: int,
    *,
    kept: bool,
) -> KeySample:
    """A sample of the base model's keys on some texts; with `kept`, made once for the model."""
    key = ("key sample", editor.ledger.fingerprint(), tuple(layers), count, seed)
    found: KeySample | None = editor.memory.get(key) if kept else None
    if found is None:
        encoder = Encoder(editor.tokenizer, editor.parts)
        with editor.ledger.base_state():
            found = collect_sample(editor.parts, encoder, texts, layers, count, seed)
        if kept:
            editor.memory.put(key, found, found.nbytes)
    return found


class Tokens(NamedTuple):
    """Tokens of some texts: where they are (tokens x 3: text, first and last character), whether a
    subject ends there, and by layer their scores and whether the gate is open (all: tokens)."""

    places: Tensor
    subject: Tensor
    scores: dict[int, Tensor]
    opened: dict[int, Tensor]


@torch.no_grad()
def gates_at(
    parts: Anatomy,
    encoder: Encoder,
    texts: Iterable[str],
    subjects: Sequence[str],
    layers: Mapping[int, HookLayer],
    gate: Gate,
) -> Iterator[Tokens]:
    """All tokens of some texts, each text alone, as the model is now: a forward at a time."""
    read: dict[int, str] = {}

    def noted() -> Iterator[str]:
        for number, text in enumerate(texts):
            read[number] = text
            yield text

    for one in keys_in(parts, encoder, noted(), tuple(layers), padded=gate.causal):
        scores, opened = {}, {}
        for layer, hook in layers.items():
            found = gate.score(hook.moved(one.keys[layer])).cpu()[one.real]
            scores[layer], opened[layer] = found, found >= hook.threshold
        yield Tokens(one.places, ends_at(one.places, read, subjects), scores, opened)


def share_opened(
    passes: Iterable[Tokens], layers: Iterable[int], *, at_subjects: bool, enough: int | None
) -> Opened:
    """At which share of the tokens that are, or are not, edited subjects' last the gates open.

    enough: no more than so many tokens are counted.
    """
    total, counts = 0, dict.fromkeys(layers, 0)
    for one in passes:
        chosen = (one.subject == at_subjects).nonzero().squeeze(1)
        if enough is not None:
            chosen = chosen[: enough - total]
        total += len(chosen)
        for layer in counts:
            counts[layer] += int(one.opened[layer][chosen].sum())
        if enough is not None and total >= enough:
            break
    if not total:
        what = "the last one of an edited subject" if at_subjects else "to be left alone"
        raise StatisticsError(f"no token of these texts is {what}; give other texts")
    return Opened(total, {layer: count / total for layer, count in counts.items()})


def table_of(
    passes: Iterable[Tokens], texts: Sequence[str], layers: Mapping[int, HookLayer]
) -> pd.DataFrame:
    """What the gates do at each token of some texts: one row a token and layer."""
    import pandas as pd

    lines = [
        {
            "text": number,
            "token": texts[number][start:end],
            "subject": bool(one.subject[place]),
            "layer": layer,
            "score": float(one.scores[layer][place]),
            "threshold": hook.threshold,
            "open": bool(one.opened[layer][place]),
        }
        for one in passes
        for place, (number, start, end) in enumerate(one.places.tolist())
        for layer, hook in layers.items()
    ]
    return pd.DataFrame(lines).sort_values("text", kind="stable", ignore_index=True)
