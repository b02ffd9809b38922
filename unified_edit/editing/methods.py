"""A method is data: what differs between ROME, EMMET and MEMIT, and nothing else.

All methods run through the same code. Fields left None are filled by `Method.resolve`: from the
settings of its `preset` for the model (`settings.SETTINGS`), or else from `settings.DEFAULTS`. The
resolved method is stored in every edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, is_flag, real_number, whole_number
from unified_edit.editing.choices import Choice, chosen, remembered
from unified_edit.editing.keys import KEY_MEANS, SITES
from unified_edit.editing.prefixes import Contexts
from unified_edit.editing.preservations import PRESERVATIONS
from unified_edit.editing.settings import DEFAULTS, settings_of
from unified_edit.editing.spreading import SPREADS, has_own_targets
from unified_edit.errors import MethodError, brief
from unified_edit.model.anatomy import Anatomy, anatomy

#: Field of a method -> the choices that have a name there.
CHOICES: Mapping[str, Mapping[str, Choice]] = {
    "distribution": SPREADS,
    "site": SITES,
    "key_mean": KEY_MEANS,
    "divisor_mean": KEY_MEANS,
    "output_mean": KEY_MEANS,
    "preservation": PRESERVATIONS,
}

#: Bounds of the fields that are numbers; None is left to `Method.resolve`.
_WHOLE = {"steps": 1, "ridge_from": 1}
_REAL: dict[str, dict[str, Any]] = {
    "ridge": {"least": 0},
    "weight_decay": {"least": 0},
    "kl_weight": {"least": 0},
    "clamp": {"above": 0},
    "learning_rate": {"above": 0},
    "stop_loss": {},
    "prob_cutoff": {},
    "norm_weight": {"least": 0},
    "norm_anchor": {"least": 0},
}

#: Fields that files and tables name only where they are not at their default: they came later.
_LATER = ("divisor_mean", "output_mean", "norm_weight", "prob_cutoff", "norm_anchor")

#: One prefix of ten tokens behind each of five words (kmeng01/memit, 2022, and EMMET's code, 2024).
MEMIT_CONTEXTS = Contexts()
#: ROME samples ten prefixes of five tokens and ten of ten (kmeng01/rome, hparams/ROME).
ROME_CONTEXTS = Contexts(starts=("",), lengths=(5, 10), per_start=10)


@dataclass(frozen=True, kw_only=True, repr=False)
class Method:
    """One locate-and-edit method on one model. None: filled by `resolve`.

    name: what it is called in tables.
    preset: whose published settings `resolve` looks up; None: nobody's.
    layers: blocks whose down-projection is edited, ascending; values are set at the last.
    ridge: lam of the least-squares form, relative to the *mean* C0; 0 is the equality form.
    ridge_from: the ridge is used for batches of at least this many facts, equality below.
    distribution: how the residual is spread over layers: "memit", "pmet", "full", or a function of
        the number of layers left; "replay": each layer has a target of its own.
    preservation: what an update costs: "C0", or a function (statistics, weight) -> metric;
        "null_space" and `null_space` (threshold) let it act where C0 is nearly zero alone.
    norm_weight: weight of ||Delta||_F^2 beside that: C0 + norm_weight * I. ENCORE's lam_n is
        norm_weight * ridge.
    sequential: write facts one after another instead of together.
    site: where the value is set: the output of the "block" or of its "mlp", or a function
        (anatomy, layer) -> module.
    key_mean: "typed" is half the bare prompt and half the mean of the prefixed ones, "plain"
        the mean over all contexts, "bare" the bare prompt alone; or a function of their number
        that gives their weights.
    divisor_mean: of the key that the update is divided by, at which it is held (`divided`); None is
        `key_mean`, the key itself.
    output_mean: of what stands there now and is taken from the value: at the "bare" prompt, or in
        the contexts as they are weighed here.
    contexts: which prefixes are sampled, or given.
    steps: losses computed at most; there is one update fewer.
    learning_rate: of Adam.
    kl_weight: weight of KL(current || initial) at the subject of "{subject} is a".
    weight_decay: weight of norm(delta) / norm(target_init)^2.
    clamp: norm(delta) is kept below clamp * norm(target_init).
    stop_loss: a fact is finished once its total loss is below this.
    prob_cutoff: or, if it is -n, at the n-th loss at which every token of its target is the
        likeliest behind every prefix; if it is positive, once the target's probability, the mean
        over contexts, is above it. As in ENCORE's code, the bare prompt is not asked for the first.
    norm_anchor: m > 0 rescales what the MLP is to give, v*, to norm(v*) = m, and leaves a fact
        whose v* is longer than 2 m as it was (norm anchors; `norm_anchor_of`).
    infeasible: "raise", or "least_violation" for the limit lam -> 0 where the equality has no
        solution.

    Functions are kept as `Choice`, so that an edit can say by name what it was made with.
    """

    name: str
    preset: str | None = None
    layers: tuple[int, ...] | None = None
    ridge: float | None = 0.0
    ridge_from: int = 1
    distribution: Choice = SPREADS["memit"]
    preservation: Choice = PRESERVATIONS["C0"]
    norm_weight: float | None = 0.0
    sequential: bool = False
    site: Choice = SITES["block"]
    key_mean: Choice = KEY_MEANS["typed"]
    divisor_mean: Choice | None = None
    output_mean: Choice = KEY_MEANS["bare"]
    contexts: Contexts = MEMIT_CONTEXTS
    steps: int | None = None
    learning_rate: float | None = None
    kl_weight: float = 0.0625
    weight_decay: float | None = None
    clamp: float | None = None
    stop_loss: float | None = None
    prob_cutoff: float | None = 0.0
    norm_anchor: float | None = 0.0
    infeasible: Literal["raise", "least_violation"] = "raise"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise MethodError(f"a method's name is {brief(self.name)}; give a text")
        made: dict[str, Any] = {}
        if self.layers is not None:
            made["layers"] = tuple(
                whole_number(layer, f"{self.name}: a layer of layers", MethodError)
                for layer in as_list(self.layers)
            )
        for field, least in _WHOLE.items():
            if (value := getattr(self, field)) is not None or field == "ridge_from":
                made[field] = whole_number(value, f"{self.name}: {field}", MethodError, least=least)
        for field, bound in _REAL.items():
            value = getattr(self, field)
            if value is not None or field == "kl_weight":
                made[field] = real_number(value, f"{self.name}: {field}", MethodError, **bound)
        cutoff = made.get("prob_cutoff", 0.0)
        if cutoff >= 1 or (cutoff < 0 and cutoff != int(cutoff)):
            raise MethodError(
                f"{self.name}: prob_cutoff is {brief(cutoff)}; give a probability below 1, or -n "
                "to stop at the n-th loss at which the target is the likeliest, or 0 for neither"
            )
        for field, known in CHOICES.items():
            if (value := getattr(self, field)) is not None or field != "divisor_mean":
                made[field] = chosen(value, known, f"{self.name}: {field}")
        if not isinstance(self.contexts, Contexts):
            raise MethodError(
                f"{self.name}: contexts is {brief(self.contexts)}; give a Contexts(starts, lengths)"
            )
        if self.infeasible not in ("raise", "least_violation"):
            raise MethodError(
                f"{self.name}: infeasible is {brief(self.infeasible)}; choose one of "
                "('raise', 'least_violation')"
            )
        if not is_flag(self.sequential):
            raise MethodError(
                f"{self.name}: sequential is {brief(self.sequential)}; it must be True or False"
            )
        made["sequential"] = bool(self.sequential)
        for field, value in made.items():
            object.__setattr__(self, field, value)

    def replace(self, **changes: Any) -> Method:
        """The same method with some fields changed: ``ue.EMMET.replace(layers=(3,))``."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise MethodError(f"{self.name} has no field {unknown[0]!r}; see unified_edit.Method")
        return dataclasses.replace(self, **changes)

    @property
    def value_layer(self) -> int:
        """The layer at which values are set: the last, or the first where each has a target."""
        assert self.layers is not None, "resolve the method first"
        return self.layers[0 if has_own_targets(self.distribution) else -1]

    def ridge_for(self, facts: int) -> float:
        """lam for a batch of so many facts; 0 means the equality form."""
        assert self.ridge is not None, "resolve the method first"
        return self.ridge if facts >= self.ridge_from else 0.0

    def resolve(self, model: PreTrainedModel | Anatomy) -> Method:
        """The method with every field filled in for `model`.

        Where a norm stands between MLP and residual stream (Gemma 2 and 3, OLMo 2) the value is set
        in front of it: the site "block" becomes "mlp".

        Raises MethodError if there are no published settings of its preset for the model and a
        field without a default (at least `layers`) is missing, or for several layers behind such
        norms; ModelError if the layers do not fit the model.
        """
        parts = model if isinstance(model, Anatomy) else anatomy(model)
        kind, width = parts.model.config.model_type, parts.width
        published = settings_of(kind, parts.n_layers, width, parts.weight(0).d_in)
        known = {**DEFAULTS, **published.get(self.preset or "", {})}
        missing = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("preset", "divisor_mean") and getattr(self, field.name) is None
        ]
        unknown = [field for field in missing if field not in known]
        if unknown:
            raise MethodError(
                f"{self.name} has no published setting of {', '.join(unknown)} for a "
                f"{kind} with {parts.n_layers} layers of width {width}; give it: "
                f"method.replace({unknown[0]}=...). Layers and clamp are found by a small sweep, "
                "ue.suggest_layers(model, tokenizer, records, method=...), on facts that are not "
                "scored afterwards; causal tracing (ue.locate) narrows it"
            )
        filled = {field: known[field] for field in missing}
        if parts.family.norm is not None and self.site.name == "block":
            filled["site"] = SITES["mlp"]
        resolved = self.replace(**filled)
        assert resolved.layers is not None
        layers = parts.check_layers(resolved.layers)
        if parts.family.norm is not None and len(layers) > 1:
            raise MethodError(
                f"{self.name} spreads a residual over layers {layers}, but in a {kind} a norm "
                "stands between each MLP and the residual stream: what an earlier layer is given "
                "does not add up, so no share of the residual is due to it. Edit one layer: "
                f"method.replace(layers=({layers[-1]},))"
            )
        return resolved

    def _told(self) -> dict[str, Any]:
        """The fields by name, but for those that came later and are at their default."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name not in _LATER
        }

    def __repr__(self) -> str:
        return f"Method({', '.join(f'{name}={value!r}' for name, value in self._told().items())})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary; choices are their names."""
        values = {**self._told(), "contexts": dataclasses.asdict(self.contexts)}
        return {k: v.name if isinstance(v, Choice) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Method:
        """Inverse of `to_dict`, but for functions of the user's own, which must be given again."""
        values = {**values, "contexts": Contexts(**values["contexts"])}
        for field, known in CHOICES.items():
            if values.get(field) is not None:
                values[field] = remembered(values[field], known, field)
        return cls(**values)


#: ROME (arXiv 2202.05262) with one key throughout, as r-ROME (arXiv 2403.07175) asks for: equality
#: for one fact; several are written one after another. The residual is delta, what was optimised in
#: every context; r-ROME's is v_bare + delta - mean of W k, so that W' k* is v* to the letter.
ROME = Method(
    name="ROME",
    preset="ROME",
    sequential=True,
    site=SITES["mlp"],
    key_mean=KEY_MEANS["plain"],
    contexts=ROME_CONTEXTS,
)
#: EMMET (arXiv 2403.14236): the equality for a whole batch, at one layer.
EMMET = Method(name="EMMET", preset="EMMET")
#: MEMIT (arXiv 2210.07229): least squares, spread over several layers.
MEMIT = Method(name="MEMIT", preset="MEMIT", ridge=None)
#: EMMET as its authors' code is since 2024-08-24 (scalable-model-editing/unified-model-editing,
#: 2f7c65c): 0.1 on the Gram matrix of w*C0 whenever E > 1, that is MEMIT with lam = 0.1 * w. Unlike
#: their first code (2024-03-21) it does not hold the equality; `settings` has the dates of w.
EMMET_RELEASED = Method(name="EMMET_RELEASED", preset="EMMET_RELEASED", ridge=None, ridge_from=2)
