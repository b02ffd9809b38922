"""A method is data: what differs between ROME, EMMET and MEMIT, and nothing else.

All methods run through the same code. Fields left None are filled by `Method.resolve` from
`SETTINGS`, keyed by (model type, number of layers, hidden size); each value there carries its
source. The resolved method is stored in every edit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PreTrainedModel

from unified_edit.distribution import Kind
from unified_edit.errors import MethodError
from unified_edit.models import Anatomy, anatomy

#: The words that MEMIT's released code begins its sampled prefixes with.
MEMIT_STARTS = ("The", "Therefore", "Because", "I", "You")


def _is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(cast(float, value))


def _is_count(value: object) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 1


#: What a number must be, which settings it holds for, and its check.
_NUMBERS: tuple[tuple[str, tuple[str, ...], Callable[[Any], bool]], ...] = (
    ("a whole number >= 1", ("steps", "ridge_from"), _is_count),
    ("a number >= 0", ("ridge", "weight_decay", "kl_weight"), lambda value: value >= 0),
    ("a positive number", ("clamp", "learning_rate"), lambda value: value > 0),
    ("a finite number", ("stop_loss",), lambda value: True),
)


@dataclass(frozen=True)
class Contexts:
    """Prefixes in front of a prompt: `per_start` samples of each length after each start.

    `lengths` are numbers of tokens, the start included. An empty start stands for the
    end-of-text token. The bare prompt always comes first and is not counted here.
    """

    starts: tuple[str, ...] = MEMIT_STARTS
    lengths: tuple[int, ...] = (10,)
    per_start: int = 1

    def __post_init__(self) -> None:
        for field, what, fits in (
            ("starts", "texts", lambda value: isinstance(value, str)),
            ("lengths", "whole numbers >= 1", _is_count),
        ):
            values: object = getattr(self, field)
            is_list = isinstance(values, Sequence) and not isinstance(values, str)
            if not is_list or not values or not all(map(fits, cast(Sequence[object], values))):
                raise MethodError(f"Contexts: {field} is {values!r}; it must be a list of {what}")
            object.__setattr__(self, field, tuple(cast(Sequence[object], values)))
        if not _is_count(self.per_start):
            raise MethodError(
                f"Contexts: per_start is {self.per_start!r}; it must be a whole number >= 1"
            )

    @property
    def count(self) -> int:
        """How many prefixes are sampled."""
        return len(self.starts) * len(self.lengths) * self.per_start


#: ROME samples ten prefixes of five tokens and ten of ten (kmeng01/rome, hparams/ROME).
ROME_CONTEXTS = Contexts(starts=("",), lengths=(5, 10), per_start=10)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One locate-and-edit method on one model. None: filled by `resolve`.

    name: what it is called in tables.
    layers: blocks whose down-projection is edited, ascending; values are set at the last.
    ridge: lam of the least-squares form, relative to the *mean* C0; 0 is the equality form.
    ridge_from: the ridge is used for batches of at least this many facts, equality below.
    distribution: how the residual is spread over layers (`unified_edit.distribution`).
    sequential: write facts one after another instead of together.
    site: where the value is set: the output of the "block" or of its "mlp".
    key_mean: "typed" is half the bare prompt and half the mean of the prefixed ones, "plain"
        the mean over all contexts.
    contexts: which prefixes are sampled.
    steps: losses computed at most; there is one update fewer.
    learning_rate: of Adam.
    kl_weight: weight of KL(current || initial) at the subject of "{subject} is a".
    weight_decay: weight of norm(delta) / norm(target_init)^2.
    clamp: norm(delta) is kept below clamp * norm(target_init).
    stop_loss: a fact is finished once its total loss is below this.
    infeasible: "raise", or "least_violation" for the limit lam -> 0 where the equality has no
        solution.
    """

    name: str
    layers: tuple[int, ...] | None = None
    ridge: float | None = 0.0
    ridge_from: int = 1
    distribution: Kind = "memit"
    sequential: bool = False
    site: Literal["block", "mlp"] = "block"
    key_mean: Literal["typed", "plain"] = "typed"
    contexts: Contexts = Contexts()
    steps: int | None = None
    learning_rate: float = 0.5
    kl_weight: float = 0.0625
    weight_decay: float | None = None
    clamp: float | None = None
    stop_loss: float | None = None
    infeasible: Literal["raise", "least_violation"] = "raise"

    def __post_init__(self) -> None:
        layers: object = self.layers
        if layers is not None:
            if isinstance(layers, str) or not isinstance(layers, (int, Iterable)):
                raise MethodError(
                    f"{self.name}: layers is {layers!r}; it must be a number or a list of numbers"
                )
            each = (layers,) if isinstance(layers, int) else tuple(layers)
            object.__setattr__(self, "layers", each)
        if not isinstance(self.contexts, Contexts):
            raise MethodError(
                f"{self.name}: contexts is {self.contexts!r}; give a Contexts(starts, lengths)"
            )
        may_be_none = ("ridge", "steps", "weight_decay", "clamp", "stop_loss")
        for what, fields, fits in _NUMBERS:
            for field in fields:
                value = getattr(self, field)
                if value is None and field in may_be_none:
                    continue
                if not _is_number(value) or not fits(value):
                    raise MethodError(f"{self.name}: {field} is {value!r}; it must be {what}")
        choices = {
            "site": ("block", "mlp"),
            "key_mean": ("typed", "plain"),
            "infeasible": ("raise", "least_violation"),
            "distribution": ("memit", "pmet", "full"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise MethodError(
                    f"{self.name}: {field} is {getattr(self, field)!r}; choose one of {allowed}"
                )

    def replace(self, **changes: Any) -> Method:
        """The same method with some fields changed: ``ue.EMMET.replace(layers=(3,))``."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise MethodError(f"{self.name} has no field {unknown[0]!r}; see unified_edit.Method")
        return dataclasses.replace(self, **changes)

    def ridge_for(self, facts: int) -> float:
        """lam for a batch of so many facts; 0 means the equality form."""
        assert self.ridge is not None, "resolve the method first"
        return self.ridge if facts >= self.ridge_from else 0.0

    def resolve(self, model: PreTrainedModel | Anatomy) -> Method:
        """The method with every field filled in for `model`.

        Raises MethodError if the model is not in `SETTINGS` and a field without a default (at
        least `layers`) is missing, ModelError if the layers do not fit the model.
        """
        parts = model if isinstance(model, Anatomy) else anatomy(model)
        config = parts.model.config
        key = (config.model_type, parts.n_layers, parts.d_out)
        known = {**DEFAULTS, **SETTINGS.get(key, {}).get(self.name, {})}
        missing = [
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) is None
        ]
        unknown = [field for field in missing if field not in known]
        if unknown:
            raise MethodError(
                f"{self.name} has no published setting of {', '.join(unknown)} for a "
                f"{config.model_type} with {parts.n_layers} layers of width {parts.d_out}; give "
                f"it: method.replace({unknown[0]}=...), for example layers=(n,) with n from "
                "causal tracing (unified_edit.locate)"
            )
        resolved = self.replace(**{field: known[field] for field in missing})
        assert resolved.layers is not None
        parts.check_layers(resolved.layers)
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Method:
        """Inverse of `to_dict`."""
        values = dict(values)
        contexts: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.pop("contexts").items()
        }
        if values.get("layers") is not None:
            values["layers"] = tuple(values["layers"])
        return cls(contexts=Contexts(**contexts), **values)


#: Used for a known or unknown model where `SETTINGS` says nothing else: the values shared by
#: the released settings of MEMIT and EMMET (hparams/*.json of kmeng01/memit and of
#: scalable-model-editing/unified-model-editing).
DEFAULTS: dict[str, Any] = {
    "steps": 20, "weight_decay": 0.5, "clamp": 0.75, "stop_loss": 0.05,
}  # fmt: skip

#: ROME (arXiv 2202.05262) with one key throughout, as in r-ROME (arXiv 2403.07175): an equality for
#: one fact; several are written one after another.
ROME = Method(
    name="ROME",
    sequential=True,
    site="mlp",
    key_mean="plain",
    contexts=ROME_CONTEXTS,
)
#: EMMET (arXiv 2403.14236): the equality for a whole batch, at one layer.
EMMET = Method(name="EMMET")
#: MEMIT (arXiv 2210.07229): least squares, spread over several layers.
MEMIT = Method(name="MEMIT", ridge=None)
#: EMMET as its authors released it: 0.1 on the Gram matrix of w*C0 whenever E > 1, that is MEMIT
#: with lam = 0.1 * w. It does not hold the equality.
EMMET_RELEASED = Method(name="EMMET_RELEASED", ridge=None, ridge_from=2)

#: By name, for the command line.
METHODS = {method.name: method for method in (ROME, EMMET, MEMIT, EMMET_RELEASED)}

#: (model type, layers, hidden size) -> method -> settings.
SETTINGS: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {
    # GPT-2 medium: kmeng01/rome, hparams/ROME/gpt2-medium.json
    ("gpt2", 24, 1024): {"ROME": {"layers": (8,), "clamp": 3.0}},
    # GPT-2 large: kmeng01/rome, hparams/ROME/gpt2-large.json
    ("gpt2", 36, 1280): {"ROME": {"layers": (12,), "clamp": 4.0}},
    ("gpt2", 48, 1600): {
        # kmeng01/rome, hparams/ROME/gpt2-xl.json
        "ROME": {"layers": (17,), "clamp": 4.0},
        # unified-model-editing, hparams/EMMET/gpt2-xl.json; w = 1000, alpha = 0.1
        "EMMET": {"layers": (17,)},
        "EMMET_RELEASED": {"layers": (17,), "ridge": 100.0},
        # kmeng01/memit, hparams/MEMIT/gpt2-xl.json
        "MEMIT": {"layers": (13, 14, 15, 16, 17), "ridge": 20_000.0},
    },
    ("gptj", 28, 4096): {
        # kmeng01/rome, hparams/ROME/EleutherAI_gpt-j-6B.json
        "ROME": {"layers": (5,), "clamp": 4.0},
        # unified-model-editing, hparams/EMMET/EleutherAI_gpt-j-6B.json; w = 1, alpha = 0.1
        "EMMET": {"layers": (5,), "steps": 25},
        "EMMET_RELEASED": {"layers": (5,), "ridge": 0.1, "steps": 25},
        # kmeng01/memit, hparams/MEMIT/EleutherAI_gpt-j-6B.json
        "MEMIT": {"layers": (3, 4, 5, 6, 7, 8), "ridge": 15_000.0, "steps": 25},
    },
    # atlas, the embedded model: chosen for this project on its own records (benchmarks/)
    ("gpt2", 6, 192): {
        "ROME": {"layers": (1,), "clamp": 4.0},
        "EMMET": {"layers": (1,), "clamp": 1.25, "stop_loss": 0.02},
        "EMMET_RELEASED": {"layers": (1,), "clamp": 1.25, "stop_loss": 0.02, "ridge": 0.1},
        "MEMIT": {"layers": (0, 1), "clamp": 1.25, "stop_loss": 0.02, "ridge": 1.0},
    },
}
