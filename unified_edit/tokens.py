"""Where in a tokenised prompt the subject ends and the target begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unified_edit.errors import TokenizationError
from unified_edit.facts import Fact, quote
from unified_edit.models import Anatomy, Tokenizer

#: The prompt at whose subject the KL term of the value optimisation is read (ROME, sec. 3.1).
KL_SUFFIX = " is a"


@dataclass(frozen=True)
class Row:
    """One tokenised text: `ids`, the index of the subject's last token, the target's tokens.

    The ids of the target are not part of `ids` but for all of its tokens except the last: what
    stands in `ids` is exactly what must be fed to predict every target token.
    """

    ids: tuple[int, ...]
    subject: int
    target: tuple[int, ...] = ()

    @property
    def up_to_subject(self) -> tuple[int, ...]:
        """Ids from the start to the subject's last token."""
        return self.ids[: self.subject + 1]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`; raises TokenizationError if there are none."""
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise TokenizationError(f"the text {text!r} has no tokens; give a prompt with words in it")
    return list(ids)


def subject_last_token(tokenizer: Tokenizer, text: str, span: tuple[int, int]) -> int:
    """Index of the last token of `text` whose characters overlap `span` (start, end).

    Raises TokenizationError if no token does.
    """
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    start, end = span
    overlapping = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    if not overlapping:
        raise TokenizationError(
            f"no token of {text!r} covers the subject {text[start:end]!r} at characters "
            f"{start}-{end}; check the tokenizer's offsets"
        )
    return overlapping[-1]


def with_target(tokenizer: Tokenizer, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Encode prompt + " " + target together; return the ids of each.

    Encoding them apart puts other tokens at the border. Raises TokenizationError if the
    prompt's own ids are not the beginning of the whole, or nothing is left for the target.
    """
    whole = encode(tokenizer, f"{prompt} {target.strip()}")
    head = encode(tokenizer, prompt)
    if whole[: len(head)] != head or len(whole) == len(head):
        raise TokenizationError(
            f"the tokens of the prompt {prompt!r} are not the beginning of the tokens of "
            f"{prompt + ' ' + target!r}: the border falls inside a token. End the prompt with a "
            "whole word and give the target without leading blanks or punctuation"
        )
    return head, whole[len(head) :]


def fact_row(tokenizer: Tokenizer, fact: Fact, prefix: str = "", target: bool = False) -> Row:
    """The row of `fact` behind `prefix` (a context), with its new target if asked for."""
    text = prefix + fact.text
    start, end = (len(prefix) + place for place in fact.subject_span)
    subject = subject_last_token(tokenizer, text, (start, end))
    if not target:
        return Row(tuple(encode(tokenizer, text)), subject)
    head, new = with_target(tokenizer, text, fact.target_new)
    return Row(tuple(head + new[:-1]), subject, tuple(new))


def kl_row(tokenizer: Tokenizer, fact: Fact) -> Row:
    """The row of the KL prompt "{subject} is a"."""
    text = fact.subject + KL_SUFFIX
    subject = subject_last_token(tokenizer, text, (0, len(fact.subject)))
    return Row(tuple(encode(tokenizer, text)), subject)


def check_ids(parts: Anatomy, ids: Sequence[int], text: str) -> None:
    """Raise TokenizationError if the model does not know one of the token `ids` of `text`."""
    if max(ids, default=0) >= parts.vocabulary:
        raise TokenizationError(
            f"the tokenizer gives {quote(text)} the token number {max(ids)}, but the model knows "
            f"only {parts.vocabulary}: it is the tokenizer of another model; load both from the "
            "same place, as load_model does"
        )


def check_rows(
    parts: Anatomy, tokenizer: Tokenizer, facts: Sequence[Fact], prefixes: Sequence[str]
) -> None:
    """Raise TokenizationError unless the model can read all that editing `facts` feeds it.

    That is each prompt with its target behind each prefix, and the prompt of the KL term.
    """
    for fact in facts:
        rows = {prefix: fact_row(tokenizer, fact, prefix, target=True) for prefix in prefixes}
        for prefix, row in (*rows.items(), ("", kl_row(tokenizer, fact))):
            check_ids(parts, (*row.ids, *row.target), fact.text)
            if parts.positions is not None and len(row.ids) > parts.positions:
                behind = f" behind the prefix {prefix!r}" if prefix else ""
                raise TokenizationError(
                    f"{quote(fact.text)} -> {quote(fact.target_new)}{behind} has {len(row.ids)} "
                    f"tokens, but the model has only {parts.positions} positions; shorten the fact"
                )


def fact_rows(
    tokenizer: Tokenizer, facts: Sequence[Fact], prefixes: Sequence[str], target: bool = False
) -> list[list[Row]]:
    """For each fact, its rows behind each prefix."""
    return [[fact_row(tokenizer, fact, prefix, target) for prefix in prefixes] for fact in facts]
