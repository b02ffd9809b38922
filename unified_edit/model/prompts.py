"""Facts and prompts as rows of tokens, made once and carried from there.

An `Encoder` is a tokenizer of which is known what it adds in front of a text and behind it. What it
adds in front (a start) belongs to every row; what it adds behind (an end) would stand between a
prompt and what the model says next, and belongs to none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from unified_edit.errors import TokenizationError, quote
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy, Tokenizer

#: The prompt at whose subject the KL term of the value optimisation is read (ROME, sec. 3.1).
KL_SUFFIX = " is a"
#: Names of the token that stands between the texts of a pretraining corpus.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
#: Texts that go through the tokenizer together.
_AT_ONCE = 1024


class Encoded(NamedTuple):
    """A text's tokens: their ids, and the characters (start, end) that each stands for."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def covering(self, start: int, end: int) -> list[int]:
        """Places of the tokens whose characters overlap start..end."""
        return [i for i, (first, last) in enumerate(self.spans) if first < end and last > start]


@dataclass(frozen=True)
class Row:
    """One tokenised text: `ids`, the index of the subject's last token, the target's tokens.

    The ids of the target are not part of `ids` but for all of its tokens except the last: what
    stands in `ids` is exactly what must be fed to predict every target token.
    """

    ids: tuple[int, ...]
    subject: int = -1
    target: tuple[int, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the prompt alone, without what is fed of the target."""
        return self.ids[: len(self.ids) - max(0, len(self.target) - 1)]

    @property
    def up_to_subject(self) -> tuple[int, ...]:
        """Ids from the start to the subject's last token."""
        return self.ids[: self.subject + 1]


@dataclass(frozen=True)
class FactRows:
    """All that is fed to a model for some facts, tokenised once.

    behind: for each fact its prompt with its new target behind each of the `prefixes`, the empty
        one (the bare prompt) first.
    kl: for each fact the prompt of the KL term, "{subject} is a".
    """

    facts: tuple[Fact, ...]
    prefixes: tuple[str, ...]
    behind: tuple[tuple[Row, ...], ...]
    kl: tuple[Row, ...]

    @property
    def bare(self) -> list[Row]:
        """The bare prompt of each fact with its target."""
        return [rows[0] for rows in self.behind]

    def of(self, chosen: Sequence[int]) -> FactRows:
        """The rows of the facts at some places."""
        return FactRows(
            tuple(self.facts[i] for i in chosen),
            self.prefixes,
            tuple(self.behind[i] for i in chosen),
            tuple(self.kl[i] for i in chosen),
        )


class Encoder:
    """A fast tokenizer for one model; it is never changed.

    before, after: ids that it adds in front of a text and behind it.

    Raises TokenizationError for a tokenizer that is not a fast one: character offsets, by which the
    subject's tokens are found, exist only for those.
    """

    def __init__(self, tokenizer: Tokenizer, parts: Anatomy | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizationError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so the subject's tokens "
                "cannot be located by character offsets; load it with AutoTokenizer (use_fast=True)"
            )
        self.tokenizer, self.parts = tokenizer, parts
        found = tokenizer("a", return_special_tokens_mask=True)
        ids, added = list(found["input_ids"]), list(found["special_tokens_mask"])
        if 0 not in added:  # the letter itself is unknown to this tokenizer
            added = [0] * len(ids)
        first = added.index(0) if ids else 0
        behind = added[::-1].index(0) if ids else 0
        self.before = tuple(ids[:first])
        self.after = tuple(ids[len(ids) - behind :])

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The ids behind which a text is sampled, so that no word of it is the model's first token.

        What the tokenizer adds, or the separator of pretraining (SmolLM2, Qwen), or BOS. None for
        a tokenizer whose only such token is its BOS and EOS in one (GPT-2, GPT-J, Pythia): the
        released code of ROME and MEMIT samples there from the first word itself. None either
        where it names no BOS and no EOS.
        """
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        added = self.tokenizer.get_added_vocab()
        separator = next((added[name] for name in SEPARATORS if name in added), first)
        if self.before or separator is None or first == last in (separator, None):
            return self.before
        return (separator,)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """The ids that a text from nothing begins with: `opening`, or else BOS, or EOS."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return self.opening or tuple(token for token in ids if token is not None)[:1]

    @cached_property
    def added(self) -> frozenset[int]:
        """Special tokens and tokens that were added to the vocabulary: no words of a text."""
        given = set(self.tokenizer.get_added_vocab().values()) | set(self.tokenizer.all_special_ids)
        return frozenset(given)

    @cached_property
    def signature(self) -> str:
        """A hash of what the tokenizer does; equal for equal ones."""
        rules = self.tokenizer.backend_tokenizer.to_str()
        described = (rules, sorted(self.added), self.opening, self.start)
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and spans of each text, without what the tokenizer adds behind it.

        Raises TokenizationError for a text without tokens and one that the model cannot read.
        """
        found: list[Encoded] = []
        for begin in range(0, len(texts), _AT_ONCE):
            some = list(texts[begin : begin + _AT_ONCE])
            batch = self.tokenizer(some, return_offsets_mapping=True, verbose=False)
            for text, ids, spans in zip(
                some, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                kept = len(ids) - len(self.after)
                if kept <= len(self.before):
                    raise TokenizationError(
                        f"the text {text!r} has no tokens; give a prompt with words in it"
                    )
                self._known(ids[:kept], text)
                found.append(Encoded(tuple(ids[:kept]), tuple(map(tuple, spans[:kept]))))
        return found

    def ids(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Ids of each text, cut after `limit` tokens, and not checked."""
        kept = -len(self.after) or None
        rows = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return [list(row[:kept][:limit]) for row in rows]

    def _known(self, ids: Sequence[int], text: str) -> None:
        """Raise TokenizationError if the model does not know one of these tokens of `text`."""
        if self.parts is not None and max(ids) >= self.parts.vocabulary:
            raise TokenizationError(
                f"the tokenizer gives {quote(text)} the token number {max(ids)}, but the model "
                f"knows only {self.parts.vocabulary}: it is the tokenizer of another model; load "
                "both from the same place, as load_model does"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise TokenizationError if the model does not know one of these tokens."""
        if ids:
            self._known([max(ids)], self.tokenizer.decode([max(ids)]))

    def _readable(self, row: Row, prompt: str, target: str = "", prefix: str = "") -> Row:
        """The row itself; TokenizationError if it has more tokens than the model has positions."""
        limit = None if self.parts is None else self.parts.positions
        if limit is not None and len(row.ids) > limit:
            what = quote(prompt) + (f" -> {quote(target)}" if target else "")
            behind = f" behind the prefix {prefix!r}" if prefix else ""
            raise TokenizationError(
                f"{what}{behind} has {len(row.ids)} tokens, but the model has only {limit} "
                "positions; shorten it"
            )
        return row

    def prompts(self, texts: Sequence[str]) -> list[Row]:
        """Rows of prompts without a target; TokenizationError where the model cannot read one."""
        each = zip(texts, self.encode(texts), strict=True)
        return [self._readable(Row(one.ids), text) for text, one in each]

    def continuations(self, pairs: Iterable[tuple[str, str]]) -> list[Row]:
        """Rows of (prompt, target) pairs: encoded together, the target as it stands behind.

        Encoding them apart puts other tokens at the border. Raises TokenizationError if the
        prompt's own ids are not the beginning of the whole, or nothing is left for the target.
        """
        pairs = list(pairs)
        return [
            self._readable(Row(head.ids + tail[:-1], -1, tail), prompt, target)
            for (prompt, target), (head, tail) in zip(pairs, self._bordered(pairs), strict=True)
        ]

    def with_target(self, prompt: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of a target behind it; raises what `continuations` raises."""
        head, tail = self._bordered([(prompt, target)])[0]
        return list(head.ids), list(tail)

    def _bordered(self, pairs: list[tuple[str, str]]) -> list[tuple[Encoded, tuple[int, ...]]]:
        """The prompt of each pair, and the ids of its target behind it; each text encoded once."""
        whole = [f"{prompt} {target.strip()}" for prompt, target in pairs]
        texts = list(dict.fromkeys([*(prompt for prompt, _ in pairs), *whole]))
        of = dict(zip(texts, self.encode(texts), strict=True))
        found = []
        for (prompt, target), both in zip(pairs, whole, strict=True):
            head, ids = of[prompt], of[both].ids
            if ids[: len(head.ids)] != head.ids or len(ids) == len(head.ids):
                raise TokenizationError(
                    f"the tokens of the prompt {prompt!r} are not the beginning of the tokens of "
                    f"{prompt + ' ' + target!r}: the border falls inside a token. End the prompt "
                    "with a whole word and give the target without leading blanks or punctuation"
                )
            found.append((head, ids[len(head.ids) :]))
        return found

    def row(self, fact: Fact, prefix: str = "") -> Row:
        """The row of `fact` with its new target behind `prefix`."""
        return self.fact_rows([fact], [prefix]).behind[0][0]

    def fact_rows(self, facts: Sequence[Fact], prefixes: Sequence[str]) -> FactRows:
        """Everything that is fed for some facts: one pass through the tokenizer for all of it.

        Raises TokenizationError where subject or target cannot be located or the model cannot
        read a row.
        """
        pairs = [(prefix + fact.text, fact.target_new) for fact in facts for prefix in prefixes]
        of = iter(self._bordered(pairs))
        behind = []
        for fact in facts:
            rows = []
            for prefix in prefixes:
                head, tail = next(of)
                start, end = (len(prefix) + place for place in fact.subject_span)
                subject = _covered(head, prefix + fact.text, start, end)[-1]
                row = Row(head.ids + tail[:-1], subject, tail)
                rows.append(self._readable(row, fact.text, fact.target_new, prefix))
            behind.append(tuple(rows))
        texts = [fact.subject + KL_SUFFIX for fact in facts]
        kl = [
            self._readable(Row(one.ids, _covered(one, text, 0, len(fact.subject))[-1]), text)
            for fact, text, one in zip(facts, texts, self.encode(texts), strict=True)
        ]
        return FactRows(tuple(facts), tuple(prefixes), tuple(behind), tuple(kl))

    def subject_tokens(self, fact: Fact) -> tuple[Encoded, list[int]]:
        """The bare prompt of a fact, and the places of its subject's tokens."""
        found = self.encode([fact.text])[0]
        return found, _covered(found, fact.text, *fact.subject_span)


def _covered(found: Encoded, text: str, start: int, end: int) -> list[int]:
    """Places of the tokens that cover start..end; TokenizationError if there are none."""
    places = found.covering(start, end)
    if not places:
        raise TokenizationError(
            f"no token of {quote(text)} covers the subject {quote(text[start:end])} at characters "
            f"{start}-{end}; check the tokenizer's offsets"
        )
    return places
