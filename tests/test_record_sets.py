"""Records by the name of a data set."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import unified_edit as ue
from unified_edit.atlas.records import atlas_records
from unified_edit.errors import FactError, FactFileError
from unified_edit.facts.facts import Fact
from unified_edit.measuring.record_sets import load_records


def message(kind: type[Exception], action, *parts: str) -> str:
    """The text of the error that `action` raises, which must hold all `parts`."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    return text


def counterfact(case_id: int = 0) -> dict[str, object]:
    rewrite = {
        "prompt": "{} is in", "subject": "Angola", "relation_id": "P30",
        "target_new": {"str": "Asia", "id": "Q48"}, "target_true": {"str": "Africa", "id": "Q15"},
    }  # fmt: skip
    return {"case_id": case_id, "requested_rewrite": rewrite, "neighborhood_prompts": ["Ghana is"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "thirty.jsonl"
    path.write_text("\n".join(json.dumps(counterfact(n)) for n in range(30)), "utf-8")
    return path


def ids(source: object, **options: object) -> list[object]:
    return [record.case_id for record in load_records(source, **options)]  # type: ignore[arg-type]


def test_a_limit_and_a_seed(path: Path) -> None:
    assert ids(path) == list(range(30))
    assert ids(path, seed=0) == list(range(30))
    assert ids(path, limit=4) == [0, 1, 2, 3]
    assert ids(path, limit=99, seed=0) == list(range(30))
    sample = ids(path, limit=10, seed=0)
    assert len(set(sample)) == 10
    assert sample == ids(path, limit=10, seed=0)
    assert sample not in (ids(path, limit=10, seed=1), ids(path, limit=10))
    for kind in (np.int64, np.uint8, np.array, torch.tensor):
        assert sample == ids(path, limit=kind(10), seed=kind(0))


@pytest.mark.parametrize("limit", [0, -1, True, np.True_, 2.0, "2", [2], np.array([1, 2])])
def test_a_limit_that_is_none(path: Path, limit: object) -> None:
    message(
        FactError, lambda: ids(path, limit=limit),
        "limit is ", "a whole number of at least 1", "Leave it out for all",
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0.5, "0", True, [], torch.tensor(1.5)])
def test_a_seed_that_is_none(path: Path, seed: object) -> None:
    message(FactError, lambda: ids(path, limit=2, seed=seed), "seed is ", "a whole number")


def test_an_unknown_name(tmp_path: Path) -> None:
    message(
        FactFileError, lambda: load_records("CounterFacts"),
        "'CounterFacts' is neither a data set's name nor a file", "Did you mean 'counterfact'?",
        "'atlas'", "'zsre'",
    )  # fmt: skip
    message(FactFileError, lambda: load_records(tmp_path / "atlas"), "nor a file")  # a path is one
    message(FactFileError, lambda: load_records(tmp_path), "cannot be read")
    message(FactFileError, lambda: load_records("x" * 5000), "cannot be read")


@pytest.mark.parametrize("source", [None, 5, ["atlas"], {}, "", b"atlas"])
def test_what_is_no_name_and_no_path(source: object) -> None:
    message(FactFileError, lambda: load_records(source), f"name_or_path is {source!r}")  # type: ignore[arg-type]


def test_a_path_in_the_home_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("USERPROFILE", str(path.parent))
    assert ids("~/thirty.jsonl") == ids(Path("~/thirty.jsonl")) == list(range(30))
    message(FactFileError, lambda: load_records("~/none.jsonl"), "'~/none.jsonl' is neither")


def test_a_faulty_file_is_named_and_not_taken_for_a_missing_one(path: Path) -> None:
    path.write_text('{"prompt": "a"}')
    message(FactFileError, lambda: load_records(path), f"{path}, line 1", "'subject' is missing")
    bad = counterfact(5)
    bad["requested_rewrite"]["target_new"]["str"] = ""  # type: ignore[index]
    path.write_text(json.dumps([counterfact(4), bad]))
    message(FactFileError, lambda: load_records(path), "record 5", "skip_bad=True")
    assert ids(path, skip_bad=True) == [4]


def test_atlas() -> None:
    records = list(atlas_records())
    assert ue.load_records("atlas") == records
    some = load_records("atlas", limit=5, seed=0)
    assert len(some) == 5
    assert all(record in records for record in some)
    some.clear()  # what is handed out belongs to the caller
    load_records("atlas").clear()
    assert load_records("atlas") == records


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_counterfact_from_the_hub(datasets: types.ModuleType) -> None:
    asked = []

    def load_dataset(name: str) -> dict[str, list[dict[str, object]]]:
        asked.append(name)
        return {"train": [counterfact(2), counterfact(0)], "test": [counterfact(1)]}

    datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
    assert ids("counterfact") == [0, 1, 2]
    assert ids("counterfact", limit=1) == [0]
    assert asked == ["azhx/counterfact"] * 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            ConnectionError("no route to the Hub."),
            "ConnectionError, no route to the Hub. Check the",
        ),
        ({"train": [{"prompt": "x"}]}, "KeyError, 'case_id'. Check the network"),
        (None, "AttributeError"),
    ],
)
def test_counterfact_cannot_be_had(datasets: types.ModuleType, answer: object, said: str) -> None:
    def load_dataset(name: str) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
    message(
        FactFileError, lambda: load_records("counterfact"),
        "'counterfact' could not be loaded", "azhx/counterfact", said, "counterfact.json", "path",
    )  # fmt: skip


def test_counterfact_of_another_shape_names_the_row(datasets: types.ModuleType) -> None:
    rows = [counterfact(0), {"case_id": 1, "requested_rewrite": "x"}]
    datasets.load_dataset = lambda name: {"train": rows}  # type: ignore[attr-defined]
    message(FactFileError, lambda: load_records("counterfact"), "azhx/counterfact, row 2: field")


def test_counterfact_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message(
        FactFileError, lambda: load_records("counterfact"),
        "datasets, which is not installed", "unified_edit[hub]", "counterfact.json",
    )  # fmt: skip


def test_zsre_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    item = {
        "subject": "Aspi", "prompt": "Which family does Aspi belong to?", "target_new": "Moth",
        "ground_truth": ["Ammonite"], "rephrase_prompt": "What family are Aspi?", "locality": {},
    }  # fmt: skip
    path.write_text(json.dumps([item]), "utf-8")

    def download(repo: str, name: str, *, repo_type: str) -> str:
        assert (repo, repo_type) == ("zjunlp/KnowEdit", "dataset")
        if not path.exists():
            raise OSError("offline")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (record,) = load_records("zsre")
    assert record.fact == Fact("Which family does {} belong to?", "Aspi", "Moth", "Ammonite")
    path.unlink()
    message(
        FactFileError, lambda: load_records("zsre"),
        "zjunlp/KnowEdit", "OSError, offline", "zsre_mend_eval.json", "path",
    )  # fmt: skip
