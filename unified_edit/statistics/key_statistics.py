"""C0, the mean second moment of the keys that a model uses on ordinary text.

``C0 = E[k k']`` over the tokens of a corpus, one matrix a layer. This module holds the result; the
job that makes it is `unified_edit.statistics.collect`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unified_edit.arguments import as_path, is_flag, real_number, whole_number
from unified_edit.errors import (
    NotPositiveDefiniteError,
    ObjectiveError,
    StatisticsError,
    StatisticsFileError,
    brief,
)
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.prompts import Encoder
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.objective import Metric
from unified_edit.statistics.collect import Job, Source, collect
from unified_edit.statistics.sums import shrink_in_place
from unified_edit.statistics.weighting import WEIGHTINGS

log = logging.getLogger(__name__)

#: Bytes of factors that statistics keep: two at the width of GPT-J, dozens at that of GPT-2.
FACTOR_BYTES = 4 * 2**30

FORMAT = "unified_edit.key_statistics/2"


@dataclass(frozen=True)
class KeyStatistics:
    """C0 of some layers, with what it was made from.

    `moments` maps a layer to C0 (d_k x d_k, float64), the shrinkage already added, or to a
    function that reads it; `agreement` maps it to the median of |k'C1^-1 k / k'C2^-1 k - 1| over
    fresh keys, where C1 and C2 are the two halves' moments (NaN where a half has no Cholesky
    factor).
    """

    source: Source
    moments: dict[int, Tensor | Callable[[], Tensor]] = field(repr=False)
    agreement: dict[int, float]
    _metrics: dict[int, Metric] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are statistics of, ascending."""
        return tuple(sorted(self.moments))

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices in memory: moments that are not on disk, and factors."""
        moments = [one for one in self.moments.values() if isinstance(one, Tensor)]
        held = [*moments, *(metric.factor for metric in self._metrics.values())]
        return sum(one.numel() * one.element_size() for one in held)

    def C0(self, layer: int) -> Tensor:
        """The mean second moment at `layer`, :eq:`preserve-c0`: (d_k x d_k, float64)."""
        layer = whole_number(layer, "a layer", StatisticsError)
        if layer not in self.moments:
            raise StatisticsError(
                f"there are no key statistics for layer {layer}, only for {self.layers}; collect "
                "them: KeyStatistics.collect(model, tokenizer, texts, layers=[...])"
            )
        moment = self.moments[layer]
        return moment if isinstance(moment, Tensor) else moment()

    def metric(self, layer: int, device: torch.device | str | None = None) -> Metric:
        """The factored C0 of `layer`; kept, as long as all together take `FACTOR_BYTES`.

        On `device`; where it is or C0 is if None.
        """
        layer = whole_number(layer, "a layer", StatisticsError)
        if layer not in self._metrics:
            C0 = self.C0(layer)
            # what is read from a file for this alone is factored in its place
            own = isinstance(self.moments[layer], partial)
            while self._metrics and self._factor_bytes + 8 * C0.numel() > FACTOR_BYTES:
                self._metrics.pop(next(iter(self._metrics)))
            try:
                self._metrics[layer] = Metric.on(device or C0.device, C0, overwrite=own)
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
        elif device is not None:
            self._metrics[layer] = self._metrics[layer].to(device)
        return self._metrics[layer]

    def width(self, layer: int) -> int:
        """d_k of `layer`; no factor is made for it."""
        made = self._metrics.get(layer)
        return len(self.C0(layer)) if made is None else made.dim

    @property
    def _factor_bytes(self) -> int:
        return sum(metric.factor.nbytes for metric in self._metrics.values())

    def convergence(self, layer: int) -> float:
        """How far two halves of the text disagree on fresh keys; at most 0.1 is converged."""
        layer = whole_number(layer, "a layer", StatisticsError)
        if layer not in self.agreement:
            self.C0(layer)  # says which layers there are
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
        shrinkage = real_number(shrinkage, "shrinkage", StatisticsError, least=0)
        if self.source.shrinkage:
            raise StatisticsError(
                f"these statistics are already shrunk by {self.source.shrinkage:g}; start from "
                "unshrunk ones"
            )
        moments: dict[int, Any] = {layer: self.C0(layer).clone() for layer in self.layers}
        for moment in moments.values():
            shrink_in_place(moment, shrinkage)
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
        keep_checkpoint: bool = False,
        batch_tokens: int = 8192,
        skip_start: bool = False,
        weighting: Literal["tokens", "norm"] = "tokens",
    ) -> KeyStatistics:
        """Run the texts through the model and sum k k' at the given layers.

        Each text stands alone, cut after `max_tokens` tokens (at most the model's limit). With
        `tokens`, no more texts are drawn once that many tokens were counted. With
        `checkpoint`, a path, the sums are saved there about every minute of work; called again
        with the same texts, an interrupted run goes on from there. The file is removed when it is
        done, unless `keep_checkpoint` says that it is to stay until the result is saved. On an
        edited model the statistics of its base are collected: the edits are taken out meanwhile
        and put back bit for bit.

        The first token of a text (BOS where the tokenizer adds it) is an attention sink in many
        models, and its key may be nearly all of C0. It stays in: every text holds that key, and an
        edit must not move its output. `skip_start` leaves it out, to see what remains.
        `weighting` says how much each token counts. "tokens": all alike. "norm" is for models with
        a norm behind the MLP (Gemma 2 and 3, OLMo 2), where an update lengthens what stands in the
        residual stream the more, the shorter the MLP's output was: C0 is E[k k' / rms(W0 k)^2]
        then, the mean square of what the block's output moves by, up to the norm's own weights.
        Without such a norm it is C0 itself.

        Raises StatisticsError for fewer than 2*d_k tokens, unless `shrinkage` is given, for
        texts that are no strings, and for a checkpoint made from something else; ModelError for
        a model that cannot be edited or layers it does not have; TokenizationError for a
        tokenizer that does not belong to the model.
        """
        parts = anatomy(model)
        counts = {"max_tokens": max_tokens, "batch_tokens": batch_tokens, "tokens": tokens}
        whole = {
            name: whole_number(count, name, StatisticsError, least=1)
            for name, count in counts.items()
            if count is not None
        }
        if not is_flag(skip_start):
            raise StatisticsError(f"skip_start is {brief(skip_start)}; it must be True or False")
        if skip_start and whole["max_tokens"] == 1:
            raise StatisticsError(
                "skip_start leaves out the first token of each text, and max_tokens=1 takes no "
                "other; give a larger max_tokens"
            )
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise StatisticsError(
                f"texts is one {type(texts).__name__}; give a list of texts, each stands alone"
            )
        if not isinstance(weighting, str) or weighting not in WEIGHTINGS:
            raise StatisticsError(
                f"weighting is {brief(weighting)}; choose one of {tuple(WEIGHTINGS)}"
            )
        place = None if checkpoint is None else as_path(checkpoint, "checkpoint", StatisticsError)
        ledger = ledger_of(model)
        with quiet(model), ledger.base_state():
            job = Job(
                parts=parts,
                encoder=Encoder(tokenizer, parts),
                weights=tuple(parts.weight(layer) for layer in parts.check_layers(layers)),
                fingerprint=ledger.fingerprint(wholly=True),
                shrinkage=real_number(shrinkage, "shrinkage", StatisticsError, least=0),
                checkpoint=place,
                skip_start=bool(skip_start),
                weighting=weighting,
                **whole,
            )
            source, moments, agreement = collect(job, texts)
            made = cls(source, {**moments}, agreement)
            made._look_at()
        if place is not None and not keep_checkpoint:
            with contextlib.suppress(OSError):  # none was written: no reason to lose the work
                place.unlink(missing_ok=True)
        return made

    def _look_at(self) -> None:
        """Refuse what has no Cholesky factor while its cause is known; say what is not settled."""
        for layer, agreement in self.agreement.items():
            width = self.metric(layer).dim
            if agreement != agreement:
                log.warning(
                    "C0 of layer %d: %d tokens are too few to tell whether it has converged (each "
                    "half of the text needs d_k = %d at least); more text makes edits more "
                    "specific",
                    layer,
                    self.source.tokens,
                    width,
                )
            elif not agreement <= 0.1:
                log.warning(
                    "C0 of layer %d has not converged: halves of the text disagree by %.3g on "
                    "fresh keys (0.1 is converged); more text makes edits more specific",
                    layer,
                    agreement,
                )

    def only(self, layer: int) -> KeyStatistics:
        """The statistics of one layer."""
        self.C0(layer)
        return KeyStatistics.joined([self], [layer])

    @classmethod
    def joined(
        cls, each: Sequence[KeyStatistics], layers: Sequence[int] | None = None
    ) -> KeyStatistics:
        """Statistics of several layers of one model as one object, with the first one's source.

        layers: which of them; all if None. Raises StatisticsError if they were made from
        different models, or weigh tokens differently (`weighting`, `skip_start`).
        """
        if len({one.source.fingerprint for one in each}) != 1:
            raise StatisticsError("statistics of different models cannot be joined")
        if len({one.source.weighting for one in each}) != 1:
            raise StatisticsError(
                "tokens count differently in some of these statistics; collect all of them with "
                "the same weighting"
            )
        if len({one.source.skip_start for one in each}) != 1:
            raise StatisticsError(
                "some of these statistics hold the first token of each text and some do not; "
                "collect all of them with the same skip_start"
            )

        def all_of(name: str) -> dict[int, Any]:
            items = [item for one in each for item in getattr(one, name).items()]
            return {layer: value for layer, value in items if layers is None or layer in layers}

        return cls(each[0].source, all_of("moments"), all_of("agreement"), all_of("_metrics"))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises StatisticsFileError if it cannot be written.
        """
        tensors = {f"C0.{layer}": self.C0(layer) for layer in self.layers}
        agreement = {str(layer): value for layer, value in self.agreement.items()}
        meta = {"source": vars(self.source), "agreement": agreement}
        place = as_path(path, "the path of the statistics", StatisticsFileError)
        write_safetensors(place, tensors, FORMAT, meta, StatisticsFileError)

    @classmethod
    def load(cls, path: str | Path) -> KeyStatistics:
        """Read what `save` wrote.

        Raises StatisticsFileError if the file is missing, damaged or of another kind. Whether
        it belongs to a model is checked where it is used.
        """
        place = as_path(path, "the path of the statistics", StatisticsFileError)
        tensors, meta = read_safetensors(place, FORMAT, StatisticsFileError)
        try:
            source = Source(**meta["source"])
            agreement = {int(layer): float(value) for layer, value in meta["agreement"].items()}
            moments: dict[int, Any] = {
                int(name.removeprefix("C0.")): value for name, value in tensors.items()
            }
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

    def factored(self, path: Path | None = None) -> KeyStatistics:
        """The same with the factors made and without C0, which is read again from `path`."""

        def read(layer: int) -> Tensor:
            if path is None:
                raise StatisticsError("C0 was not kept beside its factor; collect it again")
            return KeyStatistics.load(path).C0(layer)

        metrics = {layer: self.metric(layer) for layer in self.layers}
        moments: dict[int, Any] = {layer: partial(read, layer) for layer in self.layers}
        return replace(self, moments=moments, _metrics=metrics)
