"""How probable a model finds given continuations: the measurement under every metric.

The probability of a target after a prompt is the geometric mean over its tokens,

    P[target | prompt] = exp(mean over target tokens of log p(token | prompt, tokens before)),

as in the released code of ROME and MEMIT: targets of different length can be compared. One
forward, to which the target itself is fed, gives it, and says too whether greedy decoding of as
many tokens as the target has would give the target. That is exact, not an approximation: if
every most probable token along the way is the target's, greedy decoding feeds itself just what
was fed here; if one is not, greedy decoding leaves the target there.

Rows are batched by length; rows that feed the same tokens (two targets of one token after one
prompt) are run once; logits are made where a target token is predicted and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from unified_edit.activations import BATCH_TOKENS, batches_by_length, left_padded, quiet
from unified_edit.errors import ModelError, TokenizationError
from unified_edit.models import Anatomy, Tokenizer
from unified_edit.tokens import encode, with_target

#: Positions whose logits are made at a time: 256 of GPT-2's vocabulary are 51 MB in float32.
POSITIONS = 256


class Bar(Protocol):
    """What is needed of a progress bar."""

    def update(self, n: float | None = 1) -> object: ...  # noqa: D102


@dataclass(frozen=True)
class Continuation:
    """A prompt with a target behind it, tokenised together.

    `ids` is what is fed: the prompt and all of the target but its last token, so that the
    target's tokens are predicted at the last ``len(target)`` positions.
    """

    ids: tuple[int, ...]
    target: tuple[int, ...]


class Likelihood(NamedTuple):
    """What a model thinks of one continuation.

    logp: mean log-probability of the target's tokens (natural logarithm).
    greedy: whether greedy decoding gives exactly the target's tokens.
    """

    logp: float
    greedy: bool


def continuations(
    parts: Anatomy,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[str, str]],
    bar: Bar | None = None,
) -> list[Continuation]:
    """Tokenise (prompt, target) pairs; `bar` advances by one for each.

    Raises TokenizationError if a target cannot be told from its prompt, or the two are longer
    than the model can read.
    """
    found = []
    for prompt, target in pairs:
        head, tail = with_target(tokenizer, prompt, target)
        found.append(Continuation((*head, *tail[:-1]), tuple(tail)))
        _check_readable(parts, [*head, *tail], prompt)
        if bar is not None:
            bar.update()
    return found


def prompt_ids(parts: Anatomy, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokenise a prompt; raises TokenizationError if the model cannot read it."""
    ids = encode(tokenizer, prompt)
    _check_readable(parts, ids, prompt)
    return ids


def _check_readable(parts: Anatomy, ids: Sequence[int], prompt: str) -> None:
    limit = getattr(parts.model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise TokenizationError(
            f"a prompt is too long for this model: {len(ids)} tokens with its target, at most "
            f"{limit} can be read ({prompt[:60]!r}...). Shorten it"
        )
    size = len(cast(Tensor, parts.model.get_input_embeddings().weight))
    if max(ids) >= size:
        raise TokenizationError(
            f"the tokenizer does not belong to this model: {prompt!r} has token {max(ids)}, the "
            f"model knows {size} tokens. Load both from the same place"
        )


@torch.no_grad()
def likelihoods(
    parts: Anatomy,
    asked: Sequence[Continuation],
    *,
    bar: Bar | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Likelihood]:
    """The likelihood of each continuation, in the order given, by the model as it is.

    Its `logp` is the logarithm of :eq:`fact-target`. Runs in evaluation mode without gradients.
    Logits are made in the model's own precision, log-probabilities in at least float32 and averaged
    in float64. `bar` advances by one for each continuation; `batch_tokens` bounds the padded tokens
    of one forward.

    Raises ModelError if the model's logits are NaN.
    """
    of_row: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(asked):
        of_row.setdefault(one.ids, []).append(index)
    rows = list(of_row)
    found: list[Likelihood | None] = [None] * len(asked)
    with quiet(parts.model):
        for chosen in batches_by_length([len(row) for row in rows], batch_tokens):
            hidden = _final_hidden(parts, [rows[index] for index in chosen])
            members = [(place, index) for place, row in enumerate(chosen)
                       for index in of_row[rows[row]]]  # fmt: skip
            for index, value in _read(parts, hidden, members, asked):
                found[index] = value
            if bar is not None:
                bar.update(len(members))
    return [value for value in found if value is not None]


@torch.no_grad()
def next_token(parts: Anatomy, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The distribution of the token after each row: (vocabulary,), at least float32, on the CPU.

    Raises ModelError if the model's logits are NaN.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with quiet(parts.model):
        for chosen in batches_by_length([len(row) for row in rows]):
            last = _final_hidden(parts, [rows[index] for index in chosen])[:, -1]
            for place, index in enumerate(chosen):
                found[index] = _log_probabilities(parts, last[place : place + 1])[0].exp().cpu()
    return found


def _final_hidden(parts: Anatomy, rows: Sequence[Sequence[int]]) -> Tensor:
    """Final hidden states (rows x longest x d_out) of left-padded rows."""
    inputs = left_padded(rows, parts.model.device)
    return parts.model.base_model(**inputs, use_cache=False).last_hidden_state


def _log_probabilities(parts: Anatomy, hidden: Tensor) -> Tensor:
    logits = parts.logits(hidden)
    if logits.isnan().any():
        raise ModelError(
            f"the model's logits are NaN: its weights are damaged, or overflow {logits.dtype}. "
            "Load the model again, or in a wider type"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _read(
    parts: Anatomy,
    hidden: Tensor,
    members: Sequence[tuple[int, int]],
    asked: Sequence[Continuation],
) -> Iterable[tuple[int, Likelihood]]:
    """Read off each member (row of `hidden`, index into `asked`) at its target's positions."""
    width, device = hidden.shape[1], hidden.device
    places: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    for place, index in members:
        target = asked[index].target
        places += [place] * len(target)
        positions += range(width - len(target), width)  # rows are left-padded
        tokens += target
    wanted = torch.tensor([places, positions, tokens], device=device)
    logp, hits = [], []
    for part in wanted.split(POSITIONS, dim=1):
        log_probabilities = _log_probabilities(parts, hidden[part[0], part[1]])
        logp.append(log_probabilities.gather(1, part[2][:, None])[:, 0].cpu().double())
        hits.append((log_probabilities.argmax(-1) == part[2]).cpu())
    lengths = [len(asked[index].target) for _, index in members]
    means = [part.mean().item() for part in torch.cat(logp).split(lengths)]
    greedy = [bool(part.all()) for part in torch.cat(hits).split(lengths)]
    return [
        (index, Likelihood(mean, hit))
        for (_, index), mean, hit in zip(members, means, greedy, strict=True)
    ]
