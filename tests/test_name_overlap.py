"""The experiment behind the chapter *storage*: its pure parts, and its results."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from checkout import ROOT, load

import unified_edit as ue
from unified_edit.measuring import Trace, TracedFact
from unified_edit.measuring.traces import PLACES

overlap = load(ROOT / "benchmarks" / "name_overlap.py")
DATA = ROOT / "book" / "data" / "name_overlap.json"


# --- names and texts ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", overlap.OVERLAPS)
def test_names_overlap_as_they_are_said_to(names: str) -> None:
    people = overlap.make_people(names, 300, 0)
    assert len({person.name for person in people}) == 300
    assert set(Counter(person.first for person in people).values()) == {overlap.SHARE_FIRST}
    shared = 1 if names == "unique_last" else overlap.SHARE_LAST
    assert set(Counter(person.last for person in people).values()) == {shared}
    assert not {person.first for person in people} & {person.last for person in people}


def test_only_the_last_words_differ_between_the_names() -> None:
    unique, shared = (overlap.make_people(names, 300, 0) for names in overlap.OVERLAPS)
    for one, other in zip(unique, shared, strict=True):
        assert one.objects == other.objects
        assert one.first == other.first
    assert unique != overlap.make_people("unique_last", 300, 1)
    with pytest.raises(ValueError, match="multiple of 150, not 100"):
        overlap.make_people("shared_both", 100, 0)


def test_objects_tell_nothing_of_the_names() -> None:
    """A word of a name does not settle an object: fifteen people share a first word."""
    people = overlap.make_people("shared_both", 300, 0)
    for word in {person.first for person in people} | {person.last for person in people}:
        bearers = [person for person in people if word in (person.first, person.last)]
        for relation in overlap.OBJECTS:
            objects = Counter(person.objects[relation] for person in bearers)
            assert max(objects.values()) <= len(bearers) / 2


@pytest.mark.parametrize("names", overlap.OVERLAPS)
def test_every_word_is_one_token(names: str) -> None:
    people = overlap.make_people(names, 300, 0)
    tokenizer = overlap.make_tokenizer(people)
    for texts in overlap.TEXTS:
        for text in islice(overlap.documents(people, texts, 1), 200):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    for person in people:
        assert len(tokenizer(person.name)["input_ids"]) == 2
    for objects in overlap.OBJECTS.values():
        assert len(objects) == len(set(objects)) == 24
        assert all(len(tokenizer(word)["input_ids"]) == 1 for word in objects)
    for start in ue.EMMET.contexts.starts:
        assert tokenizer.unk_token_id not in tokenizer(start)["input_ids"]


@pytest.mark.parametrize("texts", overlap.TEXTS)
def test_texts_name_as_many_people_as_they_are_said_to(texts: str) -> None:
    people = overlap.make_people("unique_last", 300, 0)
    names = {person.name: person for person in people}
    pattern = re.compile("|".join(names))
    counts, companions = Counter[int](), 0
    for text in islice(overlap.documents(people, texts, 1), 300):
        named = set(pattern.findall(text))
        counts[len(named)] += 1
        companions += text.count("says that") + text.count("a friend of")
        stated = 0
        for words in text.split(" . "):
            for relation, objects in overlap.OBJECTS.items():
                if words.removesuffix(" .").split()[-1] in objects:
                    stated += 1
                    assert any(
                        words.removesuffix(" .").endswith(names[name].objects[relation])
                        for name in pattern.findall(words)
                    )
        assert stated == 4
    assert set(counts) <= ({1, 2} if texts == "two_people" else {1})
    if texts == "two_people":
        assert counts[2] > 290
    # half of 1,200 statements have a companion, or none
    assert 500 < companions < 700 if texts != "one_person_plain" else companions == 0


@pytest.mark.parametrize("texts", overlap.TEXTS)
def test_texts_of_both_sorts_of_names_are_the_same_but_for_the_last_words(texts: str) -> None:
    unique, shared = (overlap.make_people(names, 300, 0) for names in overlap.OVERLAPS)
    last = {one.last: other.last for one, other in zip(unique, shared, strict=True)}
    pairs = zip(*(overlap.documents(people, texts, 1) for people in (unique, shared)), strict=True)
    for text, other in islice(pairs, 200):
        assert " ".join(last.get(word, word) for word in text.split(" ")) == other


def test_a_companion_is_told_from_the_subject() -> None:
    """The fact of a sentence is the subject's, wherever the companion stands."""
    people = overlap.make_people("unique_last", 300, 0)
    one, two = people[:2]
    seen = set()
    for seed in range(40):
        text = overlap.sentence(one, "town", two.name, random.Random(seed))
        assert text.endswith(f" {one.objects['town']} .")
        seen.add((two.name in text, text.startswith(two.name)))
    assert seen == {(False, False), (True, True), (True, False)}


