"""Writing an edit of concepts: texts to keys, keys to one map, the map into every matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from unified_edit.arguments import as_list
from unified_edit.concepts.concept_edits import ConceptEdit
from unified_edit.concepts.concept_files import ConceptProvenance, Round
from unified_edit.concepts.concept_methods import ERASE, ConceptMethod
from unified_edit.concepts.cross_attention import Opened, Pipeline, opened
from unified_edit.concepts.encoding import Text, encode, read_text
from unified_edit.concepts.solving import preserved_metric, solve_concepts, through
from unified_edit.concepts.unet_ledger import (
    OfMatrices,
    UNetLedger,
    encoder_fingerprints,
    ledger_in,
)
from unified_edit.editing.provenance import touched_by
from unified_edit.errors import ContradictionError, FactError, MethodError, brief, quote
from unified_edit.facts.facts import clean_text
from unified_edit.model.hooks import lock_of
from unified_edit.objective import Metric, Update


def edit_concepts(
    pipeline: Pipeline,
    concepts: str | Sequence[str],
    *,
    method: ConceptMethod = ERASE,
    guide: str | Sequence[str] | None = None,
    preserve: str | Sequence[str] = (),
) -> ConceptEdit:
    """Make concepts give what their guides give, in all matrices of a pipeline that read text.

    pipeline: of diffusers, with a UNet: Stable Diffusion 1, 2 or XL; it is changed in place.
    concepts: one or several texts. method: `ERASE`, `ERASE_STYLE`, `MODERATE`, or one of your own
    (``ERASE.replace(lam=0.1)``). guide: what the concepts are to give instead, one text for all or
    one for each; None is the method's own; "" is the text without words. preserve: concepts whose
    values are to stay; a text that is named twice counts once.

    One closed form (arXiv 2308.14761, Unified Concept Editing): see `concepts.solving`.
    Concept edits that are in force stay so, and this one reckons with them: a guide and a preserved
    concept give what they give now. `ConceptEdit.undo` takes any of them out again, bit for bit.

    Stable Diffusion XL hands its UNet a summary of the prompt as well, past these matrices: that is
    not edited.

    Raises ModelError for a pipeline without cross-attention; FactError for a concept that is empty,
    no text, named twice or its own guide; ContradictionError for one that is preserved as well;
    TokenizationError for one that is longer than the encoder reads; MethodError for a method that
    debiases (`debias`); EditError if nothing arrives in the weights. The pipeline is then as it
    was.
    """
    parts = opened(pipeline)
    if not isinstance(method, ConceptMethod):
        raise MethodError(f"method is {brief(method)}; give a ConceptMethod, for example ERASE")
    if method.balance is not None:
        raise MethodError(f"{method.name} measures pictures: call unified_edit.concepts.debias")
    names = named(concepts, "concept")
    guides = _guides(method.guide if guide is None else guide, len(names))
    asked = Asked.of(parts, method, names, preserve)
    towards = [
        read_text(parts, text) for one in guides for text in method.phrased(one)
    ]  # of each column
    for text, other in zip(asked.texts, towards, strict=True):
        if text.ids == other.ids:
            raise FactError(
                f"{quote(text.text)} is to give what {quote(other.text)} gives, which is the same "
                "to the text encoder: nothing would change. Name another guide"
            )
    known = asked.keys(parts, towards)
    G = torch.stack([known[text.ids] for text in towards], dim=1)
    with lock_of(parts.unet):
        solved = Solved.of(parts, asked, known)
        edit = solved.edit(G - solved.C, tuple(guides))
        edit.put_in(solved.ledger)
    return edit


def named(concepts: object, what: str) -> tuple[str, ...]:
    """The texts of a list; FactError if there are none, or one is empty or no text."""
    texts = tuple(clean_text(one, f"a {what}") for one in as_list(concepts))
    if not texts:
        raise FactError(f"there is no {what}: give at least one text")
    return texts


def _guides(given: object, count: int) -> list[str]:
    """A guide for each concept, from one for all or one for each."""
    texts = as_list(given)
    if wrong := [one for one in texts if not isinstance(one, str)]:
        raise FactError(f"a guide is a text, not {brief(wrong[0])}; the text without words is ''")
    if len(texts) == 1:
        texts *= count
    if len(texts) != count:
        raise FactError(f"{len(texts)} guides for {count} concepts: give one, or one for each")
    return [text.strip() for text in texts]


@dataclass(frozen=True)
class Asked:
    """What is to be edited and preserved, in tokens; nothing has been computed yet."""

    method: ConceptMethod
    concepts: tuple[str, ...]
    texts: list[Text]
    preserved: list[Text]

    @classmethod
    def of(
        cls, parts: Opened, method: ConceptMethod, concepts: tuple[str, ...], preserve: object
    ) -> Asked:
        """Check everything that can be told from the texts; see `edit_concepts`."""
        texts = [read_text(parts, text) for name in concepts for text in method.phrased(name)]
        edited: dict[tuple[int, ...], str] = {}
        for text in texts:
            if text.ids in edited:
                raise FactError(
                    f"{quote(text.text)} is named twice (to the text encoder it is "
                    f"{quote(edited[text.ids])}): name every concept once"
                )
            edited[text.ids] = text.text
        kept: dict[tuple[int, ...], Text] = {}
        for name in as_list(preserve):
            text = read_text(parts, clean_text(name, "a preserved concept"))
            if text.ids in edited:
                raise ContradictionError(
                    f"{quote(text.text)} is to be preserved and edited at once: leave it out of "
                    "one of the two"
                )
            for ids, erased in edited.items() if method.preserve_at == "all" else ():
                # the encoder is causal: where texts begin alike, so do their keys
                if text.ids[: len(ids) - 1] == ids[:-1]:
                    raise ContradictionError(
                        f"{quote(text.text)} is to be preserved at all its tokens, and begins "
                        f"with {quote(erased)}, which is edited: leave it out, or preserve it at "
                        "its last token only (preserve_at='last')"
                    )
            kept.setdefault(text.ids, text)
        return cls(method, concepts, texts, list(kept.values()))

    def keys(self, parts: Opened, more: Sequence[Text]) -> dict[tuple[int, ...], Tensor]:
        """The key (d_text,) of every text that is edited, and of `more`, by its ids."""
        every = list({text.ids: text for text in [*self.texts, *more]}.values())
        return dict(zip((text.ids for text in every), encode(parts, every).unbind(1), strict=True))


@dataclass(frozen=True)
class Solved:
    """All that the edits of one call have in common: keys, the metric, and what is in force.

    before: the maps of the edits in force when the call began.
    """

    parts: Opened
    ledger: UNetLedger
    asked: Asked
    C: Tensor
    P: Tensor
    metric: Metric
    before: tuple[Update, ...]
    state: str

    @classmethod
    def of(cls, parts: Opened, asked: Asked, known: dict[tuple[int, ...], Tensor]) -> Solved:
        """The metric is made here, once for all matrices."""
        ledger = ledger_in(parts)
        ledger.verify()
        method = asked.method
        C = torch.stack([known[text.ids] for text in asked.texts], dim=1)
        P = encode(parts, asked.preserved, whole=method.preserve_at == "all")
        metric = preserved_metric(P, lam=method.lam, weight=method.preserve_weight)
        before = tuple(entry.edit.text_map for entry in ledger.entries)
        return cls(parts, ledger, asked, C, P, metric, before, ledger.state())

    def edit(
        self,
        moved: Tensor,
        towards: tuple[str, ...],
        rounds: tuple[Round, ...] = (),
        seed: int | None = None,
    ) -> ConceptEdit:
        """The edit, not applied yet, that moves the keys C by `moved` (d_text x columns)."""
        ledger, asked = self.ledger, self.asked
        R = through(self.before, moved)
        text_map = solve_concepts(self.metric, self.C, R, weight=asked.method.edit_weight)
        provenance = ConceptProvenance(
            fingerprint=ledger.fingerprint(),
            encoders=encoder_fingerprints(self.parts),
            state=self.state,
            model=self.parts.name,
            library=version("unified_edit"),
            weights=touched_by(ledger, ledger.weights.values(), OfMatrices(text_map, ledger)),
            seed=seed,
        )
        return ConceptEdit(
            concepts=asked.concepts,
            towards=towards,
            texts=tuple(text.text for text in asked.texts),
            preserved=tuple(text.text for text in asked.preserved),
            method=asked.method,
            text_map=text_map,
            keys=self.C,
            residual=R,
            preserved_keys=self.P,
            provenance=provenance,
            rounds=rounds,
        )
