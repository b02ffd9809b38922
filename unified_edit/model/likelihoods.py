"""How probable a model finds given continuations: the measurement under every metric.

The probability of a target after a prompt is the geometric mean over its tokens,

    P[target | prompt] = exp(mean over target tokens of log p(token | prompt, tokens before)),

as in the released code of ROME and MEMIT: targets of different length can be compared. One
forward, to which the target itself is fed, gives it, and says too whether greedy decoding of as
many tokens as the target has would give the target. That is exact, not an approximation: if
every most probable token along the way is the target's, greedy decoding feeds itself just what
was fed here; if one is not, greedy decoding leaves the target there.

Logits are made where a target token is predicted, once, and nowhere else. A row with which another
one begins is not run by itself, nor are long beginnings that rows share (`beginnings`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unified_edit.errors import ModelError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.beginnings import Ids, Piece, final_states, hosts
from unified_edit.model.devices import halving
from unified_edit.model.hooks import quiet
from unified_edit.model.progress import Progress
from unified_edit.model.prompts import Row

#: Positions whose logits are made at a time: 256 of GPT-2's vocabulary are 51 MB in float32.
POSITIONS = 256


class Likelihood(NamedTuple):
    """What a model thinks of one continuation.

    logp: mean log-probability of the target's tokens (natural logarithm).
    greedy: whether greedy decoding gives exactly the target's tokens.
    """

    logp: float
    greedy: bool

    @property
    def probability(self) -> float:
        """exp(logp), the geometric mean of the probabilities of the target's tokens."""
        return math.exp(self.logp)


@torch.no_grad()
def likelihoods(
    parts: Anatomy,
    asked: Sequence[Row],
    *,
    bar: Progress | None = None,
    batch_tokens: int | None = None,
) -> list[Likelihood]:
    """The likelihood of the target of each row, in the order given, by the model as it is.

    Its `logp` is the logarithm of :eq:`fact-target`. Runs in evaluation mode without gradients.
    Logits are made in the model's own precision, log-probabilities in at least float32 and averaged
    in float64. `bar` advances by one for each row; `batch_tokens` bounds the padded tokens
    of one forward (by default, few on a CPU).

    Raises ModelError if the model's logits are NaN.
    """
    host = hosts([one.ids for one in asked])
    wanted: dict[Ids, list[Wanted]] = {}
    count = 0
    for one in asked:
        first = len(one.ids) - len(one.target)
        tokens = [Wanted(first + n, token, count + n) for n, token in enumerate(one.target)]
        wanted.setdefault(host[one.ids], []).extend(tokens)
        count += len(tokens)
    lengths = [len(one.target) for one in asked]
    ends = set(itertools.accumulate(lengths))
    reader = _Reader(parts, count)
    with quiet(parts.model):
        for piece in final_states(parts, list(wanted), batch_tokens):
            numbers = reader.read(piece, wanted)
            if bar is not None:
                bar.update(sum(number + 1 in ends for number in numbers))
        logp, hits = reader.found()
    return [
        Likelihood(mean.mean().item(), bool(hit.all()))
        for mean, hit in zip(logp.split(lengths), hits.split(lengths), strict=True)
    ]


@torch.no_grad()
def next_token(parts: Anatomy, rows: Sequence[Row]) -> list[Tensor]:
    """The distribution of the token after each row: (vocabulary,), at least float32, on the CPU.

    Raises ModelError if the model's logits are NaN.
    """
    host = hosts([one.ids for one in rows])
    wanted: dict[Ids, list[Wanted]] = {}
    for number, one in enumerate(rows):
        wanted.setdefault(host[one.ids], []).append(Wanted(len(one.ids) - 1, 0, number))
    found: dict[int, Tensor] = {}
    with quiet(parts.model):
        for piece in final_states(parts, list(wanted)):
            reads = list(_reads(piece, wanted))
            for start in range(0, len(reads), POSITIONS):
                some = reads[start : start + POSITIONS]
                hidden = _at(piece.hidden, [place for place, _ in some])
                each = log_probabilities(parts, hidden).exp().cpu()
                for distribution, (_, here) in zip(each, some, strict=True):
                    found |= {one.number: distribution.clone() for one in here}
    return [found[number] for number in range(len(rows))]


