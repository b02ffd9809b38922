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

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.hook_files import Stored, digest_of, read, write
from unified_edit.editing.hook_gates import GateName
from unified_edit.editing.hook_measures import (
    Opened,
    Preserved,
    Tokens,
    gates_at,
    sampled,
    share_opened,
    table_of,
)
from unified_edit.editing.hook_writing import (
    HookBatch,
    accumulating,
    in_force,
    opened_at_subjects,
    shut_out,
    untouched,
    with_earlier,
    write_turn,
)
from unified_edit.editing.hooks_beside import HooksBeside, HookSettings
from unified_edit.editing.layer_loop import Written, lost_again, not_taken, outcomes_of
from unified_edit.editing.methods import MEMIT, Method
from unified_edit.editing.named import check_none
from unified_edit.editing.plans import Plan, check_statistics, checked_values
from unified_edit.editing.values import Values
from unified_edit.errors import EditError, MethodError
from unified_edit.facts import Conflict, Fact, SharedSubject
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import KeyStatistics, default_corpus, statistics_for

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


class HookLayers(HooksBeside):
    """The hook layers of one model, edited batch after batch (COMEBA-HK, arXiv 2403.05330).

    >>> hooks = ue.HookLayers(model, tokenizer)                 # doctest: +SKIP
    >>> hooks.edit(facts); hooks.edit(more); hooks.remove()     # doctest: +SKIP

    They are in force from the first `edit` on until `remove`, and again from `attach` on; the
    weights of the model are never written. The model is referred to weakly: keep it.

    method: one with a ridge (MEMIT), the same for all batches. The causal gate tells edited keys
        from others by how far both are moved, and a small ridge moves all of them: twenty batches
        of atlas are held with 3,000, and not with its 1 (benchmarks/hook_layers.py, q = 1e-2).
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
        editor = Editor(
            model,
            tokenizer,
            method=accumulating(method.resolve(model)),
            statistics=statistics,
            seed=whole_number(seed, "seed", MethodError, least=-(2**63), below=2**63),
            on_shared_subject=on_shared_subject,
            on_conflict=on_conflict,
        )
        super().__init__(editor, HookSettings(gate, q, alpha, sample))
        self._texts = None if texts is None else tuple(as_list(texts))
        self._texts_were = digest_of(self._texts)

    # -- batches ------------------------------------------------------------------------------

    def edit(
        self,
        facts: Iterable[Fact] | Fact,
        *,
        values: Values | None = None,
        preserve: None = None,
    ) -> HookBatch:
        """Write a batch beside the weights, on top of the earlier ones; attached if they were not.

        values: from `Editor.optimise_values` with these hooks in force, `method` and seed.
        preserve: refused; what no gate opens for is as it was, to the last bit.

        Raises what `unified_edit.edit` raises, ContradictionError for a fact that contradicts one
        of an earlier batch too, ModelChangedError as `attach`. On any failure the hooks and all
        that they have accumulated are as before.
        """
        check_none(
            preserve,
            "HookLayers",
            "a token is moved where its gate opens and nowhere else, and q says how often that "
            "happens; no weight is written that could be held",
        )
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
                hooks.layers = untouched(plan, statistics, self._hooks.gate.start)
                known = statistics.source
            assert known is not None
            preserved = self._preserved_keys([fact.subject for fact in plan.facts])
            before = likelihoods(parts, plan.rows.bare)
            made = Written()
            turns = [plan.of(turn) for turn in plan.turns]
            for turn in turns:
                write_turn(parts, turn, hooks, known, values, made, preserved, self.settings.q)
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
        if not self._hooks.gate.causal:
            return None
        if self._preserved is not None:
            return self._preserved.without(subjects)
        editor = self._editor
        found = sampled(
            editor,
            self._text(0),
            self.layers,
            self.settings.keys,
            editor.seed,
            kept=self._texts is None,
        )
        if len(found) * self.settings.q < 1:
            log.warning(
                "the texts have only %d tokens to take a quantile of 1 - %g from, so that each "
                "counts as more than q: give more texts, or a larger q",
                len(found),
                self.settings.q,
            )
        return Preserved.of(found, [*(fact.subject for fact in self.facts), *subjects])

    def _text(self, which: int) -> Iterator[str]:
        """Every other text of those to be preserved, from the first (0) or the second (1) on."""
        if digest_of(self._texts) != self._texts_were:
            raise EditError(
                "these hook layers preserve other texts than those at hand; give the texts that "
                "they were made with: HookLayers.load(path, model, tokenizer, texts=...)"
            )
        given = default_corpus(self.model) if self._texts is None else self._texts
        return islice(given, which, None, 2)

    # -- at which tokens the gates open -------------------------------------------------------

    def _passes(self, texts: Iterable[str]) -> Iterator[Tokens]:
        editor, subjects = self._editor, [fact.subject for fact in self.facts]
        encoder = Encoder(editor.tokenizer, editor.parts)
        return gates_at(
            editor.parts, encoder, texts, subjects, self._hooks.layers, self._hooks.gate
        )

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
        read = as_list(texts)
        with self._asked():
            return table_of(self._passes(read), read, self._hooks.layers)

    # -- on disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: W_h - W0, what was accumulated, thresholds, facts, origin.

        Raises EditError where nothing was written into the layers, EditFileError if the file cannot
        be written.
        """
        if self._source is None:
            raise EditError("nothing was written into these hook layers yet; edit first")
        editor = self._editor
        stored = Stored(
            layers=self._hooks.layers,
            settings=self.settings,
            method=self.method,
            source=self._source,
            facts=self.facts,
            batches=self.batches,
            seed=editor.seed,
            on_shared_subject=editor.on_shared_subject,
            on_conflict=editor.on_conflict,
            texts=self._texts_were,
        )
        write(path, stored, editor, self.fingerprint)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        texts: Iterable[str] | None = None,
    ) -> HookLayers:
        """Read hook layers of this model; `attach` puts them in force, and `edit` goes on.

        texts: those they were made with, if any were given; needed only where one goes on.

        Raises EditFileError for a file that is missing, damaged, something else, or made beside
        another model.
        """
        stored = read(path, ledger_of(model))
        made = cls(
            model,
            tokenizer,
            method=stored.method,
            gate=stored.settings.gate,
            q=stored.settings.q,
            alpha=stored.settings.alpha,
            sample=stored.settings.sample,
            texts=texts,
            seed=stored.seed,
            on_shared_subject=stored.on_shared_subject,
            on_conflict=stored.on_conflict,
        )
        made._hooks.layers, made._source = stored.layers, stored.source
        made.facts, made.batches, made._texts_were = stored.facts, stored.batches, stored.texts
        return made
