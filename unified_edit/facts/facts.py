"""Facts, and the records that test an edit of them.

A `Fact` is one thing to be written into a model; a `Record` is a fact together with the prompts
that show whether the edit took (paraphrases), spread too far (neighbours) or broke something else
(probes). Batches of facts are checked in `batches`, files are read in `readers`.

Every message of a `FactError` raised here reads "what is wrong: where. What to do.", so that text
before the first colon is the same for all errors of one sort.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unified_edit.arguments import whole_number
from unified_edit.errors import FactError, brief, quote

SLOT = "{}"
# Half of a pair of surrogates, which has no encoding; NUL, at which other programs end a text.
_BROKEN = re.compile("[\0\ud800-\udfff]")
# Scripts that put no blank between words, or attach particles to a name: a letter beside the
# subject says nothing there about whether the subject is a word of its own.
_UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER",
             "MYANMAR", "TIBETAN")  # fmt: skip


def clean_text(value: object, name: str, where: str = "") -> str:
    """`value` without its outer whitespace; a `FactError` names `name` if it is no usable text.

    Outer whitespace carries no meaning: the blank between a prompt and its target belongs to the
    target and is added when both are encoded together, so one more in the prompt or the target
    would only spoil the tokens. The inside of a text is never changed.
    """
    place = f" ({where})" if where else ""
    if not isinstance(value, str):
        got = f"got {type(value).__name__}, {brief(value)}"
        raise FactError(f"{name} must be a string: {got}{place}. Give it as text.")
    text = value.strip()
    if not text:
        raise FactError(
            f"{name} is empty: got {quote(value)}{place}. Give at least one visible character."
        )
    if broken := _BROKEN.search(text):
        raise FactError(
            f"{name} is not valid Unicode text: it holds {broken[0]!r} at character "
            f"{broken.start()}{place}. Repair the text's encoding."
        )
    return text


def _joins(inner: str, outer: str) -> bool:
    """Whether `outer`, what stands beside a subject that ends in `inner`, continues its word."""
    if not outer or not (outer.isalnum() or unicodedata.category(outer).startswith("M")):
        return False
    return not any(unicodedata.name(c, "").startswith(_UNSPACED) for c in (inner, outer))


def _occurrences(subject: str, prompt: str) -> list[int]:
    """Where `subject` starts in `prompt` as whole words, overlapping occurrences included."""
    found, start = [], prompt.find(subject)
    while start >= 0:
        end = start + len(subject)
        beside = _joins(subject[0], prompt[start - 1 : start])
        if not (beside or _joins(subject[-1], prompt[end : end + 1])):
            found.append(start)
        start = prompt.find(subject, start + 1)
    return found


def _why_absent(subject: str, prompt: str) -> str:
    """A hint for a subject that does not occur in a filled-in prompt."""
    if subject in prompt:
        return "It only occurs there inside a longer word. "
    if unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt):
        return "It occurs there in another Unicode form (composed or decomposed accents). "
    if subject.casefold() in prompt.casefold():
        return "It occurs there in other upper and lower case. "
    return ""


def _as_template(prompt: str, subject: str) -> str:
    """`prompt` with `{}` where the subject stands; raises `FactError` where that is unclear."""
    where = f"subject {quote(subject)}, prompt {quote(prompt)}"
    slots = prompt.count(SLOT)
    if slots > 1:
        raise FactError(
            f"the prompt holds more than one {SLOT}: {where}. Keep one, where the subject stands."
        )
    if slots == 1:
        if subject != SLOT and SLOT in subject and subject in prompt:
            raise FactError(
                f"the prompt may be a template or filled in: {where}. The subject itself holds "
                f"{SLOT}; write the prompt with {SLOT} in place of the whole subject."
            )
        return prompt
    found = _occurrences(subject, prompt)
    if not found:
        raise FactError(
            f"the subject does not occur in the prompt: {where}. {_why_absent(subject, prompt)}"
            f"Write {SLOT} where the subject stands, or spell the subject as in the prompt."
        )
    if len(found) > 1:
        raise FactError(
            f"the subject occurs {len(found)} times in the filled-in prompt: {where}. "
            f"Write {SLOT} in place of the occurrence that is meant."
        )
    return prompt[: found[0]] + SLOT + prompt[found[0] + len(subject) :]


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: after `prompt` about `subject`, the model shall say `target_new`.

    `prompt` is a template with exactly one `{}` for the subject, or a filled-in prompt in which
    the subject occurs exactly once; it is stored as a template. In a filled-in prompt only whole
    words count: "Rome" does not occur in "Romeo and", because a letter or digit follows it (no
    such demand is made in scripts that put no blanks between words). In a template nothing but
    the two characters `{}` is special: other braces and `%` are plain text. `target_true` is what
    the model says before the edit, or None where that is unknown. Outer whitespace of every field
    is dropped (see `clean_text`), the inside is kept as it is.

    Raises `FactError` for a field that is no string or empty, a subject that is absent or
    ambiguous, more than one `{}`, and a target equal to `target_true`.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        subject = clean_text(self.subject, "Fact.subject", f"prompt {brief(self.prompt, 80)}")
        prompt = clean_text(self.prompt, "Fact.prompt", f"subject {quote(subject)}")
        where = f"prompt {quote(prompt)}, subject {quote(subject)}"
        target_new = clean_text(self.target_new, "Fact.target_new", where)
        target_true = self.target_true
        if target_true is not None:
            target_true = clean_text(target_true, "Fact.target_true", where)
        if target_new == target_true:
            raise FactError(
                f"target_new equals target_true: both are {quote(target_new)} ({where}). "
                "Give another target, or leave target_true out."
            )
        values = (_as_template(prompt, subject), subject, target_new, target_true)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def prefix(self) -> str:
        """The text before the subject."""
        return self.prompt.partition(SLOT)[0]

    @property
    def suffix(self) -> str:
        """The text after the subject."""
        return self.prompt.partition(SLOT)[2]

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.fill(self.prompt)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end of the subject in `text`, in characters; the end is exclusive."""
        start = len(self.prefix)
        return start, start + len(self.subject)

    def fill(self, template: str) -> str:
        """Another `template` with this fact's subject in place of its one `{}`."""
        slots = template.count(SLOT) if isinstance(template, str) else 0
        if slots != 1:
            raise FactError(
                f"a template needs exactly one {SLOT}: got {slots} in {brief(template, 80)}. "
                f"Write {SLOT} once, where the subject stands."
            )
        return template.replace(SLOT, self.subject)

    def __str__(self) -> str:
        true = "" if self.target_true is None else f" (not {quote(self.target_true)})"
        return f"{quote(self.text)} -> {quote(self.target_new)}{true}"


