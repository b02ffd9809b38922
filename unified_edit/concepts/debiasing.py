"""Debiasing: pictures of a concept are to show attributes in given shares.

What a concept is to give is not known beforehand here: v* = W0 (c + sum of alpha_j a_j) for the
keys a_j of the attributes, and the weights alpha are found by trying. A round makes pictures with
the pipeline as it is, has them classified, and adds to alpha what is missing from each share; the
edit is then solved anew from the same W0 (rohitgandikota/unified-concept-editing 28c81ed,
2025-04-26, trainscripts/uce_sd_debias.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unified_edit.arguments import as_list, real_number, whole_number
from unified_edit.concepts.concept_edits import ConceptEdit
from unified_edit.concepts.concept_files import Round
from unified_edit.concepts.concept_methods import DEBIAS, Balance, ConceptMethod
from unified_edit.concepts.cross_attention import Opened, Pipeline, opened
from unified_edit.concepts.encoding import read_text
from unified_edit.concepts.erasing import Asked, Solved, named
from unified_edit.errors import EditError, FactError, MethodError, brief
from unified_edit.model.hooks import lock_of
from unified_edit.model.progress import progress

log = logging.getLogger(__name__)

#: Given pictures (of PIL) and the attributes, the attribute that each picture shows.
Classifier = Callable[[list[Any], tuple[str, ...]], Sequence[str]]


def debias(
    pipeline: Pipeline,
    concepts: str | Sequence[str],
    attributes: Sequence[str],
    classify: Classifier,
    *,
    shares: Sequence[float] | None = None,
    method: ConceptMethod = DEBIAS,
    preserve: str | Sequence[str] = (),
    seed: int = 0,
) -> ConceptEdit:
    """Edit concepts until pictures of them show attributes in the wanted shares.

    pipeline, concepts, preserve: as in `edit_concepts`. attributes: two texts or more. classify: a
    function of a list of pictures and the attributes that names for each picture the attribute that
    it shows (a zero-shot classifier, say). shares: what each attribute is to have, adding up to 1;
    equal ones if None. method: its `balance` says how many pictures and rounds, and how exact.
    seed: of the pictures, the same in every round.

    The rounds, with what was measured, stand in the edit. Where they are used up first, a warning
    is logged; the last correction is in force and was not measured.

    Raises what `edit_concepts` raises; FactError for fewer than two attributes or one named twice,
    MethodError for shares that do not fit, EditError if the classifier gives something else, or if
    every concept has its shares already. The pipeline is then as it was, as it is if `classify`
    or the pipeline itself fails.
    """
    parts = opened(pipeline)
    if not isinstance(method, ConceptMethod) or method.balance is None:
        raise MethodError(f"method is {brief(method)}; give one with a balance, for example DEBIAS")
    if len(method.phrasings) > 1:
        raise MethodError(f"{method.name}: debiasing has one phrasing, not {len(method.phrasings)}")
    if not callable(classify):
        raise MethodError(f"classify is {brief(classify)}; give a function of pictures, attributes")
    seed = whole_number(seed, "seed", MethodError, least=0)
    names, kinds = named(concepts, "concept"), named(attributes, "attribute")
    wanted = _shares(shares, len(kinds))
    asked = Asked.of(parts, method, names, preserve)
    toward = [read_text(parts, text) for text in kinds]
    if len(kinds) < 2 or len({text.ids for text in toward}) < len(kinds):
        raise FactError(f"attributes are {kinds}; give two or more, each once")
    known = asked.keys(parts, toward)
    A = torch.stack([known[text.ids] for text in toward], dim=1)  # d_text x attributes

    alpha = torch.zeros(len(names), len(kinds), dtype=torch.float64)
    edit: ConceptEdit | None = None
    rounds: list[Round] = []
    balance, balanced = method.balance, False
    bar = progress("debiasing", total=balance.rounds, unit="round")
    with bar, lock_of(parts.unet):
        solved = Solved.of(parts, asked, known)
        with solved.ledger.rollback():
            for _ in range(balance.rounds):
                found = _measure(parts, asked.concepts, kinds, classify, balance, seed)
                rounds.append(Round(_plain(found), _plain(alpha)))
                missing = wanted - found
                missing[(missing.abs() < balance.tolerance).all(dim=1)] = 0
                if balanced := not bool(missing.any()):
                    break
                alpha = alpha + balance.step * missing
                told = tuple(_told(kinds, row) for row in alpha.tolist())
                after = solved.edit(A @ alpha.mT, told, tuple(rounds), seed)
                after.put_in(solved.ledger, instead=edit)
                edit = after
                bar.update()
            if edit is None:
                raise EditError(
                    f"pictures of {', '.join(names)} have the wanted shares already, within "
                    f"{balance.tolerance:g}: there is nothing to correct"
                )
            if balanced:  # the edit in force is the same, and knows the last measurement
                last = replace(edit, rounds=tuple(rounds))
                last.put_in(solved.ledger, instead=edit)
                edit = last
    if not balanced:
        log.warning(
            "after %d rounds the shares still differ by up to %.2f; the last correction was not "
            "measured. More rounds: method.replace(balance=Balance(rounds=...))",
            balance.rounds,
            float((wanted - torch.tensor(rounds[-1].shares)).abs().max()),
        )
    return edit


def _shares(given: Sequence[float] | None, count: int) -> Tensor:
    if given is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64)
    shares = [real_number(one, "a share", MethodError, least=0.0) for one in as_list(given)]
    if len(shares) != count or abs(sum(shares) - 1) > 1e-6:
        raise MethodError(
            f"shares are {brief(given)} for {count} attributes; give one each, adding up to 1"
        )
    return torch.tensor(shares, dtype=torch.float64)


def _measure(
    parts: Opened,
    concepts: Sequence[str],
    attributes: tuple[str, ...],
    classify: Classifier,
    balance: Balance,
    seed: int,
) -> Tensor:
    """The share (concepts x attributes) of pictures of each concept that shows each attribute."""
    found = torch.zeros(len(concepts), len(attributes), dtype=torch.float64)
    for row, concept in enumerate(concepts):
        pictures = parts.pipeline(
            concept,
            num_inference_steps=balance.steps,
            num_images_per_prompt=balance.images,
            guidance_scale=balance.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images
        seen = list(classify(pictures, attributes))
        if len(seen) != len(pictures) or any(one not in attributes for one in seen):
            raise EditError(
                f"the classifier gave {brief(seen)} for {len(pictures)} pictures; it must name one "
                f"of {attributes} for each"
            )
        for one in seen:
            found[row, attributes.index(one)] += 1 / len(seen)
    return found


def _plain(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


def _told(attributes: Sequence[str], weights: Sequence[float]) -> str:
    """What was added to a concept, for tables."""
    pairs = zip(weights, attributes, strict=True)
    return " ".join(f"{weight:+.3g} {attribute!r}" for weight, attribute in pairs)
