"""Runs: what processes of one folder must not do to each other, and what they may leave out."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, replace

import pytest
import torch
from fixtures_tiny import byte_level_tokenizer

import unified_edit as ue
from unified_edit.command_line import cli
from unified_edit.editing import Editor, editor, load_model
from unified_edit.errors import ModelError, RunFolderError, StatisticsError
from unified_edit.measuring import Report
from unified_edit.model import tensor_files
from unified_edit.running import RunFolder, Settings, work, workers
from unified_edit.running.finishing import own_answers
from unified_edit.running.shares import StatisticsStage

FACTS = [
    ue.Fact("{} is in the city of", "The tower", "Rome", "Paris"),
    ue.Fact("{} is in the city of", "The museum", "Oslo", "Rome"),
]
RECORDS = [ue.Record(fact, (f"I saw {fact.subject} and it stands in",)) for fact in FACTS]
METHOD = ue.MEMIT.replace(
    layers=(0, 1), ridge=1.0, steps=2, contexts=ue.Contexts(starts=("The",), lengths=(3,))
)


@pytest.fixture(scope="module")
def place(model_folder):
    """A folder with a model and its statistics."""
    return model_folder


def given(place, folder, **more):
    return {
        "folder": folder, "model": str(place / "model"), "records": RECORDS, "method": METHOD,
        "statistics": str(place / "stats.safetensors"), **more,
    }  # fmt: skip


def sign(folder, name="elsewhere-1", **changes):
    """A sign of a living process, written now; of another machine unless it is said otherwise."""
    one = workers.Sign("elsewhere", 1, 0, 1, "cpu", "another", time.time())
    path = folder / "workers" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(replace(one, **changes))))
    return path


# --- who is who ---------------------------------------------------------------------------------


def test_a_process_of_another_machine_with_the_same_number_is_another_one(place, tmp_path):
    ue.run(**given(place, tmp_path), gather=False)
    digest = RunFolder(tmp_path).config().digest
    ours = sign(tmp_path, "ours", host=socket.gethostname(), pid=os.getpid(), config=digest)
    ue.run(tmp_path, seed=1, accept_changes=True, gather=False)
    ours.unlink()
    sign(tmp_path, pid=os.getpid(), config=RunFolder(tmp_path).config().digest)
    with pytest.raises(RunFolderError, match=f"elsewhere-{os.getpid()} is at work there"):
        ue.run(tmp_path, seed=2, accept_changes=True)


# --- the answers --------------------------------------------------------------------------------


def test_what_was_answered_by_one_that_is_gone_is_gone_on_with(tmp_path):
    sign(tmp_path)
    living = tmp_path / ".edit-elsewhere-1-answers.jsonl"
    gone = tmp_path / ".edit-elsewhere-2-answers.jsonl"
    for path in (living, gone, tmp_path / ".other-elsewhere-2-answers.jsonl"):
        path.write_text(path.name)
    own = own_answers(tmp_path, "edit")
    assert own.read_text() == gone.name and not gone.exists()
    assert living.exists()
    own.unlink()
    assert not own_answers(tmp_path, "edit").exists()


def test_where_there_are_no_locks_answers_are_whole(place, tmp_path, monkeypatch, caplog):
    """Another process is at its answers, and is left to them; one that is gone leaves nothing."""
    wanted = ue.run(**given(place, tmp_path / "alone"))

    def no_locks(_path):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(work, "taken", no_locks)
    folder = tmp_path / "run"
    sign(folder)
    theirs = folder / f".{wanted.edit.id}-elsewhere-1-answers.jsonl"
    theirs.write_text("they are at it")
    found = ue.run(**given(place, folder))
    assert found.finished and "has no locks" in caplog.text
    assert theirs.read_text() == "they are at it"
    assert list(folder.glob(".*")) == [theirs]
    report = Report.read(folder / "answers.jsonl")
    assert report.to_dict() == Report.read(tmp_path / "alone" / "answers.jsonl").to_dict()


def test_answers_about_another_edit_go_with_its_configuration(place, tmp_path):
    ue.run(**given(place, tmp_path))
    (tmp_path / ".edit-elsewhere-1-answers.jsonl").touch()
    ue.run(tmp_path, seed=1, accept_changes=True, gather=False)
    assert list(tmp_path.glob("*answers.jsonl")) == []


# --- statistics ---------------------------------------------------------------------------------


def test_c0_of_a_file_is_read_where_it_is_asked_for(place, tmp_path):
    model, tokenizer = load_model(str(place / "model"))
    told = {name: value for name, value in given(place, "").items() if name != "folder"}
    stage = StatisticsStage(tmp_path, Editor(model, tokenizer), Settings.of(told))
    assert stage.given is not None and stage.given.nbytes == 0
    whole = ue.KeyStatistics.load(place / "stats.safetensors")
    lazily = ue.KeyStatistics.lazily(place / "stats.safetensors")
    for layer in (0, 1):
        assert torch.equal(stage.given.C0(layer), whole.C0(layer))
        # in its own place or in another: the same factor, to the last bit
        assert torch.equal(lazily.metric(layer).factor, whole.metric(layer).factor)
    unread = whole.unread(place / "stats.safetensors")
    assert torch.equal(unread.C0(1), whole.C0(1))
    assert "layers [0, 1] now" in str(refused(lambda: unread.moments[0].func(
        place / "stats.safetensors", 5)))  # fmt: skip


def test_one_matrix_of_a_file_is_read_and_no_other(place, tmp_path, monkeypatch):
    """Six layers of GPT-J take 12 GiB: each is hashed where it lies, and again when it is read."""
    path = tmp_path / "stats.safetensors"
    whole = ue.KeyStatistics.load(place / "stats.safetensors")
    whole.save(path)
    lazily, hashed = ue.KeyStatistics.lazily(path), []
    usual = tensor_files.tensor_hash
    monkeypatch.setattr(
        tensor_files, "tensor_hash", lambda one: hashed.append(one.shape) or usual(one)
    )
    assert torch.equal(lazily.C0(1), whole.C0(1))
    assert hashed == [whole.C0(1).shape]
    # written over meanwhile: what is read would be another matrix
    replace(whole, moments={0: whole.C0(1), 1: whole.C0(0)}).save(path)
    told = refused(lambda: lazily.C0(0))
    assert "C0.0" in str(told) and "replaced or changed" in str(told)
    path.unlink()
    assert "no such file" in str(refused(lambda: lazily.C0(1)))


def refused(do):
    with pytest.raises(StatisticsError) as refusal:
        do()
    return refusal.value


def test_a_share_is_named_by_all_that_it_depends_on(place, tmp_path, tiny_texts):
    """Texts that differ behind their first MiB, and tokenizers, make other shares."""
    model, tokenizer = load_model(str(place / "model"))
    other = byte_level_tokenizer(tiny_texts, 300)
    path = tmp_path / "texts.txt"
    told = {"model": "m", "facts": FACTS, "method": METHOD, "texts": [path], "tokens": 100}

    def names(end, tokenizer):
        path.write_text("a tower in Rome\n" * 2**17 + end)
        stage = StatisticsStage(tmp_path, Editor(model, tokenizer), Settings.of(told))
        return {name for piece in stage.pieces for name in piece.files}

    first = names("one", tokenizer)
    assert names("one", tokenizer) == first
    assert first.isdisjoint(names("two", tokenizer))
    assert first.isdisjoint(names("one", other))


@pytest.mark.parametrize(
    ("more", "options", "told"),
    [
        ({"split": "lines"}, ["--split", "lines"], "split='lines' is of use with"),
        ({"dataset_config": "en"}, ["--config", "en"], "the configuration 'en' is of use with"),
    ],
)
def test_what_belongs_to_nothing_is_refused(place, tmp_path, capsys, more, options, told):
    with pytest.raises(StatisticsError, match=told):
        ue.run(tmp_path / "run", model=str(place / "model"), facts=FACTS, **more)
    lines = [json.dumps(asdict(fact)) for fact in FACTS]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    command = ["run", str(tmp_path / "run"), "--facts", str(tmp_path / "facts.jsonl")]
    assert cli.main([*command, "--model", str(place / "model"), *options]) == 1
    assert told in capsys.readouterr().err


# --- what is told, and what is left out ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ([], {}),
        (["--no-cache"], {"cache": False}),
        (["--cache", "--allow-bin"], {"cache": True, "allow_bin": True}),
    ],
)
def test_all_that_is_said_of_loading_is_passed_on(tmp_path, monkeypatch, options, more):
    asked = []

    def run(_folder, **told):
        asked.append(told["model"])
        raise ModelError("enough")

    monkeypatch.setattr("unified_edit.command_line.running.run", run)
    assert cli.main(["run", str(tmp_path), "--model", "m", *options]) == 1
    assert asked == [{"name": "m", **more}]


def test_prefixes_are_sampled_for_a_new_configuration_only(place, tmp_path, monkeypatch):
    plain, calls = editor.sample_prefixes, []

    def sample(*arguments):
        calls.append(arguments[3])
        return plain(*arguments)

    monkeypatch.setattr(editor, "sample_prefixes", sample)
    ue.run(**given(place, tmp_path), gather=False)
    ue.run(tmp_path, gather=False)
    ue.run(tmp_path, piece=1, accept_changes=True, gather=False)
    assert calls == [0]
    before = RunFolder(tmp_path).config().made_of["prefixes"]
    ue.run(tmp_path, seed=1, accept_changes=True, gather=False)
    assert calls == [0, 1]
    assert RunFolder(tmp_path).config().made_of["prefixes"] != before
