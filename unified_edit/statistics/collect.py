"""The job that collects key statistics: it can be interrupted, and goes on where it stopped.

All layers of a pass are collected together; products are float32, sums float64; padding never
counts and texts are never joined. Sums are kept for two halves of the texts, so that it can be
said whether there was enough text: the halves must agree on fresh keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, per_token
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.statistics.sums import Sums, agreement, mean, shrink_in_place
from unified_edit.statistics.weighting import WEIGHTINGS

log = logging.getLogger(__name__)

#: Keys set aside for the convergence check; they are in neither half.
FRESH_KEYS = 256
#: Texts of one batch in the order of the corpus: what is between two checkpoints.
GROUP = 256
#: A checkpoint is written after so many tokens: a minute or so of a large model on a CPU.
CHECKPOINT_TOKENS = 20_000


@dataclass(frozen=True)
class Source:
    """What statistics were made from; stored with them and compared before they are used."""

    fingerprint: str  # of the base model
    model: str  # its name or path, for messages
    revision: str | None  # resolved revision on the Hub
    dtype: str  # of the model's weights while collecting
    corpus: str  # SHA-256 of the texts, in order
    texts: int
    tokens: int  # key vectors counted in C0
    max_tokens: int  # a text is cut after so many tokens
    library: str  # version of unified_edit
    shrinkage: float = 0.0
    origin: str | None = None  # of a dequantised model: its file, and how that was quantised
    skip_start: bool = False  # the first token of each text, BOS or a word, is not in C0
    weighting: str = "tokens"  # how much each token counts, one of `WEIGHTINGS`


class Collected(NamedTuple):
    """What the job gives: C0 and the halves' disagreement of each layer, and their source."""

    source: Source
    moments: dict[int, Tensor]
    agreement: dict[int, float]


@dataclass(frozen=True)
class Job:
    """What is to be collected, and how; see `KeyStatistics.collect`."""

    parts: Anatomy
    encoder: Encoder
    weights: tuple[NamedWeight, ...]
    fingerprint: str
    max_tokens: int
    batch_tokens: int
    shrinkage: float = 0.0
    tokens: int | None = None
    checkpoint: Path | None = None
    skip_start: bool = False
    weighting: str = "tokens"

    @property
    def longest(self) -> int:
        """So many tokens are taken of a text: `max_tokens`, or what the model can read."""
        return min(self.max_tokens, self.parts.positions or self.max_tokens)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys are collected."""
        return tuple(weight.layer for weight in self.weights)

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint must have been made from, besides the texts."""
        return {
            "fingerprint": self.fingerprint,
            "layers": list(self.layers),
            "max_tokens": self.longest,
            "library": version("unified_edit"),
            "group": GROUP,
            "skip_start": self.skip_start,
            "weighting": self.weighting,
        }

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self.encoder.ids(texts, self.longest)


def groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, `GROUP` at a time; StatisticsError for what is no string, or no Unicode."""
    group: list[str] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise StatisticsError(
                f"text number {number} of the corpus is a {type(text).__name__}, not a string; "
                "give a list of texts"
            )
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise StatisticsError(
                f"text number {number} of the corpus is not valid Unicode: {problem.reason} at "
                f"character {problem.start}; repair its encoding or leave it out"
            ) from problem
        group.append(text)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def _first(job: Job, group: list[str], wanted: int) -> list[str]:
    """The first texts of a group that have `wanted` tokens together; all, if they have fewer."""
    total = 0
    for place, ids in enumerate(job.rows(group)):
        total += len(ids) - (job.skip_start and bool(ids))
        if total >= wanted:
            return group[: place + 1]
    return group


def collect(job: Job, texts: Iterable[str]) -> Collected:
    """Run the texts through the model, from the checkpoint on if there is one."""
    sums = Sums(job.weights, FRESH_KEYS)
    done: dict[str, Any] | None = None
    if job.checkpoint is not None and job.checkpoint.exists():
        done = sums.restore(job.checkpoint, job.description)
        log.info("going on after %d texts from %s", done["texts"], job.checkpoint)
    skipped = done["groups"] if done is not None else 0
    since_saved = 0
    with torch.no_grad(), progress("collecting keys", None, "token") as bar:
        number = -1
        for number, group in enumerate(groups(texts)):
            last = False
            if number >= skipped and job.tokens is not None:
                missing = job.tokens + FRESH_KEYS - sums.seen
                if missing <= 0:
                    break
                few = _first(job, group, missing)
                last, group = len(few) < len(group), few
            for text in group:
                sums.digest.update(text.encode() + b"\0")
            sums.texts += len(group)
            if done is not None and number < skipped:
                if number == skipped - 1:
                    _check_same_texts(sums, done, job.checkpoint)
                continue
            tokens = _add_group(job, group, sums)
            bar.update(tokens)
            sums.groups = number + 1
            since_saved += tokens
            if last:  # not saved: a checkpoint holds whole groups only
                break
            if job.checkpoint is not None and since_saved >= CHECKPOINT_TOKENS:
                sums.save(job.checkpoint, job.description)
                since_saved = 0
        if done is not None and number < skipped:  # there were fewer texts than were summed
            _check_same_texts(sums, done, job.checkpoint)
    return _finish(job, sums)


def _check_same_texts(sums: Sums, done: dict[str, Any], checkpoint: Path | None) -> None:
    """Raise StatisticsError unless the texts seen so far are those a checkpoint was made from."""
    if sums.digest.hexdigest() != done["corpus"]:
        raise StatisticsError(
            f"the checkpoint {checkpoint} was made from other texts than these; delete it or give "
            "the texts it was made from, in the same order"
        )


def _add_group(job: Job, group: list[str], sums: Sums) -> int:
    """Run one group of texts, batched by length; return the number of tokens."""
    rows = [row for row in job.rows(group) if row]
    job.encoder.check_ids([token for row in rows for token in row])
    model = job.parts.model
    sites = {weight.layer: (weight.module, "input") for weight in job.weights}
    total = 0
    lengths = [len(row) for row in rows]
    for position, batch in enumerate(batches_by_length(lengths, job.batch_tokens)):
        inputs = left_padded([rows[index] for index in batch], model.device)
        with captured(sites) as seen:
            model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        real = inputs["attention_mask"].bool()
        if job.skip_start:
            real = inputs["position_ids"] > 0  # the first place of a row, and padding, have 0
        weigh = WEIGHTINGS[job.weighting]
        keys = {
            one.layer: weigh(
                job.parts,
                one,
                per_token(model, seen.get(one.layer), real.shape, one.module, "input")[real],
            )
            for one in job.weights
        }
        for layer, value in keys.items():
            if not torch.isfinite(value).all():
                raise StatisticsError(
                    f"keys at layer {layer} are not finite; the model's weights hold NaN or "
                    "its type overflows: load it again, or in float32 or bfloat16"
                )
        # rows of similar length go to alternate halves, so that the halves are alike
        owner = torch.arange(len(batch), device=real.device)[:, None].expand_as(real)[real]
        for half in range(2):
            chosen = (owner + position + sums.groups) % 2 == half
            if chosen.any():
                sums.add({layer: value[chosen] for layer, value in keys.items()}, half)
        total += int(real.sum())
    return total


def _finish(job: Job, sums: Sums) -> Collected:
    model, count = job.parts.model, sum(sums.counts)
    width = max(weight.d_in for weight in job.weights)
    if count < 2 * width and not job.shrinkage:
        raise StatisticsError(
            f"the corpus gave {count} tokens for C0 (and {FRESH_KEYS} set aside to check "
            f"convergence), fewer than 2*d_k = {2 * width}: C0 would hardly be invertible. Give "
            f"about 10*d_k = {10 * width} tokens, or pass shrinkage=1e-3 and say so in your results"
        )
    if count == 0:
        raise StatisticsError(
            f"the corpus gave no tokens beyond the {FRESH_KEYS} set aside to check convergence; "
            "give more text"
        )
    moments, agreements = {}, {}
    for layer in job.layers:
        agreements[layer] = agreement(sums.halves[layer], sums.counts, sums.fresh[layer])
        moments[layer] = mean(sums.halves.pop(layer), count)
        if job.shrinkage:
            shrink_in_place(moments[layer], job.shrinkage)
    source = Source(
        fingerprint=job.fingerprint,
        model=job.parts.name,
        revision=getattr(model.config, "_commit_hash", None),
        dtype=str(model.dtype).removeprefix("torch."),
        corpus=sums.digest.hexdigest(),
        texts=sums.texts,
        tokens=count,
        max_tokens=job.longest,
        library=version("unified_edit"),
        shrinkage=job.shrinkage,
        origin=job.parts.origin,
        skip_start=job.skip_start,
        weighting=job.weighting,
    )
    return Collected(source, moments, agreements)
