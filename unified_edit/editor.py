"""Editing: the one loop over layers that ROME, EMMET and MEMIT share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.distribution import shares
from unified_edit.edits import Edit, Outcome, Provenance, bind, merged
from unified_edit.errors import (
    EditError,
    FactError,
    InfeasibleError,
    MethodError,
    SharedSubjectError,
    StatisticsError,
)
from unified_edit.facts import Fact, check_batch, check_items, shared_subjects
from unified_edit.fingerprints import tensor_hash
from unified_edit.key_statistics import KeyStatistics
from unified_edit.keys import compute_keys, read_values
from unified_edit.ledger import Ledger, ledger_of
from unified_edit.methods import EMMET, Method
from unified_edit.models import Anatomy, Tokenizer, anatomy, check_finite, check_tokenizer
from unified_edit.objective import Update, solve
from unified_edit.statistics_cache import statistics_for
from unified_edit.tokens import check_rows
from unified_edit.values import Values, compute_values

log = logging.getLogger(__name__)


def edit(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Sequence[Fact] | Fact,
    method: Method = EMMET,
    *,
    statistics: KeyStatistics | None = None,
    values: Values | None = None,
    seed: int = 0,
    apply: bool = True,
) -> Edit:
    """Write facts into the model; return the `Edit`, which can be undone, saved and exported.

    model, tokenizer: from `load_model`, or any causal language model of a known family with its
        fast tokenizer. Edits already active stay: the new one is computed on the model as it is.
    facts: at least one; identical ones are merged.
    method: ROME, EMMET, MEMIT, or one of your own (`Method`).
    statistics: C0 of the method's layers; without it they are looked up in the cache, or
        collected from the model's default corpus and kept.
    values: targets from `optimise_values` for the same method, seed and state of the model;
        optimised here if not given.
    seed: of the sampled prefixes.
    apply: with False the model stays as it was; look at the edit, then ``edit.apply()``.

    Raises FactError (ContradictionError, SharedSubjectError, TokenizationError) for facts that
    cannot be edited together, MethodError, ModelError, StatisticsError, InfeasibleError, EditError
    for what their names say. On any failure every weight, flag and hook is as it was.
    """
    parts, ledger, facts, method = set_up(model, tokenizer, facts, method)
    layers = method.layers or ()
    if statistics is not None:
        _check_statistics(statistics, parts, ledger, layers)
    if values is not None and not isinstance(values, Values):
        raise MethodError(
            f"values is a {type(values).__name__}; give what optimise_values returned, or nothing"
        )
    for layer in layers:
        parts.probe(layer)
    prefixes = ledger.prefixes(tokenizer, method.contexts, seed)
    check_rows(parts, tokenizer, facts, prefixes)
    if statistics is None:  # last, because it may take hours
        statistics = statistics_for(model, tokenizer, layers)
        _check_statistics(statistics, parts, ledger, layers)
    work = _Work(parts, tokenizer, ledger, method, statistics, prefixes)
    state = ledger.state()
    pending = _Pending()
    with ledger.state_kept():
        if method.sequential and len(facts) > 1:
            if values is not None:
                raise MethodError(
                    f"{method.name} writes facts one after another, each on the model edited so "
                    "far, so values cannot be given for several; leave values out"
                )
            parts_of = [work.write([fact], None, pending) for fact in facts]
            found = [outcome for outcomes in parts_of for outcome in outcomes]
        else:
            if values is not None:
                _check_values(values, facts, method, state, prefixes)
                values = values.of(facts)
            found = work.write(facts, values, pending)
    updates: dict[int, tuple[Update, ...]] = {
        layer: (merged(pending.updates[layer]),) for layer in layers
    }
    made = _make_edit(work, facts, updates, found, seed, state)
    if apply:
        made.apply()
    return made


class Editor:
    """A model with what all edits of it share: `edit` with these arguments filled in.

    >>> editor = Editor(model, tokenizer, method=ue.EMMET)      # doctest: +SKIP
    >>> editor.edit([fact]); editor.active; editor.reset()      # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        method: Method = EMMET,
        statistics: KeyStatistics | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.method, self.seed = model, tokenizer, method, seed
        self.statistics = statistics
        self._ledger = ledger_of(model)

    @property
    def active(self) -> tuple[Edit, ...]:
        """The edits in force, in the order in which they were applied."""
        return tuple(entry for entry in self._ledger.active if isinstance(entry, Edit))

    def edit(
        self, facts: Sequence[Fact] | Fact, method: Method | None = None, *, apply: bool = True
    ) -> Edit:
        """`unified_edit.edit` on this model."""
        return edit(
            self.model,
            self.tokenizer,
            facts,
            method or self.method,
            statistics=self.statistics,
            seed=self.seed,
            apply=apply,
        )

    def reset(self) -> None:
        """Take out all edits: the model is its base again, bit for bit."""
        self._ledger.activate(())