@dataclass(frozen=True, slots=True)
class Probe:
    """A check after `prompt`: `expected` is more probable than `foil`.

    Without a `foil`, `expected` is what the model shall say by itself (greedy continuation).
    """

    prompt: str
    expected: str
    foil: str | None = None

    def __post_init__(self) -> None:
        prompt = clean_text(self.prompt, "Probe.prompt")
        expected = clean_text(self.expected, "Probe.expected", f"prompt {quote(prompt)}")
        foil = self.foil
        if foil is not None:
            foil = clean_text(foil, "Probe.foil", f"prompt {quote(prompt)}")
        if expected == foil:
            raise FactError(
                f"Probe.expected equals Probe.foil: both are {quote(expected)} "
                f"(prompt {quote(prompt)}). Nothing could be compared; change one of them."
            )
        for name, value in zip(self.__slots__, (prompt, expected, foil), strict=True):
            object.__setattr__(self, name, value)


def _sequence(value: object, name: str) -> tuple[object, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FactError(f"{name} must be a list: got {type(value).__name__}. Put it in brackets.")
    return tuple(value)


@dataclass(frozen=True)
class Record:
    """A fact and the prompts by which an edit of it is judged.

    `paraphrases`: other wordings about the same subject, after which `target_new` must beat
    `target_true`; one that lacks the subject but holds one `{}` is filled in. `neighbours`:
    written-out prompts about *other* subjects, after which `target_true` must still beat
    `target_new` (so `fact.target_true` is needed). `generation_prompts`: openings for free text
    about the subject. `probes`: further groups of checks by name, each a tuple of `Probe`; on
    atlas "own_object" and "other_relations". `case_id` and `relation` say where the record comes
    from. Lists become tuples; outer whitespace of prompts is dropped.

    Raises `FactError` for a field of the wrong type and for an empty prompt.
    """

    fact: Fact
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    probes: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict, hash=False)
    case_id: int | str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        fact: object = self.fact
        if not isinstance(fact, Fact):
            got = type(fact).__name__
            raise FactError(f"Record.fact must be a Fact: got {got}. Write Fact(...).")
        for name in ("paraphrases", "neighbours", "generation_prompts"):
            prompts = tuple(
                clean_text(item, f"Record.{name}[{i}]", f"fact {self.fact}")
                for i, item in enumerate(_sequence(getattr(self, name), f"Record.{name}"))
            )
            if name != "neighbours":
                # Scraped text in front of a real paraphrase may hold "{}": only a prompt without
                # the subject can be a template.
                prompts = tuple(
                    self.fact.fill(p) if SLOT in p and self.fact.subject not in p else p
                    for p in prompts
                )
            elif unfilled := [p for p in prompts if SLOT in p]:
                raise FactError(
                    f"Record.neighbours holds a template: {quote(unfilled[0])} (fact {self.fact})."
                    " Neighbours are about other subjects: write them out."
                )
            object.__setattr__(self, name, prompts)
        if self.neighbours and self.fact.target_true is None:
            raise FactError(
                f"Record.neighbours need Fact.target_true: {self.fact} has none. Give the answer "
                "that the neighbours share, or use probes."
            )
        given: object = self.probes
        if not isinstance(given, Mapping):
            got = f"got {type(given).__name__} (fact {self.fact})"
            raise FactError(f"Record.probes must be a dict: {got}. Write {{'name': [Probe(...)]}}.")
        groups: dict[str, tuple[Probe, ...]] = {}
        for group, probes in given.items():
            clean_text(group, "a name in Record.probes", f"fact {self.fact}")
            items = _sequence(probes, f"Record.probes[{group!r}]")
            groups[group] = tuple(item for item in items if isinstance(item, Probe))
            if len(groups[group]) < len(items):
                raise FactError(
                    f"Record.probes must hold lists of Probe: {group!r} holds {brief(items)} "
                    f"(fact {self.fact}). Make each a Probe(prompt, expected, foil)."
                )
        object.__setattr__(self, "probes", groups)
        for name in ("case_id", "relation"):
            value: object = getattr(self, name)
            if name == "case_id" and not (value is None or isinstance(value, str)):
                value = whole_number(value, "Record.case_id", FactError, advice="Or give a text.")
            elif value is not None:
                value = clean_text(value, f"Record.{name}", f"fact {self.fact}")
            object.__setattr__(self, name, value)
