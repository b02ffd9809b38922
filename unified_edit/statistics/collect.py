"""The job that collects key statistics: it can be interrupted, and goes on where it stopped.

All layers of a pass are collected together; products are float32, sums float64; padding never
counts and texts are never joined. Sums are kept for two halves of the texts, so that it can be
said whether there was enough text: the halves must agree on fresh keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.statistics.convergence import agreement, check_enough
from unified_edit.statistics.forwards import add_group, batch_size
from unified_edit.statistics.moments import shrink_in_place
from unified_edit.statistics.shares import Counted, Reading
from unified_edit.statistics.sums import (
    PANELS,
    ROWS,
    LayerSums,
    Sums,
)
from unified_edit.statistics.weighting import WEIGHTINGS

log = logging.getLogger(__name__)

#: Keys set aside for the convergence check: in neither half, and in C0 after it.
FRESH_KEYS = 256
#: Texts of one batch in the order of the corpus: what is between two checkpoints.
GROUP = 256
#: A checkpoint is written after so many tokens: a minute or so of a large model on a CPU.
CHECKPOINT_TOKENS = 20_000
#: With `until`, the halves are compared whenever there are so many times the tokens.
GROWTH = 1.25
#: A factor whose smallest pivot is no smaller share of the diagonal is no luck of rounding.
SOUND = 1e-6


@dataclass(frozen=True)
class Source:
    """What statistics were made from; stored with them and compared before they are used."""

    fingerprint: str  # of the base model
    model: str  # its name or path, for messages
    revision: str | None  # resolved revision on the Hub
    dtype: str  # of the model's weights while collecting
    corpus: str  # SHA-256 of the texts, in order; where they are a sum, of its parts' ones
    texts: int
    tokens: int  # key vectors counted in C0
    max_tokens: int  # a text is cut after so many tokens
    library: str  # version of unified_edit
    shrinkage: float = 0.0
    origin: str | None = None  # of a dequantised model: its file, and how that was quantised
    skip_start: bool = False  # the first token of each text, BOS or a word, is not in C0
    weighting: str = "tokens"  # how much each token counts, one of `WEIGHTINGS`
    part: str | None = None  # which shares of the corpus were counted; None: all of it


class Collected(NamedTuple):
    """What the job gives.

    moments, agreement, fresh: of each layer C0, the halves' disagreement, and the keys that were
    set aside for it. unsure: layers of which it is not known that C0 has a Cholesky factor.
    """

    source: Source
    moments: dict[int, Tensor]
    agreement: dict[int, float]
    counted: Counted
    fresh: dict[int, Tensor]
    unsure: frozenset[int]


@dataclass(frozen=True)
class Job:
    """What is to be collected, and how; see `KeyStatistics.collect`."""

    parts: Anatomy
    encoder: Encoder
    weights: tuple[NamedWeight, ...]
    fingerprint: str
    max_tokens: int
    batch_tokens: int | None = None
    shrinkage: float = 0.0
    tokens: int | None = None
    until: float | None = None
    checkpoint: Path | None = None
    max_memory: int | None = None
    folder: Path | None = None
    part: tuple[int, int] = (0, 1)
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
    def wanted(self) -> float:
        """So many tokens are counted by this job; its share of what all parts count together."""
        return math.inf if self.tokens is None else math.ceil(self.tokens / self.part[1])

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint must have been made from, besides the texts."""
        return {
            "fingerprint": self.fingerprint,
            "layers": list(self.layers),
            "max_tokens": self.longest,
            "library": version("unified_edit"),
            "group": GROUP,
            "rows": [ROWS, PANELS],
            "aside": FRESH_KEYS,
            "part": list(self.part),
            "skip_start": self.skip_start,
            "weighting": self.weighting,
        }

    def passes(self) -> list[Job]:
        """Jobs of fewer layers whose sums fit into `max_memory` each, unless files take the rest.

        Raises StatisticsError where one layer does not fit.
        """
        if self.max_memory is None or self.folder is not None:
            return [self]
        passes: list[list[NamedWeight]] = [[]]
        for one in self.weights:
            if (needed := LayerSums.needed(one.d_in)) > self.max_memory:
                raise StatisticsError(
                    f"the sums of layer {one.layer} take {needed:,} bytes, more than max_memory = "
                    f"{self.max_memory:,}; give more, or a folder: files there take what does not "
                    "fit"
                )
            some = [*passes[-1], one]
            if sum(LayerSums.needed(each.d_in) for each in some) > self.max_memory:
                passes.append([one])
            else:
                passes[-1] = some
        if len(passes) == 1:
            return [self]
        return [
            replace(self, weights=tuple(some), checkpoint=_numbered(self.checkpoint, number))
            for number, some in enumerate(passes)
        ]

    def rows(self, group: Sequence[str], missing: float) -> list[list[int]]:
        """Ids of the first texts of a group that have so many tokens together; or of all."""
        rows = self.encoder.ids(group, self.longest)
        total = 0
        for place, ids in enumerate(rows):
            total += len(ids) - (self.skip_start and bool(ids))
            if total >= missing:
                return rows[: place + 1]
        return rows


def _numbered(path: Path | None, number: int) -> Path | None:
    return path and path.with_name(f"{path.stem}-{number}{path.suffix}")


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


def checkpoints(job: Job) -> list[Path]:
    """The files in which `collect` keeps the sums of a job meanwhile."""
    return [one.checkpoint for one in job.passes() if one.checkpoint is not None]