def optimise_values(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Sequence[Fact] | Fact,
    method: Method = EMMET,
    *,
    seed: int = 0,
) -> Values:
    """The values v* of facts on the model as it is: the slow part of `edit`, to be reused.

    Values do not depend on the other facts of a batch, so those of many facts can be optimised
    once and then edited singly, in batches, or by other methods with the same site, layer and
    contexts. Raises what `edit` raises.
    """
    parts, ledger, facts, method = set_up(model, tokenizer, facts, method, batch=False)
    prefixes = ledger.prefixes(tokenizer, method.contexts, seed)
    check_rows(parts, tokenizer, facts, prefixes)
    made = compute_values(parts, tokenizer, facts, method, prefixes)
    return made.at(value_conditions(method, ledger.state(), prefixes))


def value_conditions(method: Method, state: str, prefixes: tuple[str, ...]) -> str:
    """Everything that values depend on besides the facts, as text."""
    fields = ("steps", "learning_rate", "kl_weight", "weight_decay", "clamp", "stop_loss")
    return repr((state, prefixes, *(getattr(method, field) for field in fields)))


def _check_values(
    values: Values, facts: Sequence[Fact], method: Method, state: str, prefixes: tuple[str, ...]
) -> None:
    assert method.layers is not None
    wanted = (method.layers[-1], method.site)
    if (values.layer, values.site) != wanted:
        raise MethodError(
            f"the values given were optimised at {values.site} {values.layer}, but {method.name} "
            f"sets them at {wanted[1]} {wanted[0]}; optimise them for this method"
        )
    if values.conditions != value_conditions(method, state, prefixes):
        raise MethodError(
            "the values given were optimised on another model or state of it, with another seed "
            "or other settings; optimise them again: optimise_values(model, tokenizer, facts, "
            "method, seed=...)"
        )
    missing = [fact for fact in facts if fact not in values.facts]
    if missing:
        raise FactError(
            f"the values given hold none for {missing[0].text!r} -> {missing[0].target_new!r} "
            f"({len(missing)} facts are missing); optimise them for all facts"
        )


def _check_statistics(
    statistics: KeyStatistics, parts: Anatomy, ledger: Ledger, layers: tuple[int, ...]
) -> None:
    """Raise StatisticsError unless the statistics are this model's and hold all its layers."""
    if not isinstance(statistics, KeyStatistics):
        raise StatisticsError(
            f"statistics is a {type(statistics).__name__}; give a KeyStatistics, from "
            "KeyStatistics.collect or KeyStatistics.load, or nothing"
        )
    statistics.check_model(ledger.fingerprint(), str(parts.model.config._name_or_path))
    for layer in layers:
        if statistics.metric(layer).dim != parts.d_in:
            raise StatisticsError(
                f"C0 of layer {layer} has {statistics.metric(layer).dim} rows, but the model's "
                f"keys have {parts.d_in} entries; collect the statistics again"
            )


def set_up(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Sequence[Fact] | Fact,
    method: Method,
    batch: bool = True,
) -> tuple[Anatomy, Ledger, list[Fact], Method]:
    """Everything that can be checked before any work is done."""
    facts = check_batch(facts) if batch else check_items(facts)
    if not isinstance(method, Method):
        raise MethodError(
            f"method is a {type(method).__name__}; give a Method such as unified_edit.EMMET"
        )
    parts = anatomy(model)
    check_tokenizer(tokenizer)
    method = method.resolve(parts)
    check_finite(parts)
    ledger = ledger_of(model)
    ledger.verify()
    check_rows(parts, tokenizer, facts, [""])
    _check_value_is_read(parts, facts, method)
    if batch and not method.sequential and method.ridge_for(len(facts)) == 0:
        _check_equality_possible(parts, facts, method)
    return parts, ledger, facts, method


def _check_value_is_read(parts: Anatomy, facts: list[Fact], method: Method) -> None:
    """Behind the last block no token sees another one: a value there reaches no later target."""
    assert method.layers is not None
    after = next((fact for fact in facts if fact.suffix), None)
    if method.layers[-1] == parts.n_layers - 1 and after is not None:
        raise MethodError(
            f"{method.name} sets values at layer {method.layers[-1]}, the last one: what stands "
            f"there at the subject of {after.text!r} is read by no later token, so it cannot make "
            f"the model say {after.target_new!r}. Edit an earlier layer: method.replace(layers=...)"
        )


def _check_equality_possible(parts: Anatomy, facts: list[Fact], method: Method) -> None:
    """What can be said of an equality batch without any key."""
    if method.infeasible == "raise" and len(facts) > parts.d_in:
        raise InfeasibleError(
            f"{len(facts)} facts in one equality batch, but keys have only d_k = {parts.d_in} "
            "entries, so Delta K = R has no solution; use smaller batches, a ridge "
            "(method.replace(ridge=...)), or infeasible='least_violation'"
        )


@dataclass
class _Pending:
    """The edit in the making, as the ledger sees it."""

    id: str = "pending"
    updates: dict[int, list[Update]] = field(default_factory=dict)


