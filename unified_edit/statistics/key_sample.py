"""Keys of ordinary text one by one: a bounded sample of them, and where in the text each stands.

C0 is a mean and says nothing about single keys. Whoever needs their distribution, as the gate of
`unified_edit.editing.hook_layers` does, needs a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import batches_by_length, forward_tokens, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, per_token
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.statistics.collect import groups

#: Texts that are batched by length: of so many, all or none are taken.
TOGETHER = 32
#: Tokens that are looked at for each one that is kept.
SEEN_PER_KEPT = 2


class Pass(NamedTuple):
    """What one forward gave.

    keys: (rows x tokens x d_in) of each layer. real: which tokens are no padding (rows x tokens).
    places: of those, row by row, text, first and last character (tokens x 3). last: whether all
    texts up to here are done, so that one may stop without favouring long ones.
    """

    keys: dict[int, Tensor]
    real: Tensor
    places: Tensor
    last: bool


def keys_in(
    parts: Anatomy,
    encoder: Encoder,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    padded: bool = True,
    max_tokens: int = 1024,
) -> Iterator[Pass]:
    """The keys of all tokens of some texts, by the model as it is.

    Texts without words are left out; each of the others stands alone, cut after `max_tokens`
    tokens, or what the model can read. They are numbered from 0 as they come. With
    `padded` False rows of one forward have one length.

    Raises StatisticsError for a text that is no string, and what `Encoder.encode` raises.
    """
    longest = min(max_tokens, parts.positions or max_tokens)
    sites = {layer: (parts.down(layer), "input") for layer in layers}
    first = 0
    for group in groups(texts):
        for begin in range(0, len(group), TOGETHER):
            some = group[begin : begin + TOGETHER]
            numbers = [place for place, text in enumerate(some) if text.strip()]
            found = encoder.encode([some[place] for place in numbers]) if numbers else []
            rows = [one.ids[:longest] for one in found]
            tokens = forward_tokens(parts.model.device)
            batches = list(_batches([len(row) for row in rows], tokens, padded))
            for chosen in batches:
                inputs = left_padded([rows[i] for i in chosen], parts.model.device)
                with captured(sites) as seen:
                    parts.model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
                real = inputs["attention_mask"].bool().cpu()
                keys = {
                    layer: per_token(parts.model, seen.get(layer), real.shape, module, "input")
                    for layer, (module, _) in sites.items()
                }
                places = [
                    (first + numbers[i], *span) for i in chosen for span in found[i].spans[:longest]
                ]
                yield Pass(keys, real, torch.tensor(places), chosen is batches[-1])
            first += len(some)


def _batches(lengths: Sequence[int], tokens: int, padded: bool) -> Iterator[list[int]]:
    """Rows of similar length, or of the same."""
    for batch in batches_by_length(lengths, tokens):
        if padded:
            yield batch
            continue
        for length in dict.fromkeys(lengths[i] for i in batch):
            yield [i for i in batch if lengths[i] == length]


@dataclass(frozen=True, eq=False)
class KeySample:
    """Keys of some tokens: {layer: (tokens x d_in)}, and where in `texts` each stands.

    places: (tokens x 3), the number of the text, and first and last character of the token.
    """

    keys: dict[int, Tensor]
    texts: tuple[str, ...]
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys."""
        return sum(one.numel() * one.element_size() for one in self.keys.values())

    def ends(self, subjects: Iterable[str]) -> Tensor:
        """Which tokens are the last one of one of some subjects: (tokens,), bool."""
        return ends_at(self.places, dict(enumerate(self.texts)), subjects)


def collect_sample(
    parts: Anatomy,
    encoder: Encoder,
    texts: Iterable[str],
    layers: Sequence[int],
    count: int,
    seed: int = 0,
) -> KeySample:
    """`count` keys of each layer, by a reservoir from the first 2 * `count` tokens or some more.

    All tokens are as likely, and all layers have the same ones. By the model as it is: take edits
    out before. Fewer keys where there is less text; StatisticsError where there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    read: list[str] = []
    kept: dict[int, Tensor] = {}
    places = torch.zeros(count, 3, dtype=torch.long)
    total = 0
    with torch.no_grad(), progress("sampling keys", SEEN_PER_KEPT * count, "token") as bar:
        for one in keys_in(parts, encoder, _noted(texts, read), layers):
            for layer, keys in one.keys.items():
                if layer not in kept:
                    kept[layer] = torch.zeros(count, keys.shape[-1], dtype=keys.dtype)
            now = torch.arange(total, total + len(one.places))
            drawn = torch.rand(len(now), generator=generator, dtype=torch.float64) * (now + 1)
            slots = torch.where(now < count, now, drawn.long())
            # of two that take one slot the later stays
            taken = {slot: place for place, slot in enumerate(slots.tolist()) if slot < count}
            where, which = (torch.tensor(list(one)).long() for one in (taken, taken.values()))
            places[where] = one.places[which]
            for layer, keys in one.keys.items():
                kept[layer][where] = keys[one.real.to(keys.device)][which.to(keys.device)].cpu()
            total += len(now)
            bar.update(len(now))
            if one.last and total >= SEEN_PER_KEPT * count:
                break
    if not total:
        raise StatisticsError("there is no text to take keys from; give texts with words in them")
    size = min(total, count)
    # a copy of what is needed, where there was less
    whole = {layer: one[:size].clone() if size < count else one for layer, one in kept.items()}
    return KeySample(whole, tuple(read), places[:size])


def _noted(texts: Iterable[str], into: list[str]) -> Iterator[str]:
    """The same texts, each written down as it is taken."""
    for text in texts:
        into.append(text)
        yield text


def subject_ends(text: str, subjects: Iterable[str]) -> list[int]:
    """Places of the last characters of some subjects wherever they stand in `text` as words."""
    found = set()
    for subject in subjects:
        start = text.find(subject)
        while start >= 0:
            end = start + len(subject)
            if not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum():
                found.add(end - 1)
            start = text.find(subject, start + 1)
    return sorted(found)


def ends_at(places: Tensor, texts: dict[int, str], subjects: Iterable[str]) -> Tensor:
    """Which tokens at `places` (tokens x 3) hold the last character of a subject: (tokens,)."""
    wanted = [subject for subject in dict.fromkeys(subjects) if subject]
    ends = {
        number: set(subject_ends(texts[number], wanted))
        for number in dict.fromkeys(places[:, 0].tolist())
    }
    return torch.tensor(
        [
            any(place in ends[number] for place in range(start, end))
            for number, start, end in places.tolist()
        ],
        dtype=torch.bool,
    )