def collect(job: Job, texts: Iterable[str]) -> Collected:
    """Run the texts through the model, from the checkpoint on if there is one."""
    passes = job.passes()
    if len(passes) > 1 and (job.until is not None or iter(texts) is texts):
        raise StatisticsError(
            f"max_memory = {job.max_memory:,} bytes hold the sums of some of these layers only, "
            f"and {len(passes)} passes over the texts are needed: give a list instead of an "
            "iterator and no `until`, or a folder, where files take what does not fit"
        )
    first, *others = [_collect(one, texts) for one in passes]
    for other in others:
        if other.source != first.source:
            raise StatisticsError(
                "the texts were others when they were read again for more layers; give a list, or "
                "a folder, and they are read once"
            )
        first.moments.update(other.moments)
        first.agreement.update(other.agreement)
        first.fresh.update(other.fresh)
    return first._replace(unsure=first.unsure.union(*(other.unsure for other in others)))


def _collect(job: Job, texts: Iterable[str]) -> Collected:
    """One pass over the texts."""
    sums, reading = Sums(job.weights, FRESH_KEYS, job.max_memory, job.folder), Reading()
    done: dict[str, Any] | None = None
    if job.checkpoint is not None and job.checkpoint.exists():
        done = sums.restore(job.checkpoint, job.description)
        log.info("going on after %d texts from %s", done["texts"], job.checkpoint)
    skipped = done["groups"] if done is not None else 0
    batch_tokens = job.batch_tokens or batch_size(job.parts, job.weights)
    index, parts = job.part
    since_saved = 0
    with progress("collecting keys", None, "token") as bar:
        number = -1
        for number, group in enumerate(groups(texts)):
            reading.passes(group)
            if number % parts != index:
                continue
            again = done is not None and number < skipped
            if not again:
                if (missing := job.wanted - sums.seen) <= 0:
                    break
                rows = job.rows(group, missing)
                last, group = len(rows) < len(group), group[: len(rows)]
            for text in group:
                sums.digest.update(text.encode() + b"\0")
            reading.counts(group)
            sums.texts += len(group)
            if again:
                if number == skipped - 1:
                    _check_same_texts(sums, done, job.checkpoint)
                continue
            job.encoder.check_ids([token for row in rows for token in row])
            before = sums.seen
            add_group(
                job.parts, job.weights, [row for row in rows if row], sums, number=number,
                batch_tokens=batch_tokens, skip_start=job.skip_start,
                weigh=WEIGHTINGS[job.weighting],
            )  # fmt: skip
            bar.update(sums.seen - before)
            sums.groups = number + 1
            since_saved += sums.seen - before
            # no checkpoint after the last one: it holds whole groups only
            if last or sums.seen >= job.wanted or _settled(job, sums, before):
                break
            if job.checkpoint is not None and since_saved >= CHECKPOINT_TOKENS:
                sums.save(job.checkpoint, job.description)
                since_saved = 0
        if done is not None and number < skipped:  # there were fewer texts than were summed
            _check_same_texts(sums, done, job.checkpoint)
    return _finish(job, sums, reading.counted(job.part))


def _check_same_texts(sums: Sums, done: dict[str, Any] | None, checkpoint: Path | None) -> None:
    """Raise StatisticsError unless the texts seen so far are those a checkpoint was made from."""
    if done is not None and sums.digest.hexdigest() != done["corpus"]:
        raise StatisticsError(
            f"the checkpoint {checkpoint} was made from other texts than these; delete it or give "
            "the texts it was made from, in the same order"
        )


def _settled(job: Job, sums: Sums, before: int) -> bool:
    """Whether the halves agree as well as `until` asks; looked at when the text has grown enough.

    When that is depends on the numbers of tokens alone, so that a resumed run stops where an
    uninterrupted one does.
    """
    least = 4 * max(one.d_in for one in job.weights)
    if job.until is None or sums.seen < least:
        return False
    steps = [math.floor(math.log(max(n, 1) / least, GROWTH)) for n in (before, sums.seen)]
    if before >= least and steps[0] == steps[1]:
        return False
    found = [_agreement(sums, layer)[0] for layer in job.layers]
    log.info("halves of the text disagree by %s after %d tokens", found, sums.seen)
    return all(one <= job.until for one in found)


def _agreement(sums: Sums, layer: int) -> tuple[float, float]:
    one = sums.layers[layer]
    return agreement(one.halves, sums.counts, one.fresh[: sums.fresh])


def _finish(job: Job, sums: Sums, counted: Counted) -> Collected:
    if not job.shrinkage and job.part[1] == 1:  # what a part lacks, the others may have
        check_enough(sums.seen, max(weight.d_in for weight in job.weights))
    if sums.seen == 0:
        share = "" if job.part[1] == 1 else f" for share {job.part[0]} of 0..{job.part[1] - 1}"
        raise StatisticsError(f"the corpus gave no tokens{share}; give more text, or fewer parts")
    moments, agreements, fresh, unsure = {}, {}, {}, set()
    for one in sums.layers.values():
        one.close()
    for layer in job.layers:
        agreements[layer], pivot = _agreement(sums, layer)
        if not pivot > SOUND:
            unsure.add(layer)
        one = sums.layers.pop(layer)
        fresh[layer] = one.fresh[: sums.fresh].cpu().clone()
        moments[layer] = one.total(sums.seen)
        if job.shrinkage:
            shrink_in_place(moments[layer], job.shrinkage)
    model = job.parts.model
    source = Source(
        fingerprint=job.fingerprint,
        model=job.parts.name,
        revision=getattr(model.config, "_commit_hash", None),
        dtype=str(model.dtype).removeprefix("torch."),
        corpus=sums.digest.hexdigest(),
        texts=sums.texts,
        tokens=sums.seen,
        max_tokens=job.longest,
        library=version("unified_edit"),
        shrinkage=job.shrinkage,
        origin=job.parts.origin,
        skip_start=job.skip_start,
        weighting=job.weighting,
        part=counted.part,
    )
    return Collected(source, moments, agreements, counted, fresh, frozenset(unsure))