def test_rows_are_cut_and_padding_is_no_target() -> None:
    people = overlap.make_people("unique_last", 300, 0)
    tokenizer = overlap.make_tokenizer(people)
    texts = iter(["The doctor", " ".join(["the"] * 20)])
    ((ids, targets),) = islice(overlap.batches(tokenizer, texts, 2, 6), 1)
    the, doctor = (tokenizer(word)["input_ids"][0] for word in ("The", "doctor"))
    end = tokenizer.eos_token_id
    assert ids[0].tolist() == [the, doctor, end, end, end, end]
    assert targets[0].tolist() == [doctor, end, -100, -100, -100, -100]
    assert len(set(ids[1].tolist() + targets[1].tolist())) == 1


def test_records_ask_about_others_with_the_same_object() -> None:
    people = overlap.make_people("shared_both", 300, 0)
    by_name = {person.name: person for person in people}
    records = overlap.records_of(people, 30, 0)
    assert len({record.fact.subject for record in records}) == 30
    for record in records:
        fact = record.fact
        assert by_name[fact.subject].objects[record.relation] == fact.target_true
        assert fact.target_new in overlap.OBJECTS[record.relation]
        assert fact.target_new != fact.target_true
        assert len(set(record.paraphrases) - {fact.text}) == 2
        for prompt in record.neighbours:
            (name,) = [name for name in by_name if name in prompt]
            assert name != fact.subject
            assert by_name[name].objects[record.relation] == fact.target_true


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [overlap.rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[499] == 2.0
    assert 0 < rates[999] < 0.01


# --- summary of a trace ---------------------------------------------------------------------------


def traced(object_: str, mlp: torch.Tensor) -> TracedFact:
    """A fact of five tokens, the second and third its subject, with these restored runs."""
    fact = ue.Fact("the {} is called", "Ab Cd", "x", object_)
    corrupted = torch.tensor([0.1, 0.3]).double()
    return TracedFact(
        fact, object_, ("the", "Ab", "Cd", "is", "called"), (1, 2), 0.9, corrupted,
        {"mlp": corrupted[:, None, None] + mlp}, torch.zeros(2, 2, 4).double(),
    )  # fmt: skip


def test_the_summary_holds_means_by_place() -> None:
    one, two = torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    one[2, 0], two[2, 0], one[4, 1] = 0.6, 0.2, 0.5
    trace = Trace((traced("a", one), traced("b", two)), ("mlp",), 1, 3.0, 2, 0, 1.0)
    found = overlap.summary(trace)
    assert (found["facts"], found["clean"], found["corrupted"]) == (2, 0.9, 0.2)
    effects = found["effects"]["mlp"]
    assert set(effects) <= set(PLACES)
    assert "further tokens" not in effects  # no fact has any
    assert effects["last subject token"]["value"] == [0.4, 0.0, 0.0]
    assert effects["last subject token"]["low"] == [0.2, 0.0, 0.0]
    assert effects["last subject token"]["high"] == [0.6, 0.0, 0.0]
    assert effects["last token"]["value"] == [0.0, 0.25, 0.0]
    assert effects["last token"]["n"] == 2
    assert overlap.strongest(effects) == ("last subject token", 0)
    assert json.loads(json.dumps(found)) == found


# --- the committed results ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def cells(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["overlap"], cell["texts"]): cell for cell in results["cells"]}


def mlp_at(cell: dict[str, Any], place: str) -> float:
    """What all MLPs of a token give back together."""
    value: float = cell["all_layers_together"]["mlp"][place][0]
    return value


def test_results_say_how_they_were_made(results: dict[str, Any]) -> None:
    assert results["command"].startswith("python benchmarks/name_overlap.py --out book/data/")
    assert results["seed"] == 0
    assert {"python", "torch", "transformers", "unified_edit"} <= set(results["versions"])
    assert [(c["overlap"], c["texts"], c["steps"]) for c in results["cells"]] == [
        (*cell, steps) for cell, steps in overlap.STEPS.items()
    ]
    same = ("people", "seed", "rate", "layers", "width", "rows", "row_tokens", "bf16")
    assert len({tuple(cell[name] for name in same) for cell in results["cells"]}) == 1
    for cell in results["cells"]:
        assert cell["trace"]["facts"] == 40
        assert [line["layer"] for line in cell["edits"]] == [0, 1, 2]


def test_every_network_that_is_compared_knows_its_facts(cells: dict[Any, Any]) -> None:
    known = {key for key, cell in cells.items() if cell["recall"] >= 0.98}
    assert known == set(cells) - {("shared_both", "two_people")}
    assert 0.5 < cells["shared_both", "two_people"]["recall"] < 0.6


def test_with_unique_last_words_the_fact_is_at_the_subject(cells: dict[Any, Any]) -> None:
    for (names, _), cell in cells.items():
        if names == "unique_last":
            effects = cell["trace"]["effects"]["mlp"]
            assert overlap.strongest(effects) == ("last subject token", 0)
            # no fact of another place comes near: the intervals over facts do not overlap
            low = effects["last subject token"]["low"][0]
            assert low > max(effects["first subject token"]["high"])
            assert cell["edits"][0]["ES"][0] > 0.75
            assert cell["edits"][0]["PS"][0] > 0.6


def test_with_shared_last_words_it_is_not_and_the_edit_fails(cells: dict[Any, Any]) -> None:
    unique, shared = cells["unique_last", "one_person"], cells["shared_both", "one_person"]
    assert unique["steps"] == shared["steps"]
    assert mlp_at(shared, "last subject token") < 0.1 < 0.5 < mlp_at(shared, "last token")
    assert mlp_at(unique, "last subject token") > 2 * mlp_at(shared, "last subject token")
    for line, other in zip(shared["edits"], unique["edits"], strict=True):
        assert line["ES"][0] < 0.5
        assert line["PS"][0] <= 0.05
        assert line["ES"][0] < other["ES"][0]
        assert line["PS"][0] < other["PS"][0]
    # at layer 0 the intervals over facts are far apart
    assert shared["edits"][0]["PS"][2] < unique["edits"][0]["PS"][1]


def test_texts_shift_weight_between_the_subject_and_the_end(cells: dict[Any, Any]) -> None:
    plain, one, two = (cells["unique_last", texts] for texts in overlap.TEXTS)
    assert mlp_at(plain, "last subject token") > mlp_at(plain, "last token")
    assert mlp_at(one, "last subject token") < mlp_at(one, "last token")
    assert mlp_at(two, "last subject token") > mlp_at(two, "last token")
    ends = [c["trace"]["effects"]["mlp"]["last token"]["value"][0] for c in (two, one, plain)]
    assert ends == sorted(ends)
    assert ends[0] < 0.05 < 0.1 < ends[1]
    best = max((plain, one, two), key=lambda cell: cell["edits"][0]["PS"][0])
    assert best is not max((plain, one, two), key=lambda c: mlp_at(c, "last subject token"))
