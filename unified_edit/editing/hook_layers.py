"""COMEBA-HK: batch after batch beside the weights, which never change (arXiv 2403.05330).

Each edited layer has a hook layer: W_h beside the weight W0 of its down-projection, W0 at first. A
*temporary* hook always gives W_h x, a *validated* one where its gate opens (`hook_gates`), and
W0 x elsewhere. For a batch of facts

1. values are optimised with the validated hooks in force, at the last layer as ever;
2. all hooks become temporary ones;
3. layer by layer, on the model as it is then, K and the residual's share R are read, and

       Delta = R K' (lam C0 + sum of K K' of earlier batches + K K')^-1,     W_h += Delta,

   which keeps what earlier batches stored, as far as lam lets it; the layer's hook becomes a
   validated one, so that later layers' keys and residuals see it as it will be.

That is the loop of `layer_loop` with an accumulated metric, and the sum of keys is in the metric's
factor: memory is the same after a thousand batches, but for the list of facts.

To the ledger the hook layers of a model are one more entry, beside the weights instead of in them:
whatever measures a model before and after takes them out and puts them back as it does with edits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, real_number, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.hook_gates import Gate, GateName, Hooks, gate_of
from unified_edit.editing.hook_measures import Opened, Preserved, Tokens, gates_at, share_opened
from unified_edit.editing.hook_writing import (
    HookBatch,
    in_force,
    opened_at_subjects,
    shut_out,
    untouched,
    with_earlier,
    write_turn,
)
from unified_edit.editing.layer_loop import Written, lost_again, not_taken, outcomes_of
from unified_edit.editing.methods import MEMIT, Method
from unified_edit.editing.plans import Plan, check_statistics, checked_values
from unified_edit.editing.values import Values
from unified_edit.errors import EditError, MethodError, ModelChangedError
from unified_edit.facts import Conflict, Fact, SharedSubject
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.fingerprints import tensor_hash
from unified_edit.model.hooks import lock_of, quiet
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.prompts import Encoder
from unified_edit.objective import Update
from unified_edit.statistics import KeyStatistics, default_corpus, statistics_for
from unified_edit.statistics.collect import Source
from unified_edit.statistics.key_sample import collect_sample

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: Keys to preserve that lie above the threshold in the sample; fewer make it a matter of chance.
ABOVE = 20


class HookLayers:
    """The hook layers of one model, edited batch after batch (COMEBA-HK, arXiv 2403.05330).

    >>> hooks = ue.HookLayers(model, tokenizer)                 # doctest: +SKIP
    >>> hooks.edit(facts); hooks.edit(more); hooks.remove()     # doctest: +SKIP

    They are in force from the first `edit` on until `remove`, and again from `attach` on; the
    weights of the model are never written. The model is referred to weakly: keep it.

    method: one with a ridge (MEMIT), the same for all batches.
    statistics: C0 of its layers; without it they are looked up in the cache, or collected and kept.
    gate: "causal" or "published" (`unified_edit.editing.hook_gates`).
    q: the causal gate opens at this share of the keys to preserve, at most about that of any text.
    alpha: where the threshold of the published gate starts.
    texts: whose keys are to be preserved, by default the model's default corpus. Every other one is
        for thresholds, the rest for `false_opens`.
    sample: so many keys a layer are kept for thresholds; 20 / q by default, and 1 / q at least.
    seed: of the prefixes and the sample.
    on_shared_subject, on_conflict: as of `unified_edit.edit`. What contradicts an earlier batch is
        refused too, or the last one wins: it is written, against the earlier one's key.

    Raises MethodError for a method without a ridge and numbers out of range, and what
    `Method.resolve` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        method: Method = MEMIT,
        statistics: KeyStatistics | None = None,
        gate: GateName = "causal",
        q: float = 1e-3,
        alpha: float = 2.2,
        texts: Iterable[str] | None = None,
        sample: int | None = None,
        seed: int = 0,
        on_shared_subject: SharedSubject = "raise",
        on_conflict: Conflict = "raise",
    ) -> None:
        if not isinstance(method, Method):
            raise MethodError(
                f"method is a {type(method).__name__}; give a Method such as unified_edit.MEMIT"
            )
        self.q = real_number(q, "q", MethodError, above=0)
        if self.q >= 1:
            raise MethodError(f"q is {q}; it is a share of tokens, below 1, such as 1e-3")
        self.alpha = real_number(alpha, "alpha", MethodError)
        self._gate: Gate = gate_of(gate, self.alpha)
        self.seed = whole_number(seed, "seed", MethodError, least=-(2**63), below=2**63)
        wanted = ABOVE / self.q if sample is None else sample
        self.sample = whole_number(
            round(wanted) if sample is None else sample,
            "sample",
            MethodError,
            least=round(1 / self.q),
            advice="The 1 - q quantile of fewer than 1 / q keys is beyond all of them",
        )
        self._texts = None if texts is None else tuple(as_list(texts))
        self._editor = Editor(
            model,
            tokenizer,
            statistics=statistics,
            seed=self.seed,
            on_shared_subject=on_shared_subject,
            on_conflict=on_conflict,
        )
        self.method = method.resolve(model)
        if self.method.ridge_for(1) == 0 or self.method.sequential:
            raise MethodError(
                f"{method.name} holds an equality, but hook layers accumulate keys as lam C0 + "
                "K K' with a ridge lam: give unified_edit.MEMIT, or method.replace(ridge=...)"
            )
        if self.method.preservation.name != "C0":
            raise MethodError(
                f"{method.name} preserves {self.method.preservation.name!r}; hook layers "
                "accumulate keys onto C0: method.replace(preservation='C0')"
            )
        self.fingerprint = self._editor.ledger.fingerprint()
        self.facts: tuple[Fact, ...] = ()
        self.batches = 0
        self._hooks = Hooks(self._gate)
        self._source: Source | None = None  # of C0
        self._preserved: Preserved | None = None
        self._id = ""

    # -- what it is ---------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The model; EditError if nobody has kept it."""
        return self._editor.model

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a hook layer, ascending."""
        assert self.method.layers is not None
        return self.method.layers

    @property
    def gate(self) -> GateName:
        """The name of the gate."""
        return self._gate.name

    @property
    def thresholds(self) -> dict[int, float]:
        """{layer: at which its gate opens}."""
        return {
            layer: self._hooks.layers[layer].threshold if self._hooks.layers else self._gate.start
            for layer in self.layers
        }

    def delta(self, layer: int) -> Tensor:
        """W_h - W0 of a layer: (d_out x d_in, float64)."""
        number = whole_number(layer, "a layer", EditError)
        if number not in self.layers:
            raise EditError(f"there is no hook layer at {number}, only at {self.layers}")
        if number in self._hooks.layers:
            return self._hooks.layers[number].delta.clone()
        weight = self._editor.parts.weight(number)
        return torch.zeros(weight.d_out, weight.d_in, dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the same after every batch but the first, beside the list of facts."""
        kept = 0 if self._preserved is None else self._preserved.sample.nbytes
        return kept + sum(one.nbytes for one in self._hooks.layers.values())

    @property
    def id(self) -> str:
        """16 hexadecimal digits, from everything that the hooks do."""
        if not self._id:
            told = {
                str(layer): [tensor_hash(one.delta), one.threshold]
                for layer, one in self._hooks.layers.items()
            }
            digest = hashlib.sha256(json.dumps([self.gate, self.layers, told]).encode())
            self._id = digest.hexdigest()[:16]
        return self._id

    @property
    def updates(self) -> Mapping[str, Update]:
        """What is added to weights: nothing."""
        return MappingProxyType({})

    # -- in a model ---------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in force."""
        return any(entry is self for entry in self._editor.ledger.active)

    def attach(self) -> HookLayers:
        """Put the hooks in force; return the hook layers. Nothing happens where they are.

        Raises EditError where the model has other hook layers, ModelChangedError where its weights
        are not those that the hook layers were made beside.
        """
        ledger = self._editor.ledger
        with lock_of(self.model):
            if ledger.fingerprint() != self.fingerprint:
                raise ModelChangedError(
                    "the model's weights are not those that these hook layers were made beside: "
                    "something changed them. Load the model again, and the hook layers from their "
                    "file"
                )
            if not self.is_attached:
                if any(isinstance(entry, HookLayers) for entry in ledger.active):
                    raise EditError(
                        "the model has other hook layers in force; remove them first (.remove())"
                    )
                ledger.activate((*ledger.active, self))
        return self

    def remove(self) -> None:
        """Take the hooks out: the model is what it was, bit for bit. `attach` puts them back."""
        ledger = self._editor.ledger
        with lock_of(self.model):
            if self.is_attached:
                ledger.activate([entry for entry in ledger.active if entry is not self])

    def __enter__(self) -> HookLayers:
        return self.attach()

    def __exit__(self, *_problem: object) -> None:
        self.remove()

    def enter(self) -> None:
        """For the ledger: register the hooks."""
        self._hooks.register(self._editor.parts, self.layers)

    def leave(self) -> None:
        """For the ledger: take them out."""
        self._hooks.remove()

    # -- batches ------------------------------------------------------------------------------

    def edit(self, facts: Iterable[Fact] | Fact, *, values: Values | None = None) -> HookBatch:
        """Write a batch beside the weights, on top of the earlier ones; the hooks are in force then.

        values: from `Editor.optimise_values` with these hooks in force, `method` and seed.

        Raises what `unified_edit.edit` raises, ContradictionError for a fact that contradicts one
        of an earlier batch too, ModelChangedError as `attach`. On any failure the hooks and all
        that they have accumulated are as before.
        """
        ledger, hooks = self._editor.ledger, self._hooks
        with quiet(self.model), ledger.rollback(), hooks.rollback():
            self.attach()
            plan = self._editor.plan(facts, self.method)
            conflict = self._editor.on_conflict
            notes = with_earlier(self.facts, plan.facts, conflict)
            if values is not None:
                values = checked_values(values, plan)
            parts, known = self._editor.parts, self._source
            if not hooks.layers:
                statistics = self._statistics(plan)
                hooks.layers = untouched(plan, statistics, self._gate.start)
                known = statistics.source
            assert known is not None
            preserved = self._preserved_keys([fact.subject for fact in plan.facts])
            before = likelihoods(parts, plan.rows.bare)
            made = Written()
            turns = [plan.of(turn) for turn in plan.turns]
            for turn in turns:
                write_turn(parts, turn, hooks, known, values, made, preserved, self.q)
                if len(turns) > 1:
                    made.took += [found.greedy for found in likelihoods(parts, turn.rows.bare)]
            made.after = likelihoods(parts, [row for turn in turns for row in turn.rows.bare])
            outcomes = outcomes_of(plan, made, before)
            opened = opened_at_subjects(parts, plan.rows, hooks)
        # nothing fails any more
        self._source, self._preserved, self._id = known, preserved, ""
        self.facts, self.batches = in_force(self.facts, plan.facts), self.batches + 1
        warnings = [*plan.notes, *notes, *made.warnings, *lost_again(plan, made)]
        warnings += [*shut_out(plan.facts, opened), *not_taken(plan.facts, outcomes)]
        for warning in warnings:
            log.warning("%s", warning)
        share = {layer: sum(each) / len(each) for layer, each in opened.items()}
        return HookBatch(plan.facts, outcomes, self.thresholds, share, tuple(warnings))

    def _statistics(self, plan: Plan) -> KeyStatistics:
        """C0 of the layers, given or the model's."""
        found = self._editor.statistics
        if found is None:
            found = statistics_for(self.model, self._editor.tokenizer, self.layers)
        check_statistics(found, self._editor.ledger, plan.weights)
        return found

    def _preserved_keys(self, subjects: Sequence[str]) -> Preserved | None:
        """The keys that a causal gate is to leave alone, without those of some more subjects."""
        if not self._gate.causal:
            return None
        if self._preserved is not None:
            return self._preserved.without(subjects)
        editor = self._editor
        key = ("key sample", self.fingerprint, self.layers, self.sample, self.seed)
        found = None if self._texts is not None else editor.memory.get(key)
        if found is None:
            with editor.ledger.base_state():
                found = collect_sample(
                    editor.parts,
                    Encoder(editor.tokenizer, editor.parts),
                    self._text(0),
                    self.layers,
                    self.sample,
                    self.seed,
                )
            if self._texts is None:
                editor.memory.put(key, found, found.nbytes)
        if len(found) * self.q < 1:
            log.warning(
                "the texts have only %d tokens to take a quantile of 1 - %g from, so that each "
                "counts as more than q: give more texts, or a larger q", len(found), self.q
            )  # fmt: skip
        return Preserved.of(found, [*(fact.subject for fact in self.facts), *subjects])

    def _text(self, which: int) -> Iterator[str]:
        """Every other text of those to be preserved, from the first (0) or the second (1) on."""
        given = default_corpus(self.model) if self._texts is None else self._texts
        return islice(given, which, None, 2)

    # -- at which tokens the gates open -------------------------------------------------------

    def _passes(self, texts: Iterable[str]) -> Iterator[Tokens]:
        editor, subjects = self._editor, [fact.subject for fact in self.facts]
        encoder = Encoder(editor.tokenizer, editor.parts)
        return gates_at(editor.parts, encoder, texts, subjects, self._hooks.layers, self._gate)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Inside, the hooks are in force; EditError where nothing was written yet."""
        if not self._hooks.layers:
            raise EditError("nothing was written into these hook layers yet; edit first")
        with quiet(self.model), self._editor.ledger.state_kept():
            self.attach()
            yield

    def false_opens(self, texts: Iterable[str] | None = None, tokens: int = 20_000) -> Opened:
        """The share of tokens that are no edited subject's last one at which each gate opens.

        texts: other than those that thresholds are made from; by default the other half of the
        texts to be preserved. tokens: so many are counted, or all there are.
        """
        number = whole_number(tokens, "tokens", MethodError, least=1)
        with self._asked():
            passes = self._passes(self._text(1) if texts is None else as_list(texts))
            return share_opened(passes, self.layers, at_subjects=False, enough=number)

    def misses(self, texts: Iterable[str] | str) -> Opened:
        """The share of edited subjects' last tokens in some texts at which each gate stays shut.

        texts: paraphrases, say. Raises StatisticsError where no edited subject stands in them.
        """
        with self._asked():
            passes = self._passes(as_list(texts))
            found = share_opened(passes, self.layers, at_subjects=True, enough=None)
        return Opened(found.tokens, {layer: 1 - share for layer, share in found.share.items()})

    def gates(self, texts: Iterable[str] | str) -> pd.DataFrame:
        """What the gates do at each token of some texts, each run alone: a table.

        Columns: text (its number), token (its characters), subject (whether an edited one ends
        there), layer, score, threshold, open.
        """
        import pandas as pd

        read = as_list(texts)
        with self._asked():
            lines = [
                {
                    "text": number,
                    "token": read[number][start:end],
                    "subject": bool(one.subject[place]),
                    "layer": layer,
                    "score": float(one.scores[layer][place]),
                    "threshold": self._hooks.layers[layer].threshold,
                    "open": bool(one.opened[layer][place]),
                }
                for one in self._passes(read)
                for place, (number, start, end) in enumerate(one.places.tolist())
                for layer in self.layers
            ]
        return pd.DataFrame(lines).sort_values(["text"], kind="stable", ignore_index=True)
