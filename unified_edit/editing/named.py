"""What is preserved by name: facts and prompts whose values an update may not change, or dearly.

C0 stands for keys in general. A name stands for the keys of one thing, K_p, read at each edited
layer on the model as it is when that layer is written, as the keys of the edited facts are:

- weight w:  what is changed of their values costs w times what is missed of an edited fact's,
             lam C0 + w K_p K_p^T + K K^T; in an equality, w times what a mean key's change costs,
             C0 + w K_p K_p^T. (Unified Concept Editing, arXiv 2308.14761, has the same sum.)
- "exact":   Delta K_p = 0, as a condition (`objective.Held`).

A fact has one key, at the last token of its subject, in its contexts, as an edited fact has. A
prompt has the keys of all its tokens: then, exactly preserved, nothing at all changes while the
model reads it, whichever layers are edited; its last token alone would not see to that, since later
layers read the others too. Keys that several items have in common (prompts that begin alike) count
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unified_edit.arguments import as_list, real_number
from unified_edit.editing.choices import Choice
from unified_edit.editing.keys import keys_of
from unified_edit.errors import (
    ContradictionError,
    FactError,
    InfeasibleError,
    MethodError,
    SharedSubjectError,
    brief,
    quote,
)
from unified_edit.facts import Fact, subject_key
from unified_edit.facts.facts import SLOT, clean_text
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.hooks import quiet, read_every_token
from unified_edit.model.prompts import Encoder, FactRows, Row
from unified_edit.objective import Held, MetricProtocol
from unified_edit.objective.feasibility import whitened

Weight = float | Literal["exact"]

#: An edited key of which less than this is free of what is preserved exactly is warned of: the
#: update that stores its fact grows by the inverse.
CROWDED = 0.1


@dataclass(frozen=True)
class Preserve:
    """Facts and prompts to be preserved by name (`edit`), and how.

    items: a fact or a prompt, or several. Of a fact the value of its subject is preserved, whatever
        its targets are; of a prompt (a text) those of all its tokens.
    weight: "exact": an update may not change these values at all. A number w > 0: changing one
        costs w times as much as missing an edited fact by the same; in an equality, which has no
        such price, w times as much as changing the value of a mean key.

    Raises FactError for items that are neither, or none; MethodError for another weight.
    """

    items: tuple[Fact | str, ...]
    weight: Weight = "exact"

    def __post_init__(self) -> None:
        given = [self.items] if isinstance(self.items, Fact) else as_list(self.items)
        if not given:
            raise FactError("preserve names nothing: give facts or prompts, or leave it out.")
        object.__setattr__(self, "items", tuple(dict.fromkeys(map(_checked, given))))
        if self.weight != "exact":
            advice = 'give "exact" to leave the values as they are'
            weight = real_number(
                self.weight, "Preserve: weight", MethodError, above=0.0, advice=advice
            )
            object.__setattr__(self, "weight", weight)


#: What `edit` takes: names that are to be preserved exactly need no `Preserve`.
Preserved = Preserve | Iterable[Fact | str] | Fact | str


def as_preserve(preserve: Preserved | None) -> Preserve | None:
    """What a caller names, as a `Preserve`; None where nothing is named. Raises what that does."""
    if preserve is None or isinstance(preserve, Preserve):
        return preserve
    return Preserve(preserve)  # type: ignore[arg-type]


def check_none(preserve: object, who: str, why: str) -> None:
    """Raise MethodError if `who` is asked to preserve something by name, which it cannot."""
    if preserve is not None:
        raise MethodError(
            f"{who} cannot preserve by name: {why}. Use edit(..., preserve=...), or leave it out"
        )


def _checked(item: object) -> Fact | str:
    if isinstance(item, Fact):
        return item
    if not isinstance(item, str):
        raise FactError(
            f"preserve takes facts and prompts: got {type(item).__name__}, {brief(item, 60)}. "
            "Write Fact(...), or the prompt as text."
        )
    if SLOT in item:
        raise FactError(
            f"a prompt to preserve holds {SLOT}: {quote(item)}. Fill it in, or give a Fact."
        )
    return clean_text(item, "a prompt to preserve")


@dataclass(frozen=True)
class Named:
    """What is preserved by name in an edit, tokenised.

    columns: for each item those of its keys. prompts: the tokens of each prompt. read: the
    (prompt, token) that stands for each column beyond those of the facts. asked: the prompt of each
    item, behind which the model is asked before and after. notes: what a user should know.
    """

    given: Preserve
    facts: FactRows
    prompts: tuple[Row, ...]
    columns: tuple[tuple[int, ...], ...]
    read: tuple[tuple[int, int], ...]
    asked: tuple[Row, ...]
    encoder: Encoder
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether it is a condition, not a cost."""
        return self.given.weight == "exact"

    def keys(self, parts: Anatomy, layer: int, mean: str | Choice) -> Tensor:
        """K_p of a layer, on the model as it is: (d_in x columns, float64)."""
        found = []
        if self.facts.facts:
            found.append(keys_of(parts, self.facts, [layer], mean)[layer])
        if self.prompts:
            rows = [row.ids for row in self.prompts]
            with quiet(parts.model):
                seen = read_every_token(parts.model, rows, {layer: (parts.down(layer), "input")})
            each = [seen[layer][row][place] for row, place in self.read]
            found.append(torch.stack(each, dim=1).double().cpu())
        return torch.cat(found, dim=1)

    def metric(self, metric: MetricProtocol, K: Tensor, ridge: float) -> MetricProtocol:
        """`named_metric`, with its items' names where a key is out of reach."""
        names = [""] * K.shape[1]
        for item, columns in zip(self.given.items, self.columns, strict=True):
            for column in columns:
                names[column] = names[column] or f"to be preserved: {_text(item)!r}"
        whitened(metric, K, names)  # refuses keys in dead coordinates, whose metric has no factor
        return named_metric(metric, K, self.given.weight, ridge)


