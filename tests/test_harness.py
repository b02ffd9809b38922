"""Scores of the lm-evaluation-harness, of a local task, against our own forwards."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_refusals import ONE, TOWER, VIENNA, refused
from fixtures_tiny import assert_unchanged, snapshot

import unified_edit as ue
from unified_edit.errors import MethodError
from unified_edit.measuring import harness

#: Prompt, choices, number of the one that counts as right. The edit takes the model from the first
#: and the last, brings it to the second, and leaves it its third.
QUESTIONS = [
    (TOWER.text, ["Athens", "Rome"], 0),
    (VIENNA.text, ["Lisbon", "Madrid"], 1),
    ("The museum is in the city of", ["Vienna", "Athens"], 0),
    (VIENNA.text, ["Oslo", "Madrid"], 0),
]
TASK = """task: places
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with one task of the harness, and its data beside it."""
    place: Path = tmp_path_factory.mktemp("tasks")
    data = place / "questions.jsonl"
    rows = [dict(zip(("prompt", "choices", "label"), row, strict=True)) for row in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = TASK.format(data=data.as_posix(), cache=(place / "cache").as_posix())
    (place / "places.yaml").write_text(text, encoding="utf-8")
    return place


@torch.no_grad()
def literal(model: Any, tokenizer: Any) -> list[float]:
    """1 for each question whose right choice is the likelier one, token by token."""
    model, found = copy.deepcopy(model).eval(), []  # the fixture is in training mode
    for prompt, choices, right in QUESTIONS:
        begun = tokenizer(prompt)["input_ids"]
        sums = []
        for choice in choices:
            tokens = tokenizer(f"{prompt} {choice}")["input_ids"]
            logp = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            places = range(len(begun), len(tokens))
            sums.append(sum(float(logp[at - 1, tokens[at]]) for at in places))
        found.append(float(sums.index(max(sums)) == right))
    return found


def test_base_and_edited_model_are_asked_the_same(
    tiny, tiny_tokenizer, tiny_statistics, folder
) -> None:
    base = literal(tiny, tiny_tokenizer)
    before = harness.harness_scores(tiny, tiny_tokenizer, "places", folder=folder, batch_size=3)
    assert list(before.columns) == harness.COLUMNS and len(before) == 1
    row = before.iloc[0]
    assert (row.task, row.metric, row.questions) == ("places", "acc", 4)
    assert row.base == np.mean(base)
    assert row.base_stderr == pytest.approx(np.std(base, ddof=1) / 2)
    assert np.isnan([row.edited, row.edited_stderr, row.change, row.change_stderr]).all()

    facts = [TOWER, VIENNA]
    edit = ue.edit(tiny, tiny_tokenizer, facts, ONE, statistics=tiny_statistics)
    edited = literal(tiny, tiny_tokenizer)
    assert (base, edited) == ([1, 0, 1, 1], [0, 1, 1, 0]), "or the test below says nothing"
    random.seed(7)  # the harness seeds with something else
    np.random.seed(7)
    weights, states = snapshot(tiny), (random.getstate(), np.random.get_state()[1].tolist())
    torch_state = torch.random.get_rng_state()
    after = ue.harness_scores(tiny, tiny_tokenizer, ["places"], folder=folder).iloc[0]
    assert_unchanged(tiny, weights)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert ue.Editor(tiny, tiny_tokenizer).active == (edit,)
    assert (after.base, after.edited) == (np.mean(base), np.mean(edited))
    change = np.subtract(edited, base)
    assert after.change == pytest.approx(change.mean())
    assert after.change_stderr == pytest.approx(np.std(change, ddof=1) / 2)


def test_the_generators_of_all_cards_go_on_as_before(monkeypatch):
    """A model may stand on several, and to seed torch is to seed all of them."""
    states = {0: "first", 1: "second"}
    for name, gives in (
        ("is_initialized", lambda: True), ("device_count", lambda: 2),
        ("get_rng_state", states.get),
        ("set_rng_state", lambda state, card: states.update({card: state})),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, gives)
    with harness.own_randomness():
        states.update({0: "seeded", 1: "seeded"})
    assert states == {0: "first", 1: "second"}


def test_a_tokenizer_without_padding_stays_without(tiny, tiny_texts, folder) -> None:
    from fixtures_tiny import byte_level_tokenizer

    tokenizer = byte_level_tokenizer(tiny_texts)
    found = ue.harness_scores(tiny, tokenizer, "places", folder=folder, limit=3)
    assert tokenizer.pad_token is None and list(found.questions) == [3]


# --- tables -----------------------------------------------------------------------------------


def run(values: list[Any], score: float, error: Any = 0.1) -> dict[str, Any]:
    """What the harness gives for one task with two filters, and for its group."""
    samples = [
        {"doc_id": number, "filter": name, "exact": value}
        for name in ("strict", "none")
        for number, value in reversed(list(enumerate(values)))
    ]
    scores = {"alias": "t", "sample_len": 3}
    scores |= {"exact,strict": score, "exact_stderr,strict": error, "exact,none": 0.5}
    return {
        "results": {"t": scores, "g": {"alias": "g", "exact,none": score}},
        "samples": {"t": samples},
        "n-samples": {"t": {"original": 9, "effective": 3}},
    }


def test_changes_are_paired_by_question_and_filter() -> None:
    table = harness.table_of(run([1, 0, 1], 2 / 3), run([0, 0, True], 1 / 3, "N/A"))
    strict, plain, group = (row for _, row in table.iterrows())
    assert (strict.metric, plain.metric, group.metric) == ("exact,strict", "exact", "exact")
    assert strict.change == pytest.approx(-1 / 3)
    assert strict.change_stderr == pytest.approx(np.std([-1, 0, 0], ddof=1) / math.sqrt(3))
    assert strict.base_stderr == 0.1 and math.isnan(strict.edited_stderr)
    # what is no mean over questions has no error of this kind, and a group has no questions
    assert math.isnan(plain.change_stderr) and math.isnan(group.change_stderr)
    assert group.change == pytest.approx(-1 / 3) and math.isnan(group.questions)
    words = run([(1.0, 2), (0.5, 3), (0.1, 4)], 7.0)  # of a perplexity
    assert harness.table_of(words, words).change_stderr.isna().all()


# --- what is refused ----------------------------------------------------------------------------


def test_without_the_package(tiny, tiny_tokenizer, folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refused(tiny, MethodError, "lm-eval", "pip install 'unified_edit[harness]'"):
        ue.harness_scores(tiny, tiny_tokenizer, "places", folder=folder)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tasks": []}, ["tasks is empty"]),
        ({"limit": 0}, ["limit is 0"]),
        ({"batch_size": True}, ["batch_size is True"]),
        ({"folder": "there/is/none"}, ["there/is/none", "no folder"]),
    ],
)
def test_bad_arguments(tiny, tiny_tokenizer, folder, given, words) -> None:
    given = {"tasks": "places", "folder": folder, **given}
    with refused(tiny, MethodError, *words):
        ue.harness_scores(tiny, tiny_tokenizer, **given)


def test_an_unknown_task_is_named(folder) -> None:
    class Manager:
        def __init__(self, include_path=None, include_defaults=True):
            self.given = include_path, include_defaults
            self.all_tasks = ["places", *(["lambada_openai", "piqa"] if include_defaults else [])]

    found = harness.manager_of(Manager, ["places"], folder)
    assert found.given == (str(folder), False), "the harness's own are not read for nothing"
    assert harness.manager_of(Manager, ["places", "piqa"], folder).given == (str(folder), True)
    assert harness.manager_of(Manager, ["piqa"], None).given == (None, True)
    with pytest.raises(MethodError, match="no task 'lambada_open'; did you mean 'lambada_openai'"):
        harness.manager_of(Manager, ["piqa", "lambada_open"], folder)
    with pytest.raises(MethodError, match=r"no task 'x'\. `lm-eval ls tasks`"):
        harness.manager_of(Manager, ["x"], None)


def test_a_failure_leaves_the_edits_in_force(
    tiny, tiny_tokenizer, tiny_statistics, folder, monkeypatch
) -> None:
    edit = ue.edit(tiny, tiny_tokenizer, TOWER, ONE, statistics=tiny_statistics)
    parts = harness.installed()
    monkeypatch.setattr(harness, "installed", lambda: (_failing, *parts[1:]))
    with refused(tiny, RuntimeError, "no data"):
        ue.harness_scores(tiny, tiny_tokenizer, "places", folder=folder)
    assert edit.is_applied


def _failing(**given: Any) -> None:
    raise RuntimeError("no data")