def log_probabilities(parts: Anatomy, hidden: Tensor, *, checked: bool = True) -> Tensor:
    """Log-probabilities (... x vocabulary) of the next token from final hidden states.

    Made in the model's own precision by its own head, then in at least float32.

    Raises ModelError if they are NaN, unless `checked` is False: looking waits for the device.
    """
    logits = parts.logits(hidden)
    if checked and logits.isnan().any():
        raise _damaged(logits.dtype)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _damaged(dtype: torch.dtype) -> ModelError:
    return ModelError(
        f"the model's logits are NaN: its weights are damaged, or overflow {dtype}. "
        "Load the model again, or in a wider type"
    )


class Wanted(NamedTuple):
    """One token of a target: the place in its row where it is predicted, and what number it has."""

    place: int
    token: int
    number: int


def _reads(
    piece: Piece, wanted: Mapping[Ids, Sequence[Wanted]]
) -> Iterator[tuple[tuple[int, int], list[Wanted]]]:
    """(segment, column) of each place of a piece that is read, and what is read there."""
    for index, (rows, begin, end, column) in enumerate(piece.segments):
        at: dict[int, list[Wanted]] = {}
        for one in itertools.chain.from_iterable(wanted[row] for row in rows):
            if begin <= one.place < end:
                at.setdefault(one.place, []).append(one)
        yield from (((index, column + place - begin), here) for place, here in at.items())


def _at(hidden: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """What stands at some places (row, column): (places x width)."""
    row, column = torch.tensor(places, device=hidden.device).T
    return hidden[row, column]


class _Reader:
    """Reads tokens of targets off final hidden states; nothing waits for the device before the end.

    States are gathered until there are `POSITIONS` of them: the head is a large matrix, and read as
    a whole however few rows it is applied to.
    """

    def __init__(self, parts: Anatomy, count: int) -> None:
        self.parts = parts
        device, dtype = parts.model.device, parts.model.dtype
        precise = torch.promote_types(dtype, torch.float32)
        self._logp = torch.zeros(count, dtype=precise, device=device)
        self._hits = torch.zeros(count, dtype=torch.bool, device=device)
        self._waiting: list[Tensor] = []
        self._wanted: list[list[Wanted]] = []

    def read(self, piece: Piece, wanted: Mapping[Ids, Sequence[Wanted]]) -> list[int]:
        """Take what is wanted from one piece; the numbers of the tokens that it was."""
        reads = list(_reads(piece, wanted))
        if not reads:
            return []
        self._waiting.append(_at(piece.hidden, [place for place, _ in reads]))
        self._wanted += [here for _, here in reads]
        while len(self._wanted) >= POSITIONS:
            self._flush()
        return [one.number for _, here in reads for one in here]

    def _flush(self) -> None:
        """Apply the head to the first `POSITIONS` of what waits."""
        hidden = torch.cat(self._waiting)
        here, self._wanted = self._wanted[:POSITIONS], self._wanted[POSITIONS:]
        self._waiting = [hidden[POSITIONS:]]

        def apply(part: Sequence[int]) -> None:
            logs = log_probabilities(self.parts, hidden[part[0] : part[-1] + 1], checked=False)
            flat = [(row, *one[1:]) for row, place in enumerate(part) for one in here[place]]
            row, token, number = torch.tensor(flat).T
            row, token = row.to(logs.device), token.to(logs.device)
            number = number.to(self._logp.device)
            self._logp[number] = logs[row, token].to(self._logp)
            self._hits[number] = (logs.argmax(-1)[row] == token).to(self._hits.device)

        list(halving(apply, [range(len(here))]))

    def found(self) -> tuple[Tensor, Tensor]:
        """Log-probability (float64) of each token, and whether it is the likeliest: on the CPU.

        Raises ModelError if the model's logits are NaN: a NaN among them makes all of them NaN.
        """
        while self._wanted:
            self._flush()
        logp = self._logp.cpu().double()
        if logp.isnan().any():
            raise _damaged(self.parts.model.dtype)
        return logp, self._hits.cpu()
