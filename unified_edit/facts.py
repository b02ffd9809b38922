"""Facts, the records that test an edit of them, and checks on a batch of facts.

A `Fact` is one thing to be written into a model; a `Record` is a fact together with the prompts
that show whether the edit took (paraphrases), spread too far (neighbours) or broke something else
(probes). File formats are read in `unified_edit.readers`.

Every message of a `FactError` raised here reads "what is wrong: where. What to do.", so that text
before the first colon is the same for all errors of one sort.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from unified_edit.errors import ContradictionError, FactError

SLOT = "{}"
# Scripts that put no blank between words, or attach particles to a name: a letter beside the
# subject says nothing there about whether the subject is a word of its own.
_UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER",
             "MYANMAR", "TIBETAN")  # fmt: skip


def quote(text: str, width: int = 80) -> str:
    """`text` in quotes, shortened to about `width` characters, for messages."""
    return repr(text if len(text) <= width else text[: width - 3] + "...")


def brief(value: object, width: int = 40) -> str:
    """The first `width` characters or so of `repr(value)`, for messages."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


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
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FactError(
            f"{name} is not valid Unicode: {error.reason} at character {error.start}{place}. "
            "Repair the text's encoding."
        ) from error
    return text


def _joins(inner: str, outer: str) -> bool:
    """Whether `outer`, the character beside a subject that ends in `inner`, continues its word."""
    if not (outer.isalnum() or unicodedata.category(outer).startswith("M")):
        return False
    return not any(unicodedata.name(c, "").startswith(_UNSPACED) for c in (inner, outer))


def _occurrences(subject: str, prompt: str) -> list[int]:
    """Where `subject` starts in `prompt` as whole words, overlapping occurrences included."""
    found = []
    start = prompt.find(subject)
    while start >= 0:
        end = start + len(subject)
        inside_left = start > 0 and _joins(subject[0], prompt[start - 1])
        inside_right = end < len(prompt) and _joins(subject[-1], prompt[end])
        if not (inside_left or inside_right):
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
        before, slot, after = template.partition(SLOT)
        if not slot or SLOT in after:
            raise FactError(
                f"a template needs exactly one {SLOT}: got {template.count(SLOT)} in "
                f"{quote(template)}. Write {SLOT} once, where the subject stands."
            )
        return before + self.subject + after

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
            items = _sequence(probes, f"Record.probes[{group!r}]")
            groups[group] = tuple(item for item in items if isinstance(item, Probe))
            if len(groups[group]) < len(items):
                raise FactError(
                    f"Record.probes must hold lists of Probe: {group!r} holds {brief(items)} "
                    f"(fact {self.fact}). Make each a Probe(prompt, expected, foil)."
                )
        object.__setattr__(self, "probes", groups)


def check_items(facts: Iterable[Fact] | Fact) -> list[Fact]:
    """`facts` as a list; a single `Fact` is a list of one.

    Raises `FactError` for no facts and for anything that is no `Fact`.
    """
    given: object = [facts] if isinstance(facts, Fact) else facts
    if isinstance(given, str) or not isinstance(given, Iterable):
        advice = "Pass record.fact." if isinstance(given, Record) else "Write [Fact(...)]."
        raise FactError(f"facts must be a list of Fact: got {type(given).__name__}. {advice}")
    items = list(given)
    for index, item in enumerate(items):
        if not isinstance(item, Fact):
            advice = "Pass record.fact." if isinstance(item, Record) else "Write Fact(...)."
            got = f"item {index} is {type(item).__name__}, {brief(item, 60)}"
            raise FactError(f"facts must be a list of Fact: {got}. {advice}")
    if not items:
        raise FactError("there are no facts to edit: the list is empty. Give at least one Fact.")
    return items


def check_batch(facts: Iterable[Fact] | Fact) -> list[Fact]:
    """The facts of a batch, each once, in order of first occurrence.

    Facts with the same prompt, subject and target are merged (`target_true` is taken from the
    first that has one). Raises `FactError` for no facts and for anything that is no `Fact`, and
    `ContradictionError` where the same prompt and subject are given another target.
    """
    merged: dict[tuple[str, str], tuple[int, Fact]] = {}
    for index, fact in enumerate(check_items(facts)):
        first, known = merged.setdefault((fact.prompt, fact.subject), (index, fact))
        if known.target_new != fact.target_new:
            raise ContradictionError(
                f"two facts contradict each other: fact {first}, {known}, and fact {index}, {fact},"
                " have the same prompt and subject but different targets. Keep one of them, or "
                "edit them one after another."
            )
        if known.target_true is None and fact.target_true is not None:
            known = replace(known, target_true=fact.target_true)
            merged[fact.prompt, fact.subject] = (first, known)
    return [fact for _, fact in merged.values()]


def shared_subjects(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Index pairs (i < j) of facts about the same subject whose filled-in prompts differ.

    Upper and lower case, repeated blanks and the Unicode form of accents do not make subjects
    different. The keys of such facts are close or identical: with a subject at the start of both
    prompts the model has read the same tokens when it forms the key.
    """
    groups: dict[str, list[int]] = {}
    for index, fact in enumerate(facts):
        same = unicodedata.normalize("NFC", " ".join(fact.subject.split()).casefold())
        groups.setdefault(same, []).append(index)
    return sorted(
        (i, j)
        for members in groups.values()
        for n, i in enumerate(members)
        for j in members[n + 1 :]
        if facts[i].text != facts[j].text
    )
