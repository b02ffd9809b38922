"""C0, the mean second moment of the keys that a model uses on ordinary text.

``C0 = E[k k']`` over the tokens of a corpus, one matrix a layer. All layers of a pass are
collected together; products are float32, sums float64; padding never counts and texts are never
joined. Sums are kept for two halves of the texts, so that it can be said whether there was
enough text: the halves must agree on fresh keys (`KeyStatistics.convergence`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_edit.activations import (
    PLAIN_OUTPUT,
    batches_by_length,
    captured,
    left_padded,
    quiet,
)
from unified_edit.errors import (
    NotPositiveDefiniteError,
    ObjectiveError,
    StatisticsError,
    StatisticsFileError,
)
from unified_edit.files import read_safetensors, write_safetensors
from unified_edit.models import Anatomy, Tokenizer, anatomy, check_tokenizer
from unified_edit.objective import Metric
from unified_edit.progress import progress
from unified_edit.tokens import check_ids

log = logging.getLogger(__name__)

FORMAT = "unified_edit.key_statistics/1"
#: Keys set aside for the convergence check; they are in neither half.
FRESH_KEYS = 256
#: Texts of one batch in the order of the corpus: what is between two checkpoints.
GROUP = 256


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


@dataclass(frozen=True)
class KeyStatistics:
    """C0 of some layers, with what it was made from.

    `moments` maps a layer to C0 (d_k x d_k, float64), the shrinkage already added;
    `agreement` maps it to the median of |k'C1^-1 k / k'C2^-1 k - 1| over fresh keys, where C1
    and C2 are the two halves' moments (NaN where a half has no Cholesky factor).
    """

    source: Source
    moments: dict[int, Tensor]
    agreement: dict[int, float]
    _metrics: dict[int, Metric] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are statistics of, ascending."""
        return tuple(sorted(self.moments))

    def C0(self, layer: int) -> Tensor:
        """The mean second moment at `layer`, :eq:`preserve-c0`: (d_k x d_k, float64)."""
        if layer not in self.moments:
            raise StatisticsError(
                f"there are no key statistics for layer {layer}, only for {self.layers}; collect "
                "them: KeyStatistics.collect(model, tokenizer, texts, layers=[...])"
            )
        return self.moments[layer]

    def metric(self, layer: int) -> Metric:
        """The factored C0 of `layer`; made once and kept."""
        if layer not in self._metrics:
            try:
                self._metrics[layer] = Metric(self.C0(layer))
            except NotPositiveDefiniteError as problem:
                raise StatisticsError(
                    f"C0 of layer {layer}, from {self.source.tokens} tokens, has no Cholesky "
                    "factor: some directions never occurred. Collect more text (about 10*d_k "
                    "tokens), or pass shrinkage=1e-3 and say so in your results"
                ) from problem
            except ObjectiveError as problem:
                raise StatisticsError(
                    f"C0 of layer {layer} cannot be used: {problem}. Collect the statistics again"
                ) from problem
        return self._metrics[layer]

    def convergence(self, layer: int) -> float:
        """How far two halves of the text disagree on fresh keys; at most 0.1 is converged."""
        self.C0(layer)
        return self.agreement[layer]

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raise StatisticsError unless the statistics were made from this base model."""
        if fingerprint != self.source.fingerprint:
            raise StatisticsError(
                f"these key statistics were made from {self.source.model!r} (fingerprint "
                f"{self.source.fingerprint[:12]}), not from this model {name!r} "
                f"({fingerprint[:12]}): their C0 measures other keys. Collect them for this model"
            )

    def shrunk(self, shrinkage: float) -> KeyStatistics:
        """C0 + shrinkage * tr(C0)/d_k * I for every layer, recorded in `source`.

        :eq:`preserve-shrinkage`. Makes C0 invertible when there were few tokens, at the price of
        preserving directions that the model hardly uses. Raises StatisticsError unless
        0 <= shrinkage < infinity.
        """
        check_shrinkage(shrinkage)
        if self.source.shrinkage:
            raise StatisticsError(
                f"these statistics are already shrunk by {self.source.shrinkage:g}; start from "
                "unshrunk ones"
            )
        moments = {layer: moment.clone() for layer, moment in self.moments.items()}
        for moment in moments.values():
            _shrink_in_place(moment, shrinkage)
        source = replace(self.source, shrinkage=shrinkage)
        return replace(self, source=source, moments=moments, _metrics={})

    @classmethod
    def collect(
        cls,
        model: Any,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        layers: Sequence[int],
        *,
        max_tokens: int = 1024,
        shrinkage: float = 0.0,
        tokens: int | None = None,
        checkpoint: str | Path | None = None,
        batch_tokens: int = 8192,
    ) -> KeyStatistics:
        """Run the texts through the model and sum k k' at the given layers.

        Each text stands alone, cut after `max_tokens` tokens (at most the model's limit). With
        `tokens`, no more texts are drawn once that many tokens were counted. With
        `checkpoint`, a path, the sums are saved there about every minute of work; called again
        with the same texts, an interrupted run goes on from there, and the file is removed when
        it is done. On an edited model the statistics of its base are collected: the edits are
        taken out meanwhile and put back bit for bit.

        Raises StatisticsError for fewer than 2*d_k tokens, unless `shrinkage` is given, for
        texts that are no strings, and for a checkpoint made from something else; ModelError for
        a model that cannot be edited or layers it does not have; TokenizationError for a
        tokenizer that does not belong to the model.
        """
        from unified_edit.ledger import ledger_of  # the ledger imports nothing of this module

        check_shrinkage(shrinkage)
        counts = {"max_tokens": max_tokens, "tokens": tokens, "batch_tokens": batch_tokens}
        for name, count in counts.items():
            if count is not None and not (type(count) is int and count >= 1):
                raise StatisticsError(f"{name} is {count!r}; it must be a whole number >= 1")
        if isinstance(texts, str):
            raise StatisticsError("texts is one string; give a list of texts, each stands alone")
        if isinstance(texts, bytes) or not isinstance(texts, Iterable):
            raise StatisticsError(f"texts is a {type(texts).__name__}; give a list of texts")
        parts = anatomy(model)
        layers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        parts.check_layers(layers)
        check_tokenizer(tokenizer)
        ledger = ledger_of(model)
        with ledger.base_state():
            return _collect(
                parts,
                tokenizer,
                texts,
                layers,
                ledger.fingerprint(),
                max_tokens,
                shrinkage,
                tokens,
                None if checkpoint is None else Path(checkpoint),
                batch_tokens,
            )

    def only(self, layer: int) -> KeyStatistics:
        """The statistics of one layer."""
        return KeyStatistics(self.source, {layer: self.C0(layer)}, {layer: self.agreement[layer]})

    @classmethod
    def joined(cls, each: Sequence[KeyStatistics]) -> KeyStatistics:
        """Statistics of several layers of one model as one object, with the first one's source.

        Raises StatisticsError if they were made from different models.
        """
        if len({one.source.fingerprint for one in each}) != 1:
            raise StatisticsError("statistics of different models cannot be joined")
        moments = {layer: moment for one in each for layer, moment in one.moments.items()}
        agreement = {layer: value for one in each for layer, value in one.agreement.items()}
        return cls(each[0].source, moments, agreement)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {f"C0.{layer}": moment for layer, moment in self.moments.items()}
        agreement = {str(layer): value for layer, value in self.agreement.items()}
        meta = {"source": vars(self.source), "agreement": agreement}
        write_safetensors(Path(path), tensors, FORMAT, meta)

    @classmethod
    def load(cls, path: str | Path) -> KeyStatistics:
        """Read what `save` wrote.

        Raises StatisticsFileError if the file is missing, damaged or of another kind. Whether
        it belongs to a model is checked where it is used.
        """
        tensors, meta = read_safetensors(Path(path), FORMAT, StatisticsFileError)
        try:
            source = Source(**meta["source"])
            agreement = {int(layer): float(value) for layer, value in meta["agreement"].items()}
            moments = {int(name.removeprefix("C0.")): value for name, value in tensors.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise StatisticsFileError(
                f"{path}: the description of the statistics is incomplete ({problem!r}); collect "
                "them again"
            ) from problem
        if set(moments) != set(agreement):
            raise StatisticsFileError(
                f"{path}: it holds C0 of layers {sorted(moments)} but describes layers "
                f"{sorted(agreement)}; collect the statistics again"
            )
        for layer, moment in moments.items():
            if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
                raise StatisticsFileError(
                    f"{path}: C0 of layer {layer} has shape {tuple(moment.shape)}, which is not "
                    "square; collect the statistics again"
                )
        return cls(source, moments, agreement)


def check_shrinkage(shrinkage: float) -> None:
    """Raise StatisticsError unless 0 <= shrinkage < infinity."""
    number = isinstance(shrinkage, (int, float)) and not isinstance(shrinkage, bool)
    if not number or not 0.0 <= shrinkage < float("inf"):
        raise StatisticsError(f"shrinkage is {shrinkage!r}; it must be a number >= 0, e.g. 1e-3")


class _Sums:
    """Running float64 sums of k k' of two halves of the text, for all layers of a pass."""

    def __init__(self, layers: tuple[int, ...], width: int) -> None:
        self.halves = {
            layer: [torch.zeros(width, width, dtype=torch.float64) for _ in range(2)]
            for layer in layers
        }
        self.fresh = {layer: torch.zeros(0, width) for layer in layers}
        self.counts = [0, 0]
        self.groups = 0
        self.texts = 0
        self.digest = hashlib.sha256()

    def add(self, keys: dict[int, Tensor], half: int) -> None:
        """Add keys ({layer: tokens x d_k}) to one half; the first ones of all stay fresh."""
        missing = FRESH_KEYS - len(next(iter(self.fresh.values())))
        taken = min(missing, len(next(iter(keys.values()))))
        for layer, rows in keys.items():
            rows = rows.float()
            if taken:
                self.fresh[layer] = torch.cat([self.fresh[layer], rows[:taken].cpu()])
            rest = rows[taken:]
            self.halves[layer][half].add_((rest.T @ rest).cpu())
        self.counts[half] += len(next(iter(keys.values()))) - taken

    @property
    def seen(self) -> int:
        """Tokens taken so far, those set aside included."""
        return sum(self.counts) + len(next(iter(self.fresh.values())))

    def save(self, path: Path, description: dict[str, Any]) -> None:
        tensors = {
            f"{half}.{layer}": sums
            for layer, pair in self.halves.items()
            for half, sums in enumerate(pair)
        }
        tensors |= {f"fresh.{layer}": keys for layer, keys in self.fresh.items()}
        state = {
            "counts": self.counts,
            "groups": self.groups,
            "texts": self.texts,
            "corpus": self.digest.hexdigest(),
        }
        write_safetensors(path, tensors, FORMAT + "/partial", {**description, "state": state})

    def restore(self, path: Path, description: dict[str, Any]) -> dict[str, Any]:
        """Take over what `save` wrote; return its state. Raises StatisticsError on a mismatch."""
        tensors, meta = read_safetensors(path, FORMAT + "/partial", StatisticsFileError)
        state = meta.pop("state", None)
        if meta != json.loads(json.dumps(description)) or state is None:
            raise StatisticsError(
                f"the checkpoint {path} belongs to another run ({meta} instead of "
                f"{description}); delete it or give another path"
            )
        for layer, pair in self.halves.items():
            for half in range(2):
                pair[half] = tensors[f"{half}.{layer}"]
            self.fresh[layer] = tensors[f"fresh.{layer}"]
        self.counts, self.groups = list(state["counts"]), int(state["groups"])
        return state


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
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


def _first(tokenizer: Tokenizer, group: list[str], wanted: int, max_tokens: int) -> list[str]:
    """The first texts of a group that have `wanted` tokens together; all, if they have fewer."""
    total = 0
    for place, ids in enumerate(tokenizer(group)["input_ids"]):
        total += min(len(ids), max_tokens)
        if total >= wanted:
            return group[: place + 1]
    return group


def _collect(
    parts: Anatomy,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    layers: tuple[int, ...],
    fingerprint: str,
    max_tokens: int,
    shrinkage: float,
    wanted: int | None,
    checkpoint: Path | None,
    batch_tokens: int,
) -> KeyStatistics:
    model = parts.model
    max_tokens = min(max_tokens, parts.positions or max_tokens)
    sums = _Sums(layers, parts.d_in)
    description = {
        "fingerprint": fingerprint,
        "layers": list(layers),
        "max_tokens": max_tokens,
        "library": version("unified_edit"),
        "group": GROUP,
    }
    done: dict[str, Any] | None = None
    if checkpoint is not None and checkpoint.exists():
        done = sums.restore(checkpoint, description)
        log.info("going on after %d texts from %s", done["texts"], checkpoint)
    sites = {layer: (parts.down(layer), "input") for layer in layers}
    skipped = done["groups"] if done is not None else 0
    since_saved = 0
    with quiet(model), torch.no_grad(), progress("collecting keys", None, "token") as bar:
        number = -1
        for number, group in enumerate(_groups(texts)):
            last = False
            if number >= skipped and wanted is not None:
                missing = wanted + FRESH_KEYS - sums.seen
                if missing <= 0:
                    break
                few = _first(tokenizer, group, missing, max_tokens)
                last, group = len(few) < len(group), few
            for text in group:
                sums.digest.update(text.encode() + b"\0")
            sums.texts += len(group)
            if done is not None and number < skipped:
                if number == skipped - 1:
                    _check_same_texts(sums, done, checkpoint)
                continue
            tokens = _add_group(parts, tokenizer, group, sites, sums, max_tokens, batch_tokens)
            bar.update(tokens)
            sums.groups = number + 1
            since_saved += tokens
            if last:  # not saved: a checkpoint holds whole groups only
                break
            if checkpoint is not None and since_saved >= CHECKPOINT_TOKENS:
                sums.save(checkpoint, description)
                since_saved = 0
        if done is not None and number < skipped:  # there were fewer texts than were summed
            _check_same_texts(sums, done, checkpoint)
    return _finish(parts, sums, layers, fingerprint, max_tokens, shrinkage, checkpoint)


def _check_same_texts(sums: _Sums, done: dict[str, Any], checkpoint: Path | None) -> None:
    """Raise StatisticsError unless the texts seen so far are those a checkpoint was made from."""
    if sums.digest.hexdigest() != done["corpus"]:
        raise StatisticsError(
            f"the checkpoint {checkpoint} was made from other texts than these; delete it or give "
            "the texts it was made from, in the same order"
        )


#: A checkpoint is written after so many tokens: a minute or so of a large model on a CPU.
CHECKPOINT_TOKENS = 20_000


def _add_group(
    parts: Anatomy,
    tokenizer: Tokenizer,
    group: list[str],
    sites: dict[int, tuple[Any, str]],
    sums: _Sums,
    max_tokens: int,
    batch_tokens: int,
) -> int:
    """Run one group of texts, batched by length; return the number of tokens."""
    rows = [ids[:max_tokens] for ids in tokenizer(group)["input_ids"]]
    rows = [row for row in rows if row]
    for row in rows:
        if max(row) >= parts.vocabulary:
            check_ids(parts, row, tokenizer.decode(row))
    total = 0
    for position, batch in enumerate(batches_by_length([len(row) for row in rows], batch_tokens)):
        inputs = left_padded([rows[index] for index in batch], parts.model.device)
        with captured(sites) as seen:
            parts.model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
        real = inputs["attention_mask"].bool()
        keys = {layer: value[real] for layer, value in seen.items()}
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


def _finish(
    parts: Anatomy,
    sums: _Sums,
    layers: tuple[int, ...],
    fingerprint: str,
    max_tokens: int,
    shrinkage: float,
    checkpoint: Path | None,
) -> KeyStatistics:
    model, width, count = parts.model, parts.d_in, sum(sums.counts)
    if count < 2 * width and not shrinkage:
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
    moments, agreement = {}, {}
    for layer in layers:
        agreement[layer] = _agreement(sums.halves[layer], sums.counts, sums.fresh[layer])
        moments[layer] = _mean(sums.halves.pop(layer), count)
        if shrinkage:
            _shrink_in_place(moments[layer], shrinkage)
    source = Source(
        fingerprint=fingerprint,
        model=str(model.config._name_or_path),
        revision=getattr(model.config, "_commit_hash", None),
        dtype=str(model.dtype).removeprefix("torch."),
        corpus=sums.digest.hexdigest(),
        texts=sums.texts,
        tokens=count,
        max_tokens=max_tokens,
        library=version("unified_edit"),
        shrinkage=shrinkage,
    )
    made = KeyStatistics(source, moments, agreement)
    for layer in layers:
        made.metric(layer)  # refuses what has no Cholesky factor while its cause is still known
        if agreement[layer] != agreement[layer]:
            log.warning(
                "C0 of layer %d: %d tokens are too few to tell whether it has converged (each "
                "half of the text needs d_k = %d at least); more text makes edits more specific",
                layer,
                count,
                width,
            )
        elif not agreement[layer] <= 0.1:
            log.warning(
                "C0 of layer %d has not converged: halves of the text disagree by %.3g on fresh "
                "keys (0.1 is converged); more text makes edits more specific",
                layer,
                agreement[layer],
            )
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return made


def _mean(halves: list[Tensor], count: int) -> Tensor:
    """C0 of two halves' sums, in the memory of the first."""
    first, second = halves
    return first.add_(second).div_(count)


def _shrink_in_place(moment: Tensor, shrinkage: float) -> None:
    moment.diagonal().add_(shrinkage * moment.diagonal().mean())


def _agreement(halves: list[Tensor], counts: list[int], fresh: Tensor) -> float:
    """Median of |k'C1^-1 k / k'C2^-1 k - 1| over fresh keys; NaN if a half cannot be factored."""
    if min(counts) < fresh.shape[1] or not len(fresh):  # a half is singular
        return float("nan")
    costs = []
    for half, count in zip(halves, counts, strict=True):
        factor, bad = torch.linalg.cholesky_ex(half / count)
        if bad:
            return float("nan")
        white = torch.linalg.solve_triangular(factor, fresh.double().T, upper=False)
        costs.append(white.square().sum(0))
    return float((costs[0] / costs[1] - 1).abs().median())
