"""C0, the mean second moment of the keys that a model uses on ordinary text.

``C0 = E[k k']`` over the tokens of a corpus, one matrix a layer. This module holds the result; the
job that makes it is `unified_edit.statistics.collect`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
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
    brief,
)
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.prompts import Encoder
from unified_edit.objective import Metric
from unified_edit.statistics.collect import Job, Source, checkpoints, collect
from unified_edit.statistics.convergence import check_enough, warn
from unified_edit.statistics.files import Content, moment_of, read, write
from unified_edit.statistics.joining import Part, added_up, check_alike
from unified_edit.statistics.moments import Moment, is_made, matrix_of, shrunk
from unified_edit.statistics.shares import Counted, checked_part
from unified_edit.statistics.weighting import checked_weighting

log = logging.getLogger(__name__)

#: Bytes of factors that statistics keep: one at the width of GPT-J, dozens at that of GPT-2.
FACTOR_BYTES = 2 * 2**30


@dataclass(frozen=True)
class KeyStatistics:
    """C0 of some layers, with what it was made from.

    `moments` maps a layer to C0 (d_k x d_k, float64), the shrinkage already added, or to a
    function that reads it; `agreement` maps it to the median of |k'C1^-1 k / k'C2^-1 k - 1| over
    fresh keys, where C1 and C2 are the two halves' moments (NaN where a half has no Cholesky
    factor). `counted` says which texts were counted, and `fresh` holds those keys of each layer
    (n x d_k, float32): by these two, statistics are added up. Files of older versions lack them.
    """

    source: Source
    moments: Mapping[int, Moment] = field(repr=False)
    agreement: dict[int, float]
    _metrics: dict[int, Metric] = field(default_factory=dict, repr=False, compare=False)
    counted: Counted | None = field(default=None, repr=False, compare=False)
    fresh: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are statistics of, ascending."""
        return tuple(sorted(self.moments))

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices in memory: moments that are not on disk, and factors."""
        held = [one for one in self.moments.values() if isinstance(one, Tensor)]
        return self._factor_bytes + sum(one.nbytes for one in held)

    def C0(self, layer: int) -> Tensor:
        """The mean second moment at `layer`, :eq:`preserve-c0`: (d_k x d_k, float64)."""
        layer = whole_number(layer, "a layer", StatisticsError)
        if layer not in self.moments:
            raise StatisticsError(
                f"there are no key statistics for layer {layer}, only for {self.layers}; collect "
                "them: KeyStatistics.collect(model, tokenizer, texts, layers=[...])"
            )
        return matrix_of(self.moments[layer])

    def metric(self, layer: int, device: torch.device | str | None = None) -> Metric:
        """The factored C0 of `layer`; kept, as long as all together take `FACTOR_BYTES`.

        On `device`; where it is or C0 is if None.
        """
        layer = whole_number(layer, "a layer", StatisticsError)
        if layer not in self._metrics:
            # room first, for one more that is like those
            while (n := len(self._metrics)) and self._factor_bytes * (n + 1) > n * FACTOR_BYTES:
                self._metrics.pop(next(iter(self._metrics)))
            C0 = self.C0(layer)
            # what is read or made for this alone is factored in its place
            own = is_made(self.moments[layer])
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
        if layer in self._metrics:
            return self._metrics[layer].dim
        return self.fresh[layer].shape[1] if layer in self.fresh else len(self.C0(layer))

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
        # one layer at a time, where it is asked for: GPT-J's six take 12 GiB
        moments = {one: partial(shrunk, C0, shrinkage) for one, C0 in self.moments.items()}
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
        batch_tokens: int | None = None,
        skip_start: bool = False,
        weighting: Literal["tokens", "norm"] = "tokens",
        part: tuple[int, int] = (0, 1),
        until: float | None = None,
        max_memory: int | None = None,
        folder: str | Path | None = None,
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

        `part` = (i, n) counts share i (0 is the first) of n: every n-th group of 256 texts, and
        the n-th part of `tokens`. Shares are counted anywhere and added up by `joined`.
        `until` stops when the halves of the text disagree by no more than that at all layers (0.1
        is converged); they are compared at 4 d_k tokens and whenever there is a quarter more.

        The sums take 9 d_k^2 bytes a layer, with a buffer of 8 KiB for each entry of a key, on
        the layer's device where that has float64 and room, else on the CPU. `max_memory` bounds
        them, in bytes: layers beyond it need another pass over the texts, which must be a list
        then (each pass has a checkpoint of its own), or go into memory-mapped files of `folder`,
        as their C0 does, which are gone when it is. `batch_tokens` bounds a forward, padding
        included; by default it fits the machine. Where memory does not suffice for a batch, it is
        run in two.

        Raises StatisticsError for fewer than 2*d_k tokens, unless `shrinkage` is given or this is
        one of several parts, for texts that are no strings, for sums that do not fit, and for a
        checkpoint made from something else; ModelError for a model that cannot be edited or layers
        it does not have; TokenizationError for a tokenizer that does not belong to the model.
        """
        parts = anatomy(model)
        counts = {"max_tokens": max_tokens, "batch_tokens": batch_tokens, "tokens": tokens}
        whole = {
            name: whole_number(number, name, StatisticsError, least=1)
            for name, number in {**counts, "max_memory": max_memory}.items()
            if number is not None
        }
        if not is_flag(skip_start):
            raise StatisticsError(f"skip_start is {brief(skip_start)}; give True or False")
        if skip_start and whole["max_tokens"] == 1:
            raise StatisticsError(
                "skip_start leaves out the first token of each text, and max_tokens=1 takes no "
                "other; give a larger max_tokens"
            )
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise StatisticsError(
                f"texts is one {type(texts).__name__}; give a list of texts, each stands alone"
            )
        if until is not None:
            until = real_number(until, "until", StatisticsError, above=0)
        place = None if checkpoint is None else as_path(checkpoint, "checkpoint", StatisticsError)
        files = None if folder is None else as_path(folder, "folder", StatisticsError)
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
                weighting=checked_weighting(weighting),
                part=checked_part(part),
                until=until,
                folder=files,
                **whole,
            )
            found = collect(job, texts)
        made = cls(found[0], found.moments, found[2], {}, *found[3:5])
        if job.part[1] == 1:
            made._look_at(found.unsure)
        for path in () if keep_checkpoint else checkpoints(job):
            with contextlib.suppress(OSError):  # none was written: no reason to lose the work
                path.unlink(missing_ok=True)
        return made

    def _look_at(self, unsure: Iterable[int]) -> None:
        """Refuse what has no Cholesky factor while its cause is known; say what is not settled."""
        for layer in sorted(unsure):
            self.metric(layer)
        warn(self.agreement, self.source.tokens, {one: self.width(one) for one in self.agreement})

    def only(self, layer: int) -> KeyStatistics:
        """The statistics of one layer."""
        self.C0(layer)
        return KeyStatistics.joined([self], [layer])

    @classmethod
    def joined(
        cls, each: Sequence[KeyStatistics], layers: Sequence[int] | None = None
    ) -> KeyStatistics:
        """Statistics of one model as one object: several layers, or parts of the same layers.

        Those of different layers stand side by side, with the first one's source. Those of the same
        layers, from different texts, are added up by their numbers of tokens: C0 is that of all
        texts, to the last bit whatever the order they are given in. From shares of a corpus it is
        that of a single run up to the rounding of float64 sums: 2^-53 of sqrt(C_ii C_jj) for each
        product that is added, of which there are two or three for 2,048 tokens.

        layers: which of them; all if None. Raises StatisticsError if models or the way of counting
        differ, if a text is in two parts, and if all shares together have fewer than 2*d_k tokens.
        """
        check_alike([one.source for one in each], ("fingerprint", "weighting", "skip_start"))
        alike: dict[tuple[int, ...], list[KeyStatistics]] = {}
        for one in each:
            alike.setdefault(one.layers, []).append(one)
        found = [some[0] if len(some) == 1 else cls._added_up(some) for some in alike.values()]
        if len({layer for one in found for layer in one.layers}) < sum(
            len(one.layers) for one in found
        ):
            raise StatisticsError(
                f"some of these statistics share layers and some do not ({sorted(alike)}); join "
                "parts of the same layers, or of different ones"
            )

        def all_of(name: str) -> dict[int, Any]:
            items = [item for one in found for item in getattr(one, name).items()]
            return {layer: value for layer, value in items if layers is None or layer in layers}

        moments, agreement, metrics, fresh = map(all_of, "moments agreement _metrics fresh".split())
        return cls(found[0].source, moments, agreement, metrics, found[0].counted, fresh)

    @classmethod
    def _added_up(cls, each: Sequence[KeyStatistics]) -> KeyStatistics:
        """The sum of statistics of the same layers from different texts."""
        parts = [Part(one.source, one.counted, one.fresh, one.C0) for one in each]
        source, moments, agreement, counted, fresh = added_up(parts, each[0].layers)
        made = cls(source, moments, agreement, {}, counted, fresh)
        if made.source.part is None:
            check_enough(made.source.tokens, max(map(made.width, made.layers)))
            made._look_at(made.layers)
        return made

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises StatisticsFileError if it cannot be written.
        """
        write(path, Content(self.source, self.moments, self.agreement, self.counted, self.fresh))

    @classmethod
    def load(cls, path: str | Path) -> KeyStatistics:
        """Read what `save` wrote.

        Raises StatisticsFileError if the file is missing, damaged or of another kind. Whether
        it belongs to a model is checked where it is used.
        """
        found = read(path)
        return cls(found.source, found.moments, found.agreement, {}, *found[3:])

    @classmethod
    def lazily(cls, path: str | Path) -> KeyStatistics:
        """As `load`, but C0 is not kept: each layer's is read where it is asked for."""
        found = read(path, lazily=True)
        return cls(found.source, found.moments, found.agreement, {}, *found[3:])

    def unread(self, path: str | Path) -> KeyStatistics:
        """The same without C0, which is read from `path` where it is asked for, and factors."""
        moments = {layer: partial(moment_of, path, layer) for layer in self.layers}
        return replace(self, moments=moments, _metrics={})

    def factored(self, path: Path) -> KeyStatistics:
        """The same with the factors made and without C0, which is read again from `path`."""
        return replace(self.unread(path), _metrics={one: self.metric(one) for one in self.layers})
