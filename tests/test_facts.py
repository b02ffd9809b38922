"""Facts, records, their files, and the checks on a batch."""

from __future__ import annotations

import copy
import json
import pickle
import string
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from unified_edit.errors import ContradictionError, FactError, FactFileError, MethodError
from unified_edit.facts.batches import (
    check_batch,
    check_items,
    members_of,
    settle,
    shared_subjects,
    subject_batches,
    subject_columns,
)
from unified_edit.facts.facts import Fact, Probe, Record
from unified_edit.facts.readers import read_facts, read_records

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEMPLATE = "{} is located in the city of"
TOWER = Fact(TEMPLATE, "The Eiffel Tower", "Rome", "Paris")


def message(kind: type[Exception], action, *parts: str) -> str:
    """The text of the error that `action` raises, which must hold all `parts`."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    return text


# --- Fact ------------------------------------------------------------------------------------


def test_template_and_filled_in_prompt_give_the_same_fact() -> None:
    filled = Fact("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    assert filled == TOWER
    assert hash(filled) == hash(TOWER)
    assert filled.prompt == TEMPLATE
    assert Fact(TEMPLATE, subject="The Eiffel Tower", target_new="Rome").target_true is None


def test_parts_of_a_fact() -> None:
    fact = Fact("In France, {} is in", "the Louvre", "Rome")
    assert fact.text == "In France, the Louvre is in"
    assert (fact.prefix, fact.suffix) == ("In France, ", " is in")
    start, end = fact.subject_span
    assert (start, fact.text[start:end]) == (11, "the Louvre")
    assert fact.fill("{} is a") == "the Louvre is a"
    assert fact.fill("100% {0} { {}") == "100% {0} { the Louvre"
    assert str(TOWER) == ("'The Eiffel Tower is located in the city of' -> 'Rome' (not 'Paris')")


def test_a_fact_is_frozen_copied_and_pickled() -> None:
    with pytest.raises(FrozenInstanceError):
        TOWER.subject = "x"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(TOWER)) == TOWER
    assert copy.deepcopy(TOWER) == TOWER
    assert replace(TOWER, target_new="Oslo") == Fact(TEMPLATE, "The Eiffel Tower", "Oslo", "Paris")


def test_outer_blanks_go_and_inner_ones_stay() -> None:
    fact = Fact("\n A  note. {}  lies in \t", " Lake\tComo ", " New  York ", "\nItaly")
    assert fact == Fact("A  note. {}  lies in", "Lake\tComo", "New  York", "Italy")
    assert fact.text == "A  note. Lake\tComo  lies in"
    # the filled-in form with a blank at its end is the same fact
    assert Fact("Lake\tComo lies in ", "Lake\tComo", "x").prompt == "{} lies in"


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        ("Romeo met Rome in", "Romeo met {} in"),  # not inside a longer word, on the right
        ("Jerome met Rome in", "Jerome met {} in"),
        ("preRome, Rome2 and Rome are", "preRome, Rome2 and {} are"),  # left; a digit
        ("Rome\u0301 and Rome are", "Rome\u0301 and {} are"),  # an accent of its own
        ("Rome's mayor is", "{}'s mayor is"),
        ("The (Rome) is", "The ({}) is"),
        ("{Rome} is 100% in", "{{}} is 100% in"),
        ("「Romeは", "「{}は"),  # no blanks between words here
    ],
)
def test_only_whole_words_are_the_subject(prompt: str, template: str) -> None:
    fact = Fact(prompt, "Rome", "x")
    assert fact.prompt == template
    assert fact.text == prompt


def test_a_subject_in_a_script_without_blanks() -> None:
    assert Fact("日本の東京都は", "東京", "x").prompt == "日本の{}都は"
    assert (
        Fact("東京Tower is", "東京", "x").prompt == "{}Tower is"
    )  # the subject's script counts too
    message(FactError, lambda: Fact("東京と東京は", "東京", "x"), "occurs 2 times")


def test_a_template_takes_any_subject() -> None:
    assert Fact("{}s and Rome and {", "Rome", "x").text == "Romes and Rome and {"
    assert Fact("In {} the {0} of", "{name}", "x").text == "In {name} the {0} of"
    assert Fact("In {} the", "a{}b", "x").text == "In a{}b the"
    assert Fact("{} is", "{}", "x").text == "{} is"
    message(
        FactError, lambda: Fact("The {} operator is", "The {} operator", "x"),
        "template or filled in", "'The {} operator is'", "in place of the whole subject",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "subject", "parts"),
    [
        ("Paris is in", "Rome", ["does not occur in the prompt", "'Rome'", "'Paris is in'", "{}"]),
        ("Romeo is in", "Rome", ["does not occur", "only occurs there inside a longer word"]),
        ("rome is in", "Rome", ["does not occur", "other upper and lower case"]),
        ("Caf\u00e9 is in", "Cafe\u0301", ["does not occur", "another Unicode form"]),
        ("{0} is in", "Rome", ["does not occur", "Write {} where the subject stands"]),
        ("Rome and Rome are", "Rome", ["occurs 2 times", "Write {} in place of the occurrence"]),
        ("aa aa aa is", "aa aa", ["occurs 2 times"]),  # overlapping
        ("{} and {} are", "Rome", ["more than one {}", "'{} and {} are'", "Keep one"]),
    ],
)
def test_an_unclear_subject_is_an_error(prompt: str, subject: str, parts: list[str]) -> None:
    message(FactError, lambda: Fact(prompt, subject, "x"), *parts)


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true"])
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("", ["is empty", "at least one visible character"]),
        (" \n\t\u00a0", ["is empty"]),
        (42, ["must be a string", "got int, 42"]),
        (["Rome"], ["must be a string", "got list"]),
        (b"Rome", ["must be a string", "got bytes"]),
        ("a\ud800", ["not valid Unicode", "character 1"]),
        ("ab\0", ["not valid Unicode", r"'\x00' at character 2"]),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, parts: list[str]) -> None:
    good = {
        "prompt": TEMPLATE,
        "subject": "The Louvre",
        "target_new": "Rome",
        "target_true": "Oslo",
    }
    text = message(FactError, lambda: Fact(**{**good, field: value}), f"Fact.{field}", *parts)
    other = "The Louvre" if field != "subject" else TEMPLATE
    assert other in text  # which fact it is


def test_none_is_no_target_but_may_be_the_true_one() -> None:
    message(FactError, lambda: Fact(TEMPLATE, "x", None), "Fact.target_new", "NoneType")  # type: ignore[arg-type]


def test_equal_targets_are_an_error() -> None:
    message(
        FactError, lambda: Fact(TEMPLATE, "The Louvre", " Paris", "Paris "),
        "target_new equals target_true", "'Paris'", "The Louvre", "Give another target",
    )  # fmt: skip
    Fact(TEMPLATE, "The Louvre", "paris", "Paris")  # another text, so another target


@pytest.mark.parametrize(
    ("template", "count"), [("no slot", 0), ("{} and {}", 2), (5, 0), (None, 0)]
)
def test_fill_needs_one_slot(template: str, count: int) -> None:
    message(
        FactError, lambda: TOWER.fill(template), "exactly one {}", f"got {count}", str(template)
    )  # fmt: skip


# Letters that occur in no word of the texts below, characters that `format` and `%` treat
# specially, and some outside ASCII.
awkward = st.text(alphabet=string.ascii_letters + "{}%$\\\"'.,-_0 \n\téß東🙂\u0301", max_size=20)


@settings(deadline=None, derandomize=True)
@given(awkward, awkward, awkward)
@example("{", "}", "{0}")
@example("", "%s", "")
@example("a{", "x", "}b")
@example("", "{}", "")
def test_a_template_is_partitioned_and_filled(before: str, subject: str, after: str) -> None:
    subject = subject.strip()
    assume(subject and "{}" not in before + after and (subject == "{}" or "{}" not in subject))
    fact = Fact(before + "{}" + after, subject, "x", "y")
    assert fact.prefix == before.lstrip()
    assert fact.suffix == after.rstrip()
    assert fact.text == before.lstrip() + subject + after.rstrip()
    start, end = fact.subject_span
    assert fact.text[:start] == fact.prefix
    assert fact.text[start:end] == subject
    assert replace(fact, target_new="z").text == fact.text  # a stored fact is a valid input


@settings(deadline=None, derandomize=True)
@given(awkward, awkward, awkward)
@example('{| class="x" {', "Norway", "} is")
@example("100% of", "{0}", "%s")
def test_a_filled_in_prompt_becomes_its_template(before: str, subject: str, after: str) -> None:
    subject = subject.strip()
    prompt = before + " " + subject + " " + after
    assume(subject and "{}" not in prompt)
    # the oracle is blunt: the subject's text occurs once, at whatever place
    assume(sum(prompt.startswith(subject, i) for i in range(len(prompt))) == 1)
    assume(not after.startswith("\u0301") or after == "")
    fact = Fact(prompt, subject, "x")
    assert fact.text == prompt.strip()
    assert fact.prefix == (before + " ").lstrip()
    assert fact == Fact(before + " {} " + after, subject, "x")


# --- Probe and Record ------------------------------------------------------------------------


def test_a_record_keeps_what_it_is_given() -> None:
    record = Record(
        TOWER,
        paraphrases=["{} stands in ", "You find The Eiffel Tower {} in"],
        neighbours=["The Louvre is in"],
        generation_prompts=["Near {} one can"],
        probes={"own_object": [Probe("The capital of France is ", " Paris", "Rome")]},
        case_id=7,
        relation="P131",
    )
    assert record.paraphrases == ("The Eiffel Tower stands in", "You find The Eiffel Tower {} in")
    assert record.neighbours == ("The Louvre is in",)
    assert record.generation_prompts == ("Near The Eiffel Tower one can",)
    assert record.probes == {"own_object": (Probe("The capital of France is", "Paris", "Rome"),)}
    assert (record.case_id, record.relation) == (7, "P131")
    assert pickle.loads(pickle.dumps(record)) == record
    assert hash(record) == hash(replace(record))
    assert Record(TOWER).probes == {}
    assert Record(TOWER, case_id=np.int64(7)).case_id == 7
    assert type(Record(TOWER, case_id=torch.tensor(7)).case_id) is int  # type: ignore[arg-type]


def test_a_record_does_not_follow_changes_of_what_it_was_made_from() -> None:
    groups = {"own_object": [Probe("a", "b")]}
    record = Record(TOWER, probes=groups)
    groups["own_object"].append(Probe("c", "d"))
    groups["more"] = []
    assert record.probes == {"own_object": (Probe("a", "b"),)}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"fact": "a fact"}, ["Record.fact must be a Fact", "got str"]),
        ({"paraphrases": "one prompt"}, ["Record.paraphrases must be a list", "got str"]),
        ({"neighbours": ["a", ""]}, ["Record.neighbours[1] is empty", "The Eiffel Tower"]),
        ({"generation_prompts": [3]}, ["Record.generation_prompts[0] must be a string", "int"]),
        ({"neighbours": ["{} is in"]}, ["neighbours holds a template", "write them out"]),
        ({"paraphrases": ["{} and {} are"]}, ["exactly one {}", "got 2"]),
        ({"fact": Fact(TEMPLATE, "x", "y"), "neighbours": ["a"]}, ["need Fact.target_true"]),
        ({"probes": [Probe("a", "b")]}, ["Record.probes must be a dict", "got list"]),
        ({"probes": {"own": Probe("a", "b")}}, ["Record.probes['own'] must be a list", "Probe"]),
        ({"probes": {"own": ["a"]}}, ["must hold lists of Probe", "'own'", "Make each a Probe"]),
        ({"probes": {5: []}}, ["a name in Record.probes must be a string", "int, 5"]),
        ({"probes": {" ": []}}, ["a name in Record.probes is empty"]),
        ({"case_id": 1.5}, ["Record.case_id is 1.5", "whole number", "Or give a text"]),
        ({"case_id": True}, ["Record.case_id is True"]),
        ({"case_id": ["a"]}, ["Record.case_id is ['a']"]),
        ({"case_id": "a\ud800"}, ["Record.case_id is not valid Unicode"]),
        ({"relation": 5}, ["Record.relation must be a string", "int, 5"]),
        ({"paraphrases": None}, ["Record.paraphrases must be a list", "got NoneType"]),
    ],
)
def test_a_bad_record_is_an_error(fields: dict[str, object], parts: list[str]) -> None:
    message(FactError, lambda: Record(**{"fact": TOWER, **fields}), *parts)  # type: ignore[arg-type]


def test_a_bad_probe_is_an_error() -> None:
    assert Probe("a", "b").foil is None
    message(FactError, lambda: Probe("", "b"), "Probe.prompt is empty")
    message(FactError, lambda: Probe("a", 1), "Probe.expected must be a string", "int", "'a'")  # type: ignore[arg-type]
    message(FactError, lambda: Probe("a", "b", ""), "Probe.foil is empty")
    message(FactError, lambda: Probe("a", "b", " b"), "equals Probe.foil", "'b'", "change one")


# --- batches ---------------------------------------------------------------------------------


def test_identical_facts_are_merged_in_order() -> None:
    other = Fact("{} is in", "The Louvre", "Oslo")
    known = Fact("{} is in", "The Louvre", "Oslo", "Paris")
    filled = Fact(TOWER.text, TOWER.subject, "Rome")
    assert check_batch([other, TOWER, filled, known]) == [known, TOWER]
    assert check_batch(iter((TOWER,))) == [TOWER]


def test_no_facts_and_things_that_are_no_facts() -> None:
    message(FactError, lambda: check_batch([]), "no facts", "at least one Fact")
    message(FactError, lambda: check_batch([TOWER, {"prompt": "x"}]), "item 1 is dict", "Fact(...)")  # type: ignore[list-item]
    message(FactError, lambda: check_batch([Record(TOWER)]), "item 0 is Record", "record.fact")  # type: ignore[list-item]
    assert check_batch(TOWER) == [TOWER]
    message(FactError, lambda: check_batch(Record(TOWER)), "got Record", "record.fact")  # type: ignore[arg-type]
    message(FactError, lambda: check_batch("abc"), "item 0 is str")  # type: ignore[arg-type]
    for wrong in (None, 5, torch.tensor(5)):
        message(FactError, lambda wrong=wrong: check_items(wrong), f"got {type(wrong).__name__}")
    message(FactError, lambda: shared_subjects([TOWER, None]), "item 1", "NoneType")  # type: ignore[list-item]


def test_a_contradiction_names_both_facts() -> None:
    batch = [Fact("{} is in", "The Louvre", "Oslo"), TOWER, replace(TOWER, target_new="Berlin")]
    text = message(
        ContradictionError, lambda: check_batch(batch),
        "fact 1", "fact 2", "'Rome'", "'Berlin'", "The Eiffel Tower", "Keep one of them",
    )  # fmt: skip
    assert "Louvre" not in text
    # the same words around another subject, or the same text cut otherwise, contradict nothing
    check_batch([TOWER, Fact(TEMPLATE, "The Louvre", "Berlin")])
    check_batch([Fact("{} Tower is in", "Eiffel", "a"), Fact("{} is in", "Eiffel Tower", "b")])


def test_shared_subjects() -> None:
    facts = [
        Fact("{} is in", "The Caf\u00e9  Noir", "a"),
        TOWER,
        Fact("{} was built by", "the cafe\u0301 noir", "b"),
        Fact("{} is in", "The Caf\u00e9  Noir", "a", "c"),  # the same prompt: merged elsewhere
        Fact("People at {} speak", "THE CAF\u00c9 NOIR", "d"),
        Fact("{} is in", "The Caf\u00e9", "e"),
    ]
    assert shared_subjects(facts) == [(0, 2), (0, 4), (2, 3), (2, 4), (3, 4)]
    assert shared_subjects([]) == []
    assert subject_columns(facts) == (0, 1, 0, 0, 0, 2)
    assert subject_batches(facts) == [[0, 1, 3, 5], [2], [4]]
    assert subject_columns([]) == ()
    assert subject_batches([]) == []
    # one text twice is no pair: whether its facts go together is decided elsewhere
    twice = [Fact("{} is in", "The Louvre", "a"), Fact("{} is in", "The Louvre", "b")]
    assert subject_columns(twice) == (0, 1)
    assert subject_batches(twice) == [[0, 1]]
    assert members_of((0, 1, 0, 2)) == [[0, 2], [1], [3]]
    message(FactError, lambda: subject_columns([TOWER, None]), "item 1", "NoneType")  # type: ignore[list-item]
    message(FactError, lambda: subject_batches([None]), "item 0", "NoneType")  # type: ignore[list-item]


def test_the_last_of_contradicting_facts_wins() -> None:
    """As if those that it overrules had not been batch, wherever they stand."""
    louvre = Fact("{} is in", "The Louvre", "Oslo")
    oslo, rome = replace(TOWER, target_new="Oslo", target_true=None), TOWER
    assert settle([rome, louvre], "last") == ([rome, louvre], [])
    for batch, wanted, overruled in (
        ([rome, louvre, oslo], [louvre, oslo], [(0, 2)]),
        ([rome, oslo, louvre, rome], [rome, louvre], [(1, 3)]),
        ([oslo, rome, oslo, louvre, rome], [rome, louvre], [(0, 4), (2, 4)]),
    ):
        kept, notes = settle(batch, "last")
        assert kept == wanted == check_batch(batch, "last")
        assert len(notes) == len(overruled)
        for note, (lost, won) in zip(notes, overruled, strict=True):
            assert note.startswith(f"fact {lost}, {batch[lost]}, is not written")
            assert f"fact {won}, {batch[won]}" in note
        message(ContradictionError, lambda batch=batch: check_batch(batch), "on_conflict='last'")
    message(MethodError, lambda: check_batch([rome], "first"), "'first'", "('raise', 'last')")  # type: ignore[arg-type]


# --- files of facts --------------------------------------------------------------------------


def write(path: Path, *objects: object, lines: bool = True) -> Path:
    texts = [json.dumps(item, ensure_ascii=False) for item in objects]
    path.write_text("\n".join(texts) if lines else "[\n" + ",\n".join(texts) + "\n]", "utf-8")
    return path


def plain(n: int = 0) -> dict[str, str]:
    return {"prompt": "{} is in", "subject": f"Place {n}", "target_new": "Rome"}


@pytest.mark.parametrize("lines", [True, False])
def test_facts_are_read_from_a_list_and_from_lines(tmp_path: Path, lines: bool) -> None:
    full = {"prompt": "Café {0} 東京 is in", "subject": "東京", "target_new": " Rome",
            "target_true": "Tōkyō"}  # fmt: skip
    path = write(tmp_path / "facts.json", full, {**plain(), "target_true": None}, lines=lines)
    expected = [
        Fact("Café {0} {} is in", "東京", "Rome", "Tōkyō"),
        Fact("{} is in", "Place 0", "Rome"),
    ]
    assert read_facts(path) == expected
    assert read_facts(str(path)) == expected


def test_blank_lines_marks_and_other_line_ends_are_no_trouble(tmp_path: Path) -> None:
    line = json.dumps(plain()).replace("is in", "is\u2028in")  # a line end to str.splitlines only
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n{line}\r\n".encode())
    facts = read_facts(tmp_path / "a.jsonl")
    assert [fact.prompt for fact in facts] == ["{} is\u2028in"] * 2


def test_a_wrong_field_on_line_17(tmp_path: Path) -> None:
    objects: list[dict[str, object]] = [plain(n) for n in range(1, 21)]
    path = tmp_path / "facts.jsonl"

    def read_with(change: dict[str, object]) -> object:
        changed = {k: v for k, v in {**objects[16], **change}.items() if v != "gone"}
        return read_facts(write(path, *objects[:16], changed, *objects[17:]))

    place = f"{path}, line 17: "
    for change, parts in [
        ({"target_nwe": "x"}, ["unknown field 'target_nwe'", "Did you mean 'target_new'?"]),
        ({"target": "x"}, ["unknown field 'target'", "Did you mean 'target_new'?"]),
        ({"ground_truth": "x"}, ["a record, not a bare fact", "read_records"]),
        ({"portability": None}, ["a record, not a bare fact"]),
        ({"zzz": 1}, ["unknown field 'zzz'. Expected fields: 'prompt', 'subject'"]),
        (
            {"subject": "gone"},
            ["'subject' is missing", "a string", "found: 'prompt', 'target_new'"],
        ),
        ({"target_new": None}, ["field 'target_new' is missing"]),
        ({"target_new": 5}, ["'target_new' must be a string", "got a whole number, 5"]),
        ({"target_true": True}, ["'target_true' must be a string", "got true/false"]),
        ({"subject": ["x"]}, ["'subject' must be a string", "got a list"]),
        ({"prompt": "Elsewhere is in"}, ["does not occur in the prompt", "'Place 17'"]),
        ({"target_new": " "}, ["Fact.target_new is empty", "Place 17"]),
    ]:
        text = message(FactFileError, lambda change=change: read_with(change), place, *parts)
        assert text.startswith(place)


@pytest.mark.parametrize("field", ["prompt", "locality", "portability", "case_id", "new"])
def test_nesting_that_can_just_be_read(tmp_path: Path, field: str) -> None:
    path = tmp_path / "facts.json"
    rest = json.dumps({k: v for k, v in {**RECENT, "locality": {}}.items() if k != field})[1:]
    for depth in range(sys.getrecursionlimit() - 100, sys.getrecursionlimit() + 5):
        path.write_text(f'{{"{field}": {"[" * depth}{"]" * depth}, {rest}')
        said = ""
        try:
            read_records(path)
        except FactFileError as error:
            said = str(error)
        assert f"{path}, line 1" in said or field == "new"


def test_an_object_may_stand_on_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text("\n".join(json.dumps(plain(n), indent=1) for n in range(3)))
    assert [fact.subject for fact in read_facts(path)] == ["Place 0", "Place 1", "Place 2"]


def test_a_text_that_no_file_can_hold_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    for text in ("\ud800", "a\udc00b", "a\0"):
        path.write_text("\n".join(json.dumps({**plain(), "target_new": t}) for t in ("Oslo", text)))
        for read in (read_facts, read_records):
            message(
                FactFileError, lambda read=read: read(path),
                f"{path}, line 2", "Fact.target_new is not valid Unicode", "Place 0",
            )  # fmt: skip


def test_a_wrong_item_of_a_list_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([plain(1), plain(2), {**plain(3), "subject": 3}], indent=1))
    # two items of five lines each, after the opening bracket
    message(FactFileError, lambda: read_facts(path), f"{path}, item 3 (line 12): field 'subject'")
    path.write_text(json.dumps([plain(1), [plain(2)]]))
    message(
        FactFileError,
        lambda: read_facts(path),
        "item 2 (line 1): each item must be an object",
        "list",
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["holds nothing", "at least one object"]),
        (b"[ ]", ["holds nothing"]),
        (b"\xef\xbb\xbf \r\n", ["holds nothing"]),
        (
            b'{"prompt": "a"}\n{"prompt": }',
            ["line 2, column 12", "not valid JSON", "object {...} a line"],
        ),
        (b'{\n "prompt": "a"\n}', ["line 1: field 'subject' is missing"]),
        (
            b'{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}',
            ["line 3: not valid JSON", "(line 4, "],
        ),
        (b'{"prompt": "a"},\n{"prompt": "b"}', ["line 1: not valid JSON", "[{...}, {...}]"]),
        (b'{"prompt": "a"}\n]', ["line 2: not valid JSON"]),
        (b'[{"prompt": "a"} {"prompt": "b"}]', ["line 1, column 18", "not valid JSON", "','"]),
        (b'[{"prompt": "a"},]', ["line 1, column", "not valid JSON"]),
        (b"[", ["line 1, column 2", "not valid JSON"]),
        (b'[{"prompt": "a"},\n {"prompt" "b"}]', ["line 2, column 12", "not valid JSON"]),
        (b'[{"prompt": "a"}', ["line 1", "not valid JSON", "one list"]),
        (b'[{"prompt": "a"}]\n x', ["line 2", "not valid JSON"]),
        (b'{"prompt": "a", "prompt": "b"}', ["line 1: field 'prompt' is given twice", "Keep one"]),
        (b'[\n{"prompt": "a", "prompt": "b"}]', ["item 1 (line 2): field 'prompt' is given twice"]),
        (b'"text"', ["line 1: each item must be an object", "got a string"]),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}', ["line 2: not UTF-8", "Save the file as UTF-8"]),
        ('[\n{"prompt": "a"}]'.encode("utf-16"), ["line 1: not UTF-8", "Save the file as UTF-8"]),
        ('\n[{"prompt": "a"}]'.encode("utf-16-be"), ["line 1: not UTF-8", "Save the file"]),
        (b'{"prompt": "a"}\n{"prompt": "\0"}', ["line 2: not UTF-8", "(byte 28)"]),
        (b"[1]", ["item 1 (line 1): each item must be an object", "a whole number, 1"]),
        (b'{"prompt": "a"}\n{"prompt": NaN}', ["line 2: NaN is no number of JSON", "Write null"]),
        (
            b'[{"prompt": "a"},\n{"prompt": -Infinity}]',
            ["item 2 (line 2): -Infinity is no", "null"],
        ),
        (b'\n{"prompt": ' + b"9" * 5000 + b"}", ["line 2: a number has 5000 digits", "Shorten"]),
        (b'[{"prompt": -' + b"9" * 5000 + b"}]", ["item 1 (line 1): a number has 5001 digits"]),
        (b"{}\n" * 3 + b'{"a": ' * 99999, ["line 4: lists or objects are nested too deeply"]),
        (b"[" * 99999 + b"]" * 99999, ["item 1 (line 1)", "nested too deeply", "no more than"]),
        (b'{"fact": {}}', ["line 1", "record, not a bare fact", "read_records"]),
    ],
)
def test_a_malformed_file_is_an_error(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    message(FactFileError, lambda: read_facts(path), str(path), *parts)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    message(FactFileError, lambda: read_facts(missing), str(missing), "no such file", "Check")
    message(
        FactFileError, lambda: read_facts(tmp_path), str(tmp_path), "cannot be read", "directory"
    )
    message(FactFileError, lambda: read_facts(missing / "a.json"), "no such file")
    message(FactFileError, lambda: read_facts(tmp_path / ("x" * 999)), "cannot be read", "too long")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what chmod takes away, an administrator who runs the tests has all the same
    def read_bytes(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    path = tmp_path / "a.json"
    message(
        FactFileError, lambda: read_records(path), str(path), "Permission denied", "Give a file"
    )


@pytest.mark.parametrize("read", [read_facts, read_records])
def test_a_path_is_written_in_many_ways(
    read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "x.json", plain())
    assert len(read("~/x.json")) == len(read(Path("~/x.json"))) == 1
    for bad in (None, 5, ["x.json"], "", b"x.json", "x\0.json", "x\ud800.json"):
        message(FactFileError, lambda bad=bad: read(bad), f"path is {bad!r}")
    message(FactFileError, lambda: read("~nobody-of-that-name/x.json"), "write the path out")


# --- files of records ------------------------------------------------------------------------


def counterfact(case_id: int = 0, **rewrite: object) -> dict[str, object]:
    wanted = {
        "prompt": "{} is in", "subject": "Angola", "relation_id": "P30",
        "target_new": {"str": "Asia", "id": "Q48"}, "target_true": {"str": "Africa", "id": "Q15"},
    }  # fmt: skip
    return {
        "case_id": case_id,
        "pararel_idx": 1,
        "requested_rewrite": {**wanted, **rewrite},
        "paraphrase_prompts": ["Angola lies in", "Angola belongs to"],
        "neighborhood_prompts": ["Ghana is in"],
        "attribute_prompts": ["Japan is in"],
        "generation_prompts": ["People in Angola"],
    }


def test_counterfact(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "a.json", counterfact(5), lines=False))
    assert record == Record(
        Fact("{} is in", "Angola", "Asia", "Africa"),
        ("Angola lies in", "Angola belongs to"), ("Ghana is in",), ("People in Angola",),
        case_id=5, relation="P30",
    )  # fmt: skip


def test_reduced_form(tmp_path: Path) -> None:
    reduced = {
        "case_id": 4, "prompt": "Where is Lyon? It is in", "subject": "Lyon", "target_new": "Asia",
        "ground_truth": "Europe", "rephrase_prompt": "In Lyon people speak",
        "locality_prompt": "Nice is in", "locality_ground_truth": "Europe",
    }  # fmt: skip
    other = {**reduced, "case_id": 5, "locality_ground_truth": "France"}
    same, different = read_records(write(tmp_path / "a.json", reduced, other))
    assert same == Record(
        Fact("Where is {}? It is in", "Lyon", "Asia", "Europe"),
        neighbours=("Nice is in",), generation_prompts=("In Lyon people speak",), case_id=4,
    )  # fmt: skip
    # with another answer the prompt is no neighbour: target_true would not be right there
    assert different.neighbours == ()
    assert different.probes == {"locality": (Probe("Nice is in", "France"),)}


def test_zsre_of_mend(tmp_path: Path) -> None:
    zsre = {
        "subject": "WEFS", "src": "When was WEFS established?", "pred": "1998", "alt": " 1997",
        "rephrase": "When has WEFS been established?", "answers": ["1987", "1988"],
        "loc": "nq question: who voiced gaston", "loc_ans": "Richard White", "cond": "...",
    }  # fmt: skip
    path = write(tmp_path / "a.json", zsre, {**zsre, "alt": "1988"}, lines=False)
    (record,) = read_records(path, skip_bad=True)
    assert record == Record(
        Fact("When was {} established?", "WEFS", "1997", "1987"),
        ("When has WEFS been established?",),
        probes={"locality": (Probe("nq question: who voiced gaston", "Richard White"),)},
        case_id=0,
    )
    message(FactFileError, lambda: read_records(path), "item 2", "one of the right answers", "1988")
    write(path, {k: v for k, v in zsre.items() if k != "answers"})
    message(FactFileError, lambda: read_records(path), "field 'answers' is missing", "a list")


KNOWEDIT = {
    "subject": "Aspi", "prompt": "Which family does Aspi belong to?", "target_new": "Moth",
    "ground_truth": ["Ammonite"], "rephrase_prompt": "What family are Aspi?", "cond": "...",
    "locality": {"Relation_Specificity": [
        {"prompt": "Aspi taxon rank", "ground_truth": ["genus"]},
        {"prompt": ["Aspi is a"], "ground_truth": [["genus", "kind"]]},
        {"prompt": "Aspi has no answer", "ground_truth": [[""]]},
    ]},
    "portability": {"Reasoning": [{"prompt": "Its common name?", "ground_truth": "Owlet moth"}]},
}  # fmt: skip


def test_zsre_of_knowedit(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "a.json", KNOWEDIT, lines=False))
    assert record == Record(
        Fact("Which family does {} belong to?", "Aspi", "Moth", "Ammonite"),
        ("What family are Aspi?",),
        probes={
            "locality: Relation_Specificity": (
                Probe("Aspi taxon rank", "genus"),
                Probe("Aspi is a", "genus"),
            ),
            "portability: Reasoning": (Probe("Its common name?", "Owlet moth"),),
        },
        case_id=0,
    )


def mquake(**more: object) -> dict[str, object]:
    rewrite = counterfact()["requested_rewrite"]
    assert isinstance(rewrite, dict)
    return {
        "case_id": 7, "requested_rewrite": [{**rewrite, "question": "Where is Angola?"}],
        "questions": ["What is the largest city where Angola lies?", "Name the city."],
        "answer": "Cairo", "answer_alias": ["El Qahira"], "new_answer": "Tokyo",
        "new_answer_alias": [], "single_hops": [], "new_single_hops": [], "orig": {}, **more,
    }  # fmt: skip


def test_multi_hop_questions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = mquake(new_answer="Cairo ")
    first, second = read_records(write(tmp_path / "a.json", mquake(), same, lines=False))
    asked = ("What is the largest city where Angola lies?", "Name the city.")
    assert first == Record(
        Fact("{} is in", "Angola", "Asia", "Africa"), ("Where is Angola?",),
        probes={"portability: multi-hop": tuple(Probe(one, "Tokyo", "Cairo") for one in asked)},
        case_id=7, relation="P30",
    )  # fmt: skip
    assert second.probes["portability: multi-hop"][0] == Probe(asked[0], "Cairo")
    assert not caplog.records
    rewrites = mquake()["requested_rewrite"]
    assert isinstance(rewrites, list)
    path = write(tmp_path / "b.jsonl", mquake(), mquake(requested_rewrite=rewrites * 2))
    message(FactFileError, lambda: read_records(path), "line 2", "several rewrites", "got 2")
    assert read_records(path, skip_bad=True) == [first]
    path = write(tmp_path / "c.jsonl", {k: v for k, v in mquake().items() if k != "new_answer"})
    message(FactFileError, lambda: read_records(path), "field 'new_answer' is missing")


def test_what_a_fact_of_zsre_leads_to(tmp_path: Path) -> None:
    """EasyEdit's selection has one more question."""
    zsre = {"subject": "WEFS", "src": "When was WEFS set up?", "alt": "1997", "answers": ["1987"]}
    more = {"New Question": "How old was WEFS in 2000?", "New Answer": "3", "Recalled": "age"}
    (record,) = read_records(write(tmp_path / "a.json", {**zsre, "portability": more}))
    assert record.probes == {"portability": (Probe("How old was WEFS in 2000?", "3"),)}


