"""How probable a model finds given continuations: the measurement under every metric.

The probability of a target after a prompt is the geometric mean over its tokens,

    P[target | prompt] = exp(mean over target tokens of log p(token | prompt, tokens before)),

as in the released code of ROME and MEMIT: targets of different length can be compared. One
forward, to which the target itself is fed, gives it, and says too whether greedy decoding of as
many tokens as the target has would give the target. That is exact, not an approximation: if
every most probable token along the way is the target's, greedy decoding feeds itself just what
was fed here; if one is not, greedy decoding leaves the target there.

Rows are batched by length; logits are made where a target token is predicted, once, and nowhere
else. A row with which another one begins is not run by itself, since the model is causal: two
targets of one prompt share its tokens unless both have several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unified_edit.errors import ModelError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import batches_by_length, forward_tokens, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, quiet
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
    hosts = _hosts([one.ids for one in asked])
    of_host: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(asked):
        of_host.setdefault(hosts[one.ids], []).append(index)
    rows = list(of_host)
    found: list[Likelihood | None] = [None] * len(asked)
    at_once = forward_tokens(parts.model.device) if batch_tokens is None else batch_tokens
    with quiet(parts.model):
        for chosen in batches_by_length([len(row) for row in rows], at_once):
            hidden = _final_hidden(parts, [rows[index] for index in chosen])
            members = [(place, index) for place, row in enumerate(chosen)
                       for index in of_host[rows[row]]]  # fmt: skip
            for index, value in _read(parts, hidden, members, asked, [rows[i] for i in chosen]):
                found[index] = value
            if bar is not None:
                bar.update(len(members))
    return [value for value in found if value is not None]


@torch.no_grad()
def next_token(parts: Anatomy, rows: Sequence[Row]) -> list[Tensor]:
    """The distribution of the token after each row: (vocabulary,), at least float32, on the CPU.

    Raises ModelError if the model's logits are NaN.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    lengths = [len(row.ids) for row in rows]
    with quiet(parts.model):
        for chosen in batches_by_length(lengths, forward_tokens(parts.model.device)):
            last = _final_hidden(parts, [rows[index].ids for index in chosen])[:, -1]
            for place, index in enumerate(chosen):
                found[index] = log_probabilities(parts, last[place : place + 1])[0].exp().cpu()
    return found


def _hosts(rows: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each row the one it is read off: a longest one that begins with it, or itself."""
    hosts: dict[tuple[int, ...], tuple[int, ...]] = {}
    above: tuple[int, ...] = ()
    # in this order the rows that begin with a row stand right behind it
    for row in sorted(set(rows), reverse=True):
        hosts[row] = hosts.get(above, row) if above[: len(row)] == row else row
        above = row
    return hosts


def _final_hidden(parts: Anatomy, rows: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states (rows x longest x d_out) of left-padded rows."""
    inputs = left_padded(rows, parts.model.device)
    return parts.model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT).last_hidden_state


def log_probabilities(parts: Anatomy, hidden: Tensor, *, checked: bool = True) -> Tensor:
    """Log-probabilities (... x vocabulary) of the next token from final hidden states.

    Made in the model's own precision by its own head, then in at least float32.

    Raises ModelError if they are NaN, unless `checked` is False: looking waits for the device.
    """
    logits = parts.logits(hidden)
    if checked and logits.isnan().any():
        raise ModelError(
            f"the model's logits are NaN: its weights are damaged, or overflow {logits.dtype}. "
            "Load the model again, or in a wider type"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _read(
    parts: Anatomy,
    hidden: Tensor,
    members: Sequence[tuple[int, int]],
    asked: Sequence[Row],
    hosts: Sequence[tuple[int, ...]],
) -> Iterable[tuple[int, Likelihood]]:
    """Read off each member (row of `hidden`, index into `asked`) at its target's positions.

    `hosts`: what was fed in each row; a member's own ids are the beginning of that.
    """
    width, device = hidden.shape[1], hidden.device
    spots: dict[tuple[int, int], int] = {}  # (row, position) whose logits are needed: its place
    reads: list[int] = []
    tokens: list[int] = []
    for place, index in members:
        target = asked[index].target
        end = width - len(hosts[place]) + len(asked[index].ids)  # rows are left-padded
        for position in range(end - len(target), end):
            reads.append(spots.setdefault((place, position), len(spots)))
        tokens += target
    at, of, token = (torch.tensor(each, device=device) for each in (list(spots), reads, tokens))
    logp = torch.empty(len(reads), dtype=torch.float64)
    hits = torch.empty(len(reads), dtype=torch.bool)
    for start in range(0, len(at), POSITIONS):
        some = at[start : start + POSITIONS]
        found = log_probabilities(parts, hidden[some[:, 0], some[:, 1]])
        read = ((of >= start) & (of < start + POSITIONS)).nonzero().squeeze(1)
        row = of[read] - start
        logp[read.cpu()] = found[row, token[read]].cpu().double()
        hits[read.cpu()] = (found.argmax(-1)[row] == token[read]).cpu()
    lengths = [len(asked[index].target) for _, index in members]
    means = [part.mean().item() for part in logp.split(lengths)]
    greedy = [bool(part.all()) for part in hits.split(lengths)]
    return [
        (index, Likelihood(mean, hit))
        for (_, index), mean, hit in zip(members, means, greedy, strict=True)
    ]