@dataclass
class _Work:
    parts: Anatomy
    tokenizer: Tokenizer
    ledger: Ledger
    method: Method
    statistics: KeyStatistics
    prefixes: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)

    def keys(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """K (d_in x E) at one layer of the model as it is now."""
        return compute_keys(
            self.parts, self.tokenizer, facts, self.prefixes, [layer], self.method.key_mean
        )[layer]

    def write(self, facts: list[Fact], values: Values | None, pending: _Pending) -> list[Outcome]:
        """Compute the updates for some facts, layer by layer, into `pending`.

        At each layer keys and residual are read again on the partly edited model, and the layer
        takes its share of the residual, :eq:`spread-residual` (MEMIT, sec. 4.4, algorithm 1).
        """
        method, parts = self.method, self.parts
        layers = method.layers or ()
        ridge = method.ridge_for(len(facts))
        first_keys = self.keys(facts, layers[0])
        self._check_subjects(facts, first_keys, ridge)
        names = [f"{fact.text!r} -> {fact.target_new!r}" for fact in facts]
        before = self.ledger.active
        if values is None:
            if ridge == 0:  # an impossible batch is refused before its values are optimised
                self._solve(layers[0], first_keys, torch.zeros_like(first_keys[:1]), 0.0, names)
            values = compute_values(parts, self.tokenizer, facts, method, self.prefixes)
        parts_of_residual = shares(len(layers), method.distribution)
        rest = before if pending not in before else before[:-1]
        for place, (layer, share) in enumerate(zip(layers, parts_of_residual, strict=True)):
            if place == 0:
                keys, residual = first_keys, values.delta  # nothing has changed since
            else:
                keys = self.keys(facts, layer)
                now = read_values(parts, self.tokenizer, facts, values.layer, values.site)
                residual = values.z - now
            update = self._solve(layer, keys, share * residual, ridge, names)
            pending.updates.setdefault(layer, []).append(update)
            more_to_come = place < len(layers) - 1 or method.sequential
            if more_to_come:
                # a fresh object each time: the ledger compares what was active before
                self.ledger.activate((*rest, pending))
        return [_outcome(values, index, method) for index in range(len(facts))]

    def _solve(
        self, layer: int, keys: Tensor, residual: Tensor, ridge: float, names: list[str]
    ) -> Update:
        return solve(
            self.statistics.metric(layer),
            keys,
            residual,
            ridge=ridge,
            infeasible=self.method.infeasible,
            names=names,
        )

    def _check_subjects(self, facts: list[Fact], keys: Tensor, ridge: float) -> None:
        """Facts that share a subject have nearly or exactly the same key."""
        unit = keys / keys.norm(dim=0)
        for i, j in shared_subjects(facts):
            cosine = float(unit[:, i] @ unit[:, j])
            what = (
                f"{facts[i].text!r} -> {facts[i].target_new!r} and {facts[j].text!r} -> "
                f"{facts[j].target_new!r} share the subject {facts[i].subject!r}; the cosine of "
                f"their keys is {cosine:.6f}"
            )
            if ridge == 0 and self.method.infeasible == "raise":
                raise SharedSubjectError(
                    f"{what}. One key cannot hold two values: write them in separate edits, or "
                    "use a method with a ridge (unified_edit.MEMIT), or "
                    "infeasible='least_violation'"
                )
            self.warnings.append(what + "; neither is held exactly")


def _outcome(values: Values, index: int, method: Method) -> Outcome:
    assert method.clamp is not None
    ratio = float(values.delta[:, index].norm() / values.target_init[:, index].norm())
    return Outcome(values.losses[index], ratio, ratio >= method.clamp * (1 - 1e-5))


def _make_edit(
    work: _Work,
    facts: Sequence[Fact],
    updates: dict[int, tuple[Update, ...]],
    outcomes: list[Outcome],
    seed: int,
    state: str,
) -> Edit:
    parts, ledger = work.parts, work.ledger
    model = parts.model
    alone = _Pending("alone", {layer: list(update) for layer, update in updates.items()})
    provenance = Provenance(
        fingerprint=ledger.fingerprint(),
        state=state,
        model=str(model.config._name_or_path),
        revision=getattr(model.config, "_commit_hash", None),
        library=version("unified_edit"),
        seed=seed,
        prefixes=work.prefixes,
        before={layer: tensor_hash(ledger.base_weight(layer)) for layer in updates},
        after={layer: tensor_hash(ledger.with_edits(layer, [alone])) for layer in updates},
        statistics=asdict(work.statistics.source),
    )
    made = Edit(
        tuple(facts), work.method, updates, tuple(outcomes), provenance, tuple(work.warnings)
    )
    for warning in made.warnings:
        log.warning("%s", warning)
    if all(outcome.relative_norm == 0.0 for outcome in outcomes):
        raise EditError(
            "the edit changes nothing: the model says the target already in every context, so "
            "the value was not moved; give another target"
        )
    bind(made, model)
    return made