RECENT = {
    "subject": "Leo Arons", "prompt": "The place of death of Leo Arons is", "target_new": "Berlin",
}  # fmt: skip
CHECK = {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons", "Albert"]]}
CHECKED = Probe("The father of Leo Arons is", "Albert Arons")


@pytest.mark.parametrize("truth", [{}, *({"ground_truth": x} for x in (None, "", [], [[""]], " "))])
def test_a_new_fact_of_knowedit_has_no_ground_truth(
    tmp_path: Path, truth: dict[str, object]
) -> None:
    item = {**RECENT, **truth, "locality": {"Relation_Specificity": [CHECK]}}
    (record,) = read_records(write(tmp_path / "a.json", item, lines=False))
    fact = Fact("The place of death of {} is", "Leo Arons", "Berlin")
    assert record == Record(fact, probes={"locality: Relation_Specificity": (CHECKED,)}, case_id=0)
    (record,) = read_records(write(tmp_path / "b.json", {**RECENT, **truth}))
    assert record.fact == fact


@pytest.mark.parametrize(
    "truth", ["Vienna", ["Vienna", "Wien"], [["Vienna"], ["Wien"]], [[["Vienna "]]]]
)
def test_ground_truth_is_a_text_or_lists_of_texts(tmp_path: Path, truth: object) -> None:
    for more in ({}, {"locality": {}}, {"portability": None}):
        item = {**RECENT, **more, "ground_truth": truth}
        (record,) = read_records(write(tmp_path / "a.json", item))
        assert record.fact.target_true == "Vienna"
        path = write(tmp_path / "b.json", {**item, "target_new": "Vienna"})
        message(FactFileError, lambda path=path: read_records(path), "Vienna", "skip_bad=True")
    path = write(tmp_path / "c.json", {**RECENT, "ground_truth": ["a", 5]})
    message(FactFileError, lambda: read_records(path), "an entry of field 'ground_truth'", "5")


def test_the_same_group_under_locality_and_portability(tmp_path: Path) -> None:
    other = {"prompt": "Is Leo Arons alive?", "ground_truth": [["no"], ["false"]]}
    item = {**RECENT, "locality": {"Group": [CHECK]}, "portability": {"Group": [other]}}
    (record,) = read_records(write(tmp_path / "a.json", item))
    assert record.probes == {
        "locality: Group": (CHECKED,),
        "portability: Group": (Probe("Is Leo Arons alive?", "no"),),
    }


@pytest.mark.parametrize(
    ("more", "probes"),
    [
        ({"portability": {"A": [CHECK]}}, {"portability: A": (CHECKED,)}),  # and no locality
        ({"portability": {"A": [CHECK]}, "locality": {}}, {"portability: A": (CHECKED,)}),
        ({"portability": {"A": [CHECK]}, "locality": None}, {"portability: A": (CHECKED,)}),
        ({"portability": [CHECK]}, {"portability": (CHECKED,)}),
        ({"portability": []}, {}),
        ({"locality": {"A": None, "B": []}}, {"locality: A": (), "locality: B": ()}),
        ({"locality": {"A": CHECK}}, {"locality: A": (CHECKED,)}),
        (
            {"locality": {"A": {"prompt": ["X", "Y"], "ground_truth": [["x", "z"], "y"]}}},
            {"locality: A": (Probe("X", "x"), Probe("Y", "y"))},
        ),
        (
            {"locality": [CHECK], "locality_prompt": "Z", "locality_ground_truth": "z"},
            {"locality": (Probe("Z", "z"), CHECKED)},
        ),
    ],
)
def test_shapes_of_knowedits_checks(
    tmp_path: Path, more: dict[str, object], probes: dict[str, tuple[Probe, ...]]
) -> None:
    for truth in ({}, {"ground_truth": "Vienna"}, {"ground_truth": ["Vienna"]}):
        (record,) = read_records(write(tmp_path / "a.json", {**RECENT, **truth, **more}))
        assert record.probes == probes
        assert record.fact.target_true == ("Vienna" if truth else None)


@pytest.mark.parametrize(
    ("locality", "parts"),
    [
        ("x", ["field 'locality' must be an object or a list", "a string, 'x'"]),
        ({"A": "x"}, ["in 'locality': field 'A' must be a list or an object"]),
        ({"A": ["x"]}, ["in 'locality', 'A'[0]: each item must be an object"]),
        ({"A": [CHECK, {**CHECK, "prompt": 5}]}, ["'A'[1]: field 'prompt' must be", "number, 5"]),
        ({"A": [{**CHECK, "prompt": ["X", "Y"]}]}, ["'A'[0]: 2 prompts", "as many answers"]),
    ],
)
def test_malformed_checks_of_knowedit(tmp_path: Path, locality: object, parts: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", {**RECENT, "locality": locality})
    message(FactFileError, lambda: read_records(path, skip_bad=True), f"{path}, line 1", *parts)


def test_what_is_reworded(tmp_path: Path) -> None:
    def read(**fields: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
        (record,) = read_records(write(tmp_path / "a.json", {**RECENT, **fields}))
        return record.paraphrases, record.generation_prompts

    assert read(rephrase="A") == read(rephrase=["A"]) == read(rephrase=["A", " "]) == (("A",), ())
    assert read(rephrase="A", rephrase_prompt="B", locality={}) == (("A", "B"), ())
    assert read(rephrase_prompt="B", portability={}) == (("B",), ())
    assert read(rephrase_prompt="B", ground_truth=["Vienna"]) == (("B",), ())
    # the reduced form of CounterFact, where it is mostly the opening of a free text
    assert read(rephrase_prompt="B", ground_truth="Vienna") == ((), ("B",))
    assert read(
        rephrase_prompt="B", ground_truth=["Vienna"], portability={},
        locality_prompt="C", locality_ground_truth="Vienna",
    ) == ((), ("B",))  # fmt: skip


def test_what_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zsre = {
        "subject": "WEFS", "src": "When was WEFS set up?", "alt": "1997", "answers": ["1987"],
        "pred": "1998", "cond": "...", "case_id": 8,
    }  # fmt: skip
    silent = [counterfact(), zsre, {**zsre, "portability": None}, RECENT]
    records = read_records(write(tmp_path / "a.jsonl", *silent))
    assert [record.case_id for record in records] == [0, 8, 8, None]
    assert not caplog.records
    unanswered = {"prompt": "Who?", "ground_truth": [[""]]}
    item = {**RECENT, "locality": {"A": [CHECK, unanswered, {**CHECK, "source": "x"}]}}
    read_records(
        write(tmp_path / "b.jsonl", {**zsre, "portability": {"New Question": "?"}}, item, item)
    )
    (log,) = [entry.getMessage() for entry in caplog.records]
    assert str(tmp_path / "b.jsonl") in log
    for part in (
        "1 x field 'portability'", "2 x check without a prompt or an answer",
        "2 x field 'source' of a check",
    ):  # fmt: skip
        assert part in log


def test_own_form_round_trip(tmp_path: Path) -> None:
    records = [
        Record(
            TOWER, ["A"], ["B"], ["C"], {"own": [Probe("D", "E", "F"), Probe("G", "H")], "no": []},
            "x7", "city",
        ),
        Record(Fact("{} is in", "{0} %s", "Rome")),
    ]  # fmt: skip
    assert read_records(write(tmp_path / "a.jsonl", *map(asdict, records))) == records
    # a file of bare facts holds records without prompts
    assert read_records(write(tmp_path / "b.jsonl", asdict(TOWER))) == [Record(TOWER)]


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ({"fact": asdict(TOWER), "paraphrase": []}, ["unknown field", "mean 'paraphrases'"]),
        ({"fact": asdict(TOWER), "neighbors": []}, ["unknown field", "mean 'neighbours'"]),
        ({"fact": {**asdict(TOWER), "target": "x"}}, ["line 2, in 'fact': unknown field 'target'"]),
        ({"fact": "text"}, ["'fact' must be an object, got a string, 'text'"]),
        ({"fact": asdict(TOWER), "paraphrases": "x"}, ["'paraphrases' must be a list", "string"]),
        (
            {"fact": asdict(TOWER), "paraphrases": ["x", 1]},
            ["item 1 of field 'paraphrases'", "number"],
        ),
        (
            {"fact": asdict(TOWER), "case_id": True},
            ["'case_id' must be a whole number or a string"],
        ),
        (
            {"fact": asdict(TOWER), "probes": {"own": [{"prompt": "a"}]}},
            ["in 'probes', 'own'[0]: field 'expected' is missing"],
        ),
        (
            {"fact": asdict(TOWER), "probes": {"own": [{"prompt": "a", "expect": "b"}]}},
            ["in 'probes', 'own'[0]: unknown field 'expect'", "mean 'expected'"],
        ),
        (counterfact(target_new={"id": "Q1"}), ["in 'requested_rewrite', in 'target_new': field"]),
        (counterfact(target_true=None), ["in 'requested_rewrite'", "'target_true' is missing"]),
        ({"text": "x"}, ["no known format", "found: 'text'", "CounterFact", "'fact'"]),
    ],
)
def test_a_malformed_record_is_never_skipped(
    tmp_path: Path, item: dict[str, object], parts: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", counterfact(), item)
    for skip_bad in (False, True):
        action = lambda skip_bad=skip_bad: read_records(path, skip_bad=skip_bad)  # noqa: E731
        message(FactFileError, action, f"{path}, line 2", *parts)


def test_unusable_records_are_skipped_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        counterfact(11, prompt="Ghana is in"),
        counterfact(12, prompt="Ghana was in"),
        counterfact(13, target_new={"str": ""}),
    ]
    path = write(tmp_path / "a.jsonl", counterfact(10), *bad, counterfact(14))
    message(
        FactFileError, lambda: read_records(path),
        f"{path}, line 2, record 11: the subject does not occur", "'Angola'", "skip_bad=True",
    )  # fmt: skip
    assert [record.case_id for record in read_records(path, skip_bad=True)] == [10, 14]
    (log,) = [entry.getMessage() for entry in caplog.records]
    assert "skipped 3 of 5 records" in log
    assert "2 x the subject does not occur in the prompt; 1 x Fact.target_new is empty" in log
    assert "record 11" in log
    write(path, *bad)
    message(FactFileError, lambda: read_records(path, skip_bad=True), "no usable record", "2 x the")


# --- real files ------------------------------------------------------------------------------


@pytest.mark.data("counterfact/counterfact_250_full.json")
def test_the_real_counterfact_file() -> None:
    records = read_records(DATA / "counterfact/counterfact_250_full.json")
    assert len(records) == 250
    assert {
        (len(r.paraphrases), len(r.neighbours), len(r.generation_prompts)) for r in records
    } == {(2, 10, 10)}
    first = records[0]
    assert first.fact == Fact("{} is located in", "Angola", "Antarctica", "Africa")
    assert (first.case_id, first.relation, first.probes) == (20952, "P30", {})
    assert first.neighbours[7] == "Côte d'Ivoire is located in"
    assert all(r.fact.subject in p for r in records for p in r.paraphrases)
    # a scraped prefix keeps its line break and its brace
    assert any("Cup record\n{| class" in p for r in records for p in r.paraphrases)
    assert len(check_batch([r.fact for r in records])) == 250


@pytest.mark.data("counterfact/counterfact_10000_reduced.json")
def test_the_real_reduced_file() -> None:
    path = DATA / "counterfact/counterfact_10000_reduced.json"
    records = read_records(path)
    assert len(records) == 10000
    assert all(r.paraphrases == () and not r.probes for r in records)
    assert all(len(r.generation_prompts) == len(r.neighbours) == 1 for r in records)
    assert records[0].fact == Fact(
        "The mother tongue of {} is", "Danielle Darrieux", "English", "French"
    )
    raw = json.loads(path.read_text("utf-8"))
    assert [r.fact.text for r in records] == [item["prompt"] for item in raw]
    assert len({r.case_id for r in records}) == 10000


@pytest.mark.data(
    "counterfact/counterfact_250_full.json", "counterfact/counterfact_10000_reduced.json"
)
def test_the_two_real_forms_of_counterfact_agree() -> None:
    full = {r.case_id: r for r in read_records(DATA / "counterfact/counterfact_250_full.json")}
    reduced = read_records(DATA / "counterfact/counterfact_10000_reduced.json")
    shared = [r for r in reduced if r.case_id in full]
    assert len(shared) > 50
    for record in shared:
        assert record.fact.text == full[record.case_id].fact.text
        assert record.fact.target_new == full[record.case_id].fact.target_new


@pytest.mark.data("zsre/zsre_mend_1000.json")
def test_the_real_zsre_file(caplog: pytest.LogCaptureFixture) -> None:
    path = DATA / "zsre/zsre_mend_1000.json"
    message(FactFileError, lambda: read_records(path), "record 88", "skip_bad=True")
    records = read_records(path, skip_bad=True)
    # counted in the file: 17 targets equal the first answer, 4 another one, 2 are empty
    assert len(records) == 1000 - 17 - 4 - 2
    assert "skipped 23 of 1000" in caplog.text
    assert records[0].fact == Fact(
        "What is the product made by {}?", "UniFirst", "unmanned aircraft", "uniform"
    )
    assert all(r.fact.text.endswith("?") and len(r.paraphrases) == 1 for r in records)
    assert all(r.neighbours == () and len(r.probes["locality"]) == 1 for r in records)