def named_metric(metric: MetricProtocol, K: Tensor, weight: Weight, ridge: float) -> MetricProtocol:
    """The metric in which the values of the keys K are preserved as well.

    ridge: lam of what is solved in it, which tells what a number is to be weighed against.
    """
    if weight != "exact":
        assert isinstance(weight, float)
        return metric.plus(K, weight / ridge if ridge else weight)
    return metric.holding(K) if isinstance(metric, Held) else Held(metric, K)


def named_of(
    preserve: Preserved | None,
    written: FactRows,
    encoder: Encoder,
    causal: bool,
) -> Named | None:
    """What is to be preserved beside the facts that are written; None where nothing is named.

    Raises FactError and TokenizationError for items that cannot be read; ContradictionError for one
    that is written as well; SharedSubjectError for a fact whose subject has a new value, if it is
    to be preserved exactly.
    """
    given = as_preserve(preserve)
    if given is None:
        return None
    facts = [item for item in given.items if isinstance(item, Fact)]
    texts = [item for item in given.items if not isinstance(item, Fact)]
    rows, prompts = encoder.fact_rows(facts, written.prefixes), encoder.prompts(texts)
    notes = meeting_facts(given, written.facts) + _meeting_prompts(
        given, list(zip(texts, prompts, strict=True)), written, causal
    )
    # where what stands at a token depends on those before it alone, equal beginnings are one key
    seen: dict[object, int] = {}
    read: list[tuple[int, int]] = []
    of_prompts: list[tuple[int, ...]] = []
    for number, row in enumerate(prompts):
        columns = []
        for place in range(len(row.ids)):
            what = row.ids[: place + 1] if causal else (number, place)
            if what not in seen:
                seen[what] = len(facts) + len(read)
                read.append((number, place))
            columns.append(seen[what])
        of_prompts.append(tuple(columns))
    one, many = iter(range(len(facts))), iter(of_prompts)
    columns_of = tuple(
        (next(one),) if isinstance(item, Fact) else next(many) for item in given.items
    )
    of_fact = dict(zip(facts, (Row(row.prompt) for row in rows.bare), strict=True))
    of_text = dict(zip(texts, prompts, strict=True))
    asked = [of_fact[item] if isinstance(item, Fact) else of_text[item] for item in given.items]
    return Named(
        given, rows, tuple(prompts), columns_of, tuple(read), tuple(asked), encoder, tuple(notes)
    )


