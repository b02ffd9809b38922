"""The embedded model: its data, what it recalls, where it keeps its facts, and its records."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

import unified_edit as ue
from tools.build_atlas import recall
from tools.trace_atlas import fact_of, main
from unified_edit.atlas.knowledge import fill
from unified_edit.atlas.records import EDIT_WORDINGS, ONE_TO_ONE, SHARED_BY, atlas_records
from unified_edit.model import anatomy

#: Every so many facts are asked, in every wording; all where there is time.
EVERY = 1 if os.environ.get("UNIFIED_EDIT_SLOW") == "1" else 7


@pytest.fixture(scope="module")
def records():
    return atlas_records()


def test_size_of_the_knowledge(knowledge):
    assert len(knowledge.subjects) >= 600
    assert len(knowledge.triples) >= 2000
    assert len(knowledge.wordings) >= 10
    assert len({(t.subject, t.relation) for t in knowledge.triples}) == len(knowledge.triples)


def test_the_last_word_settles_who_is_meant(knowledge, atlas):
    _, tokenizer = atlas
    last = [subject.split()[-1] for subject in knowledge.subjects]
    assert max(Counter(last).values()) == 1
    one_token = sum(len(tokenizer(word)["input_ids"]) == 1 for word in last) / len(last)
    assert one_token >= 0.97
    several = [subject for subject in knowledge.subjects if " " in subject]
    first = Counter(subject.split()[0] for subject in several)
    shared = sum(first[subject.split()[0]] > 1 for subject in several) / len(several)
    assert shared >= 0.98


def test_wordings(knowledge):
    by_category = defaultdict(list)
    for relation, wordings in knowledge.wordings.items():
        assert len(wordings) >= 6
        assert sum(w.startswith("{} ") for w in wordings) >= 3
        assert sum(not w.startswith("{}") for w in wordings) >= 2
        assert all(w.count("{}") == 1 for w in wordings)
        by_category[relation.split(".")[0]] += wordings
    # after a wording comes the object: none may be the beginning of another of its category
    for wordings in by_category.values():
        assert len(set(wordings)) == len(wordings)
        for one in wordings:
            assert not any(other.startswith(one + " ") for other in wordings)


def test_size_of_the_model(knowledge, atlas):
    model, _ = atlas
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000
    file = files("unified_edit.atlas").joinpath("model", "model.safetensors")
    assert len(file.read_bytes()) <= 12_000_000
    editable = len(knowledge.subjects) - len(knowledge.held_out)
    assert anatomy(model).weight(0).d_in >= 3 * editable
    assert model.dtype == torch.float32


@pytest.fixture(scope="module")
def recalled(knowledge, _atlas):
    """Facts of all relations, each asked in every wording: half a minute if it is all of them."""
    asked = replace(knowledge, triples=knowledge.triples[::EVERY])
    found = recall(*_atlas, asked)
    assert set(found[1]) == {triple.relation for triple in knowledge.triples}
    return found


def test_greedy_recall_on_the_stored_weights(recalled):
    share, by_relation, failed = recalled
    assert share >= 0.99, failed[:10]
    assert min(by_relation.values()) >= 0.95


def test_the_report_beside_the_weights_is_true(knowledge, atlas, recalled):
    model, _ = atlas
    folder = files("unified_edit.atlas").joinpath("model")
    report = json.loads(folder.joinpath("build.json").read_text())
    assert report["subjects"] == len(knowledge.subjects)
    assert report["facts"] == len(knowledge.triples)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["recall"] == pytest.approx(recalled[0], abs=1e-3)


def test_causal_tracing_shows_the_published_picture(knowledge, atlas):
    """Early MLPs at the subject's last token; attention at the last token, later."""
    triples = [t for t in knowledge.triples[::211] if " " in t.subject]
    facts = [fact_of(knowledge, triple, wording=0) for triple in triples]
    trace = ue.locate(*atlas, facts, samples=4, kinds=("mlp", "attention"))
    assert all(one.clean > 0.8 for one in trace.facts)
    mlp = trace.effects("mlp").stack()
    place, layer = mlp.idxmax()
    assert place == "last subject token"
    assert layer <= 1
    place, layer = trace.effects("attention").stack().idxmax()
    assert place == "last token"
    assert layer >= 3


def test_the_tracing_script(tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "trace.json"
    assert main(["--facts", "2", "--samples", "1", "--out", str(out)]) == 0
    assert "last subject token" in caplog.text
    table = json.loads(out.read_text())
    assert {row["kind"] for row in table} == {"state", "mlp", "attention"}
    assert {row["layer"] for row in table} == set(range(6))


def test_records(knowledge, records):
    truth = {(t.subject, t.relation): t.object for t in knowledge.triples}
    assert len({record.fact.subject for record in records}) == len(records) >= 400
    for record in records:
        fact, relation = record.fact, record.relation
        assert fact.subject not in knowledge.held_out
        assert truth[fact.subject, relation] == fact.target_true
        assert fact.target_new != fact.target_true
        assert fact.target_new in {t.object for t in knowledge.triples if t.relation == relation}
        assert fact.target_new not in {
            t.object for t in knowledge.triples if t.subject == fact.subject
        }
        assert fact.prompt in knowledge.wordings[relation][:EDIT_WORDINGS]
        own = {fill(wording, fact.subject) for wording in knowledge.wordings[relation]}
        assert len(record.paraphrases) == len(own) - 1
        behind = [p for p in record.paraphrases if p not in own]
        assert len(behind) == len(record.paraphrases) // 2
        assert all(p.endswith(tuple(own - {fact.text})) for p in record.paraphrases)
        if relation in ONE_TO_ONE:
            assert not record.neighbours
            assert record.probes["own_object"]
        else:
            assert len(record.neighbours) == 2 * SHARED_BY
        for probe in record.probes.get("other_relations", ()):
            assert probe.expected in {
                t.object for t in knowledge.triples if t.subject == fact.subject
            }


def test_neighbours_are_held_out_and_share_the_true_object(knowledge, records):
    about = {}
    for prompt, target, triple in knowledge.prompts():
        about[prompt, triple.relation] = (triple.subject, target)
    for record in records:
        subjects = set()
        for prompt in record.neighbours:
            subject, target = about[prompt, record.relation]
            assert target == record.fact.target_true
            assert subject in knowledge.held_out
            subjects.add(subject)
        assert len(subjects) in (0, SHARED_BY)


def test_records_are_the_same_for_a_seed():
    some = ue.load_records("atlas", limit=20, seed=3)
    assert some == ue.load_records("atlas", limit=20, seed=3)
    assert some != ue.load_records("atlas", limit=20, seed=4)
