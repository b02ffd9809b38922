"""A way to edit concepts, as data: what a concept is to give instead, and what that may cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from unified_edit.arguments import as_list, real_number, whole_number
from unified_edit.errors import MethodError, brief

#: What the released code adds to a style with ``--expand_prompts true``, and to an object.
STYLE_PHRASINGS = (
    "{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}",
)  # fmt: skip
OBJECT_PHRASINGS = (
    "{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The loop of debiasing: measure the pictures, correct what the concept is to give, repeat.

    rounds: at most so many corrections. images: made for each concept in a round, with `steps` of
    the sampler and `guidance_scale`. tolerance: a share that differs less from what is wanted is
    right. step: how much of a difference is added to a concept's target. The released code has an
    option for it, 0.1, which it does not use: its step is 1.
    """

    rounds: int = 30
    images: int = 10
    steps: int = 20
    guidance_scale: float = 7.5
    tolerance: float = 0.05
    step: float = 1.0

    def __post_init__(self) -> None:
        for field in ("rounds", "images", "steps"):
            value = whole_number(getattr(self, field), f"Balance: {field}", MethodError, least=1)
            object.__setattr__(self, field, value)
        bounds: dict[str, dict[str, Any]] = {
            "guidance_scale": {"least": 0}, "tolerance": {"above": 0}, "step": {"above": 0},
        }  # fmt: skip
        for field, bound in bounds.items():
            real = real_number(getattr(self, field), f"Balance: {field}", MethodError, **bound)
            object.__setattr__(self, field, real)


@dataclass(frozen=True, kw_only=True)
class ConceptMethod:
    """How concepts are edited (Unified Concept Editing, arXiv 2308.14761).

    name: what it is called. guide: what a concept gives instead, if nothing else is asked for; ""
    is the text without words. lam: what a change of any matrix costs. edit_weight, preserve_weight:
    what an edited, a preserved concept counts beside that. preserve_at: "last", a preserved concept
    has one key, that of its last token, as released; "all", it has those of all that is read of it
    (77 tokens): then, with a large weight, its picture stays, and there is room for few.
    phrasings: the texts in which a concept and its guide are put for "{}"; each is a concept of its
    own. balance: the loop of debiasing, which has no guide; None for the others.
    """

    name: str
    guide: str = ""
    lam: float = 0.5
    edit_weight: float = 1.0
    preserve_weight: float = 1.0
    preserve_at: Literal["last", "all"] = "last"
    phrasings: tuple[str, ...] = ("{}",)
    balance: Balance | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise MethodError(f"a method's name is {brief(self.name)}; give a text")
        if not isinstance(self.guide, str):
            raise MethodError(f"{self.name}: guide is {brief(self.guide)}; give a text")
        bounds: dict[str, dict[str, Any]] = {
            "lam": {"above": 0}, "edit_weight": {"above": 0}, "preserve_weight": {"least": 0},
        }  # fmt: skip
        for field, bound in bounds.items():
            value = real_number(getattr(self, field), f"{self.name}: {field}", MethodError, **bound)
            object.__setattr__(self, field, value)
        if self.preserve_at not in ("last", "all"):
            raise MethodError(
                f"{self.name}: preserve_at is {brief(self.preserve_at)}; choose 'last' or 'all'"
            )
        phrasings = tuple(as_list(self.phrasings))
        if not phrasings or any(not isinstance(p, str) or p.count("{}") != 1 for p in phrasings):
            raise MethodError(
                f"{self.name}: phrasings are {brief(self.phrasings)}; give texts with one {{}} for "
                "the concept"
            )
        object.__setattr__(self, "phrasings", tuple(dict.fromkeys(phrasings)))
        if self.balance is not None and not isinstance(self.balance, Balance):
            raise MethodError(f"{self.name}: balance is {brief(self.balance)}; give a Balance")

    def replace(self, **changes: Any) -> ConceptMethod:
        """The same method with some fields changed: ``ERASE.replace(lam=0.1)``."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise MethodError(f"{self.name} has no field {unknown[0]!r}; see ConceptMethod")
        return dataclasses.replace(self, **changes)

    def phrased(self, text: str) -> list[str]:
        """A concept or a guide in all phrasings."""
        return [phrasing.replace("{}", text).strip() for phrasing in self.phrasings]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConceptMethod:
        """Inverse of `to_dict`."""
        balance = values["balance"]
        return cls(**{**values, "balance": None if balance is None else Balance(**balance)})


#: Erase an object: it gives what the text without words gives. This and the following as released
#: (rohitgandikota/unified-concept-editing 28c81ed, 2025-04-26, trainscripts/uce_sd_erase.py;
#: ``--concept_type object``, a = b = 1, lam = 0.5).
ERASE = ConceptMethod(name="erase")
#: Erase a style: an artist gives what "art" gives (``--concept_type art``).
ERASE_STYLE = ConceptMethod(name="erase a style", guide="art")
#: Moderate what should not be shown (``--concept_type unsafe`` of its README): towards the text
#: without words. The numbers are those of `ERASE`; what differs is what is asked of it.
MODERATE = ConceptMethod(name="moderate")
#: Debias: a concept gives what it gave and a share of each attribute's (uce_sd_debias.py).
DEBIAS = ConceptMethod(name="debias", balance=Balance())

#: By name.
METHODS = {method.name: method for method in (ERASE, ERASE_STYLE, MODERATE, DEBIAS)}