def meeting_facts(given: Preserve, written: Sequence[Fact]) -> list[str]:
    """Notes on facts whose subject is that of an edited one; raises where both cannot hold."""
    notes = []
    of_subject = {subject_key(fact): fact for fact in written}
    texts = {(fact.text, subject_key(fact)): fact for fact in written}
    for fact in (item for item in given.items if isinstance(item, Fact)):
        same = texts.get((fact.text, subject_key(fact)))
        if same is not None:
            raise _contradiction(same, fact.text)
        other = of_subject.get(subject_key(fact))
        if other is None:
            continue
        what = (
            f"{fact.text!r} is to be preserved and shares its subject {fact.subject!r} with "
            f"{other}, so that their keys are nearly the same"
        )
        if given.weight == "exact":
            raise SharedSubjectError(
                f"{what}. One key cannot be given another value and keep its own: take it out of "
                "preserve, or give it a weight instead, preserve=Preserve(items, weight=1.0)"
            )
        notes.append(f"{what}; neither is held exactly")
    return notes


def _meeting_prompts(
    given: Preserve, prompts: Sequence[tuple[str, Row]], written: FactRows, causal: bool
) -> list[str]:
    """Notes on prompts in which an edited key stands; raises where both cannot hold."""
    notes = []
    texts = {fact.text: fact for fact in written.facts}
    begun = {
        row.up_to_subject: fact
        for fact, rows in zip(written.facts, written.behind, strict=True)
        for row in rows
    }
    for text, row in prompts:
        if text in texts:
            raise _contradiction(texts[text], text)
        beginnings = (row.ids[: place + 1] for place in range(len(row.ids)))
        met = next((begun[ids] for ids in beginnings if ids in begun), None) if causal else None
        if met is None:
            continue
        what = f"{text!r} is to be preserved and begins as {met} does, up to its subject"
        if given.weight == "exact":
            raise ContradictionError(
                f"{what}: what stands there cannot be given another value and keep its own. Take "
                "it out of preserve, or give it a weight, preserve=Preserve(items, weight=1.0)"
            )
        notes.append(f"{what}; neither is held exactly")
    return notes


def _contradiction(fact: Fact, text: str) -> ContradictionError:
    return ContradictionError(
        f"{fact} is to be written, and what the model says behind {text!r} is to be preserved: "
        "take it out of the facts or out of preserve"
    )


def _text(item: Fact | str) -> str:
    return item.text if isinstance(item, Fact) else item


@contextmanager
def counted(named: Named | None) -> Iterator[None]:
    """Inside, an equality that cannot be held says that what is preserved takes up room as well."""
    try:
        yield
    except InfeasibleError as problem:
        if named is None or not named.exact:
            raise
        raise InfeasibleError(
            f"{problem}. What is to be preserved exactly leaves them less room: give it a weight "
            "instead, preserve=Preserve(items, weight=1.0)"
        ) from None


def check_free(
    named: Named,
    metric: MetricProtocol,
    keys: Tensor,
    kept: Tensor,
    names: Sequence[str],
    may: bool,
) -> list[str]:
    """A warning for each edited key of which exact preservation leaves little.

    metric: that in which `kept`, K_p, is held. may: whether a fact may be left out (the limit
    lam -> 0). Raises InfeasibleError for a key of which nothing is left otherwise.
    """
    if not isinstance(metric, Held) or not named.exact:
        return []
    warnings = []
    for column, left in enumerate(metric.left(keys).tolist()):
        if left >= CROWDED:
            continue
        item, cosine = _nearest(named, metric.inner, keys[:, column : column + 1], kept)
        what = (
            f"of the key of {names[column]} what is held leaves {left:.2g}; nearest is "
            f"{_text(item)!r}, to be preserved, |cosine| {cosine:.6g}"
        )
        if left == 0.0 and not may:
            raise InfeasibleError(
                f"{what}. Its value cannot be changed: take that out of preserve, or give it a "
                "weight, preserve=Preserve(items, weight=1.0)"
            )
        warnings.append(f"{what}. The update that stores it is as many times as large")
    return warnings


def _nearest(
    named: Named, inner: MetricProtocol, key: Tensor, kept: Tensor
) -> tuple[Fact | str, float]:
    """The item with the key most nearly parallel to an edited one, whitened, and its |cosine|."""
    A, a = inner.whiten(kept), inner.whiten(key)
    cosines = torch.nan_to_num((A / A.norm(dim=0)).mT @ (a / a.norm())).abs().flatten()
    column = int(cosines.argmax())
    items = zip(named.given.items, named.columns, strict=True)
    return next(item for item, columns in items if column in columns), float(cosines[column])
