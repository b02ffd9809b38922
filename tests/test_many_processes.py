"""Runs by many processes: what is shared, what a death costs, and that all bits are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_tiny import byte_level_tokenizer

import unified_edit as ue
from unified_edit.command_line import cli
from unified_edit.editing import Editor, Values, load_model, optimise_values
from unified_edit.errors import (
    EditFileError,
    FactError,
    MethodError,
    ModelError,
    RunFolderError,
    TokenizationError,
)
from unified_edit.model import tensor_files
from unified_edit.running import RunFolder, Share, workers
from unified_edit.running.pieces import ValueStage
from unified_edit.running.status import duration, time_left

#: Words of the tiny tokenizer; nine facts are five pieces of two.
SUBJECTS = ("tower", "museum", "river", "harbour", "garden", "palace", "bridge", "market", "city")
TARGETS = ("Rome", "Paris", "Oslo", "Vienna", "Madrid", "Lisbon", "Dublin", "Athens", "Rome")
FACTS = [
    ue.Fact("{} is in the city of", f"The {subject}", target)
    for subject, target in zip(SUBJECTS, TARGETS, strict=True)
]
METHOD = ue.MEMIT.replace(
    layers=(0, 1),
    ridge=1.0,
    steps=4,
    clamp=1.2,
    contexts=ue.Contexts(starts=("The",), lengths=(3,)),
)
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = str(ROOT / "tests" / "forked_runs.py")
#: Fewer than what each of two processes takes to do its half of the run.
STEPS = 70
#: One thread: a sum over two is another one in its last bits.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "UNIFIED_EDIT_PROGRESS": "0",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def place(model_folder, tiny_texts):
    """A folder with a model, its statistics, and texts for three shares."""
    (model_folder / "texts.txt").write_text("\n".join(tiny_texts * 4), encoding="utf-8")
    return model_folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def given(place, folder, **more):
    """What `run` is told."""
    settings = {"model": str(place / "model"), "facts": FACTS, "method": METHOD, "piece": 2}
    if "texts" not in more:
        settings["statistics"] = str(place / "stats.safetensors")
    return {"folder": folder, **settings, **more}


@pytest.fixture(scope="module")
def alone(place):
    """The run of one process."""
    torch.set_num_threads(1)
    return ue.run(**given(place, place / "alone"))


def as_json(told: dict[str, Any], place: Path) -> dict[str, Any]:
    """The same for another process: facts are in a file."""
    file = place / "facts.jsonl"
    if not file.exists():
        shutil.copy(place / "alone" / "facts.jsonl", file)
    method = told["method"].to_dict()
    return {**told, "folder": str(told["folder"]), "facts": str(file), "method": method}


def kept(folder, kind="values"):
    """The finished files and what is in them."""
    return {path.name: path.read_bytes() for path in (folder / "pieces" / kind).glob("[!.]*")}


def half_written(folder):
    return list((folder / "pieces").rglob(".*"))


def signs(folder):
    """What each process said of itself last, in the order in which they began."""
    each = (json.loads(path.read_text()) for path in (folder / "workers").glob("*.json"))
    return sorted(each, key=lambda one: one["started"])


def same_edit(one, other):
    assert one.id == other.id
    assert one.updates.keys() == other.updates.keys()
    for name, update in one.updates.items():
        assert torch.equal(update.left, other.updates[name].left)
        assert torch.equal(update.right, other.updates[name].right)
    assert one.outcomes == other.outcomes


# --- one process ------------------------------------------------------------------------------


def test_a_run_is_the_edit_of_its_pieces(place, alone):
    model, tokenizer = load_model(str(place / "model"))
    editor = Editor(model, tokenizer)
    each = [editor.optimise_values(FACTS[i : i + 2], METHOD) for i in range(0, len(FACTS), 2)]
    statistics = ue.KeyStatistics.load(place / "stats.safetensors")
    wanted = editor.edit(
        FACTS, METHOD, values=Values.joined(each), statistics=statistics, apply=False
    )
    same_edit(alone.edit, wanted)
    assert alone.finished and alone.missing == () and alone.left == 0
    assert alone.table.to_dict("records")[0] | {"seconds": 0, "a piece": 0} == {
        "what": "values", "pieces": 5, "done": 5, "units": 9, "units done": 9,
        "seconds": 0, "a piece": 0,
    }  # fmt: skip


# --- many -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(place, alone):
    """What became of folders that several processes worked in, by name.

    torchrun: of two processes one is killed in its second piece. Then three go on in a copy, and
    other folders have their own fates. It is one fixture, as an import of torch takes seconds.
    """
    told = as_json(given(place, place / "torchrun"), place)
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*program, PROGRAM, json.dumps({"given": told, "dies": [1, 4]})],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    shutil.copytree(place / "torchrun", place / "copy")
    shares = as_json(of_texts(place, place / "shares"), place)
    moments = sorted(random.Random(0).sample(range(1, STEPS), 3))
    killed = [{"processes": 2, "moment": moment} for moment in moments]
    rounds = [
        {"given": {**told, "folder": str(place / "copy")}, "processes": 3},
        *({"given": {**told, "folder": str(place / "killed")}, **one} for one in killed),
        {"given": {**told, "folder": str(place / "killed")}, "processes": 1},
        {"given": shares, "processes": 2, "dies": [1, 3]},
        {"given": shares, "processes": 1},
    ]
    done = subprocess.run(
        [sys.executable, PROGRAM, json.dumps(rounds)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True, timeout=400,
    )  # fmt: skip
    went_on, *killed, at_last, one_died, summed = json.loads(done.stdout)
    assert went_on and at_last and summed
    assert not one_died
    assert not killed[0]  # the next ones may find less to do than they have steps
    return place


def test_torchrun_ends_all_and_keeps_what_was_finished(many):
    folder = many / "torchrun"
    assert len(kept(folder)) == 6  # of each process a piece of two, and half a piece
    assert len(half_written(folder)) == 2
    state = ue.RunState.read(folder)
    assert [piece.name for piece in state.missing] == ["values 2", "values 4", "values 5"]
    assert not state.finished and not state.alive
    assert {(one.sign.rank, one.sign.processes) for one in state.workers} == {(0, 2), (1, 2)}
    assert state.told == "done: 4 of 9 facts"
    assert all("gone without a word, at values" in line for line in state.lines())


def test_other_numbers_of_processes_compute_what_is_missing(many, alone):
    before, folder, copy = kept(many / "torchrun"), many / "torchrun", many / "copy"
    for one, found in ((folder, ue.run(folder)), (copy, ue.RunState.read(copy))):
        same_edit(found.edit, alone.edit)
        assert kept(one).items() >= before.items()
        assert kept(one).keys() == kept(alone.folder).keys()
        assert sum(sign["pieces"].get("values", 0) for sign in signs(one)) == 2 + 3
    # of the three, one that comes late finds all done and has nothing to say
    assert {sign["processes"] for sign in signs(copy)} == {2, 3}
    assert sorted(sign["processes"] for sign in signs(folder)) == [1, 2, 2]


def test_kills_at_any_moment_lose_nothing(many, alone):
    found = ue.RunState.read(many / "killed")
    same_edit(found.edit, alone.edit)
    assert kept(found.folder).keys() == kept(alone.folder).keys()


# --- shares of the text -----------------------------------------------------------------------


def of_texts(place, folder):
    return given(place, folder, texts=[str(place / "texts.txt")], shares=4)


def test_c0_is_the_sum_of_its_shares(place, many, tiny_texts):
    """Two processes, one killed with its second share half written; then one that goes on."""
    model, tokenizer = load_model(str(place / "model"))
    texts = tiny_texts * 4
    parts = [
        ue.KeyStatistics.collect(model, tokenizer, texts, (0, 1), part=(share, 3))
        for share in range(3)  # of four that were asked for one would be empty
    ]
    wanted = ue.KeyStatistics.joined(parts)
    whole = ue.KeyStatistics.collect(model, tokenizer, texts, (0, 1))
    found = ue.RunState.read(many / "shares")
    assert found.finished
    files = sorted((many / "shares" / "statistics").glob("*.safetensors"))
    assert len(files) == 2
    for layer, file in enumerate(files):
        one = ue.KeyStatistics.load(file)
        assert torch.equal(one.C0(layer), wanted.C0(layer))
        # float64 sums in another order: some 20,000 tokens, each half an ulp at most
        assert torch.allclose(one.C0(layer), whole.C0(layer), rtol=1e-11, atol=1e-12)
    assert sum(sign["pieces"].get("statistics", 0) for sign in signs(many / "shares")) == 3
    assert kept(many / "shares", "statistics") == {}  # they are in the files of the layers
    edit = ue.edit(model, tokenizer, FACTS, METHOD, statistics=wanted, values=found_values(found))
    same_edit(found.edit, edit)


def found_values(state):
    """The values that a run has found."""
    place = RunFolder(state.folder)
    model, tokenizer = load_model(place.settings().loading["name"])
    stage = ValueStage(state.folder, Editor(model, tokenizer), place.settings())
    return stage.values()


def test_a_damaged_share_is_counted_again(place, tmp_path, caplog):
    ue.run(**of_texts(place, tmp_path), gather=False)
    wanted = kept(tmp_path, "statistics")
    broken = tmp_path / "pieces" / "statistics" / min(wanted)
    broken.write_bytes(broken.read_bytes()[:-7])
    found = ue.run(tmp_path)
    assert "a share of the text is counted again" in caplog.text
    assert found.finished
    assert sum(sign["pieces"].get("statistics", 0) for sign in signs(tmp_path)) == 3 + 1


# --- one folder, one configuration ------------------------------------------------------------


@pytest.fixture
def begun(place, tmp_path):
    """A folder in which all pieces are there and nothing is solved."""
    folder = tmp_path / "begun"
    assert not ue.run(**given(place, folder), gather=False).finished
    return folder


def test_the_last_step_may_come_later(begun, alone):
    before = kept(begun)
    old, new = (begun / "pieces" / "values" / name for name in (".old.x", ".new.x"))
    for path in (old, new):  # what a kill left, and what somebody may be writing
        path.touch()
    os.utime(old, (time.time() - 61, time.time() - 61))
    found = ue.run(begun, gather=True)
    same_edit(found.edit, alone.edit)
    assert kept(begun) == before
    assert half_written(begun) == [new]
    assert [sign["pieces"] for sign in signs(begun)] == [{"values": 5}, {}]


def test_the_last_step_alone_needs_all_pieces(begun):
    next((begun / "pieces" / "values").iterdir()).unlink()
    with pytest.raises(RunFolderError, match="not all pieces are there"):
        ue.run(begun, gather=True)
    assert not (begun / "edit.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"facts": FACTS[:5]}, "facts"),
        ({"method": METHOD.replace(clamp=1.0)}, "method"),
        ({"piece": 3}, "piece: 2 there, 3 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"on_shared_subject": "merge"}, "on_shared_subject"),
    ],
    ids=["facts", "method", "piece", "seed", "way"],
)
def test_another_configuration_is_refused(place, begun, change, told):
    before = kept(begun)
    with pytest.raises(RunFolderError, match="another configuration") as refusal:
        ue.run(begun, **change)
    assert told in str(refusal.value)
    assert "accept_changes" in str(refusal.value)
    assert kept(begun) == before


def test_changes_that_are_accepted_keep_the_pieces_that_fit(place, begun):
    more = [*FACTS, ue.Fact("{} is in the city of", "The old tower", "Oslo")]
    found = ue.run(begun, facts=more, accept_changes=True)
    assert [fact.subject for fact in found.edit.facts] == [fact.subject for fact in more]
    # nine facts were there; the tenth is in the piece of the ninth
    assert [sign["units"].get("values") for sign in signs(begun)] == [9, 2]
    again = ue.run(begun)
    assert again.finished and len(again.config.asked["facts"]) == 2


@pytest.mark.parametrize("version", ["unified_edit", "torch"])
def test_other_versions_are_refused(begun, version):
    path = begun / "config.json"
    path.write_text(path.read_text().replace(f'"{version}": "', f'"{version}": "0.0.'))
    with pytest.raises(RunFolderError, match=f"{version}: '0.0."):
        ue.run(begun)
    assert ue.run(begun, accept_changes=True).finished


def test_another_model_under_the_same_name_is_refused(place, make_gpt2, tiny_tokenizer, tmp_path):
    for seed in (0, 1):
        make_gpt2(seed=seed).save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        told = {**given(place, tmp_path / "run"), "model": str(tmp_path / "model")}
        if seed == 0:
            ue.run(**told, gather=False)
            continue
        with pytest.raises(RunFolderError, match="fingerprint"):
            ue.run(**told)


def test_another_tokenizer_is_refused(place, make_gpt2, tiny_texts, tiny_tokenizer, tmp_path):
    """One of fewer words for the same weights, and one with more than the model has rows for."""
    make_gpt2().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    told = {**given(place, tmp_path / "run"), "model": str(tmp_path / "model")}
    ue.run(**told, gather=False)
    byte_level_tokenizer(tiny_texts, 300).save_pretrained(tmp_path / "model")
    with pytest.raises(RunFolderError, match="tokenizer"):
        ue.run(**told)
    large = ["a tower in Rome", *(f"{number} words" for number in range(5000))]
    byte_level_tokenizer([*tiny_texts, *large], 900).save_pretrained(tmp_path / "model")
    with pytest.raises(TokenizationError):
        ue.run(**{**told, "folder": tmp_path / "new"})
    assert kept(tmp_path / "new") == {}


def sign_of(folder, **changes):
    """A sign of a process of another machine, written now."""
    there = signs(folder)[0]
    made = {**there, "host": "elsewhere", "pid": 1, "state": "working", **changes}
    path = folder / "workers" / "elsewhere-1.json"
    path.write_text(json.dumps(made))
    return path


def test_two_configurations_are_never_at_work_in_one_folder(begun):
    path = sign_of(begun, piece="values 1")
    with pytest.raises(RunFolderError, match="elsewhere-1 is at work there on another") as refusal:
        ue.run(begun, seed=1, accept_changes=True)
    assert "seed: 0 there, 1 here" in str(refusal.value)
    old = time.time() - 1000
    os.utime(path, (old, old))
    assert ue.run(begun, seed=1, accept_changes=True).finished


def test_what_a_living_process_is_at_is_left_to_it_until_it_dies(begun, monkeypatch):
    """It comes to its end while we wait; and dies in the other run, which then computes it."""
    names = [path.name for path in (begun / "pieces" / "values").iterdir()]
    state = ue.RunState.read(begun)
    (first, *_) = state.pieces
    mine = [begun / "pieces" / name for name in first.files]
    content = [path.read_bytes() for path in mine]
    for comes_to_its_end in (True, False):
        for path in mine:
            path.unlink()
        sign = sign_of(begun, piece=first.name)
        seen = []

        def look(_seconds, ends=comes_to_its_end, sign=sign, seen=seen):
            seen.append(ue.RunState.read(begun).missing)
            if ends:
                for path, data in zip(mine, content, strict=True):
                    path.write_bytes(data)
            else:
                os.utime(sign, (time.time() - 61, time.time() - 61))

        monkeypatch.setattr("unified_edit.running.work.time.sleep", look)
        before = len(signs(begun))
        ue.run(begun, gather=False)
        assert [[piece.name for piece in missing] for missing in seen] == [[first.name]]
        last = max(signs(begun), key=lambda one: one["started"] * (one["host"] != "elsewhere"))
        assert last["pieces"] == ({} if comes_to_its_end else {"values": 1})
        assert len(signs(begun)) == before + 1
    assert {path.name for path in (begun / "pieces" / "values").iterdir()} == set(names)


def test_a_finished_run_is_left_as_it_is(alone):
    files = {path: path.stat().st_mtime_ns for path in alone.folder.rglob("*") if path.is_file()}
    assert ue.run(alone.folder).finished
    now = {path: path.stat().st_mtime_ns for path in alone.folder.rglob("*") if path.is_file()}
    assert now == files


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [4, 0], ids=["half of it", "nothing of it"])
def test_a_piece_that_is_cut_short_is_computed_again(begun, alone, caplog, last):
    wanted = kept(begun)
    broken = begun / "pieces" / "values" / min(wanted)
    broken.write_bytes(broken.read_bytes()[: len(broken.read_bytes()) * last // 8])
    found = ue.run(begun)
    same_edit(found.edit, alone.edit)
    assert str(broken) in caplog.text and "computed again" in caplog.text
    assert kept(begun).keys() == wanted.keys()
    assert signs(begun)[1]["pieces"] == {"values": 1}


@pytest.mark.parametrize("place_of", ["piece", "sign", "edit"])
def test_a_full_disk_is_told_and_keeps_what_was_finished(
    place, tmp_path, monkeypatch, alone, place_of
):
    """The sixth file, half a piece; a sign of life, the edit: there is no room for it."""
    plain, count = tensor_files.save_file, 0

    def no_room(tensors, path, **more):
        nonlocal count
        count += 1
        if (place_of, count) == ("piece", 6) or (place_of == "edit" and "edit" in path.name):
            raise OSError(28, "No space left on device")
        plain(tensors, path, **more)

    dumps, signs_written = workers.json.dumps, 0

    def no_sign(*arguments, **more):
        nonlocal signs_written
        signs_written += place_of == "sign"
        if signs_written >= 6:
            raise OSError(28, "No space left on device")
        return dumps(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", no_room)
        patch.setattr(workers, "json", SimpleNamespace(dumps=no_sign, loads=json.loads))
        with pytest.raises((EditFileError, RunFolderError), match=r"No space left.*room"):
            ue.run(**given(place, tmp_path))
    done = {"piece": 5, "sign": 4, "edit": 9}[place_of]
    assert len(kept(tmp_path)) == done
    assert half_written(tmp_path) == []
    state = ue.RunState.read(tmp_path)
    assert not state.finished
    assert len(state.alive) == (place_of == "sign")  # this process lives, and could not say more
    found = ue.run(tmp_path)
    same_edit(found.edit, alone.edit)
    if place_of == "piece":
        assert "No space left" in state.workers[0].sign.problem
        assert signs(tmp_path)[1]["pieces"] == {"values": 3}


def test_a_piece_that_fails_is_named_and_the_next_run_does_it(place, tmp_path, monkeypatch, alone):
    """Memory runs out even for one fact, say."""
    plain, calls = Editor.optimise_values, []

    def no_memory(self, facts, *arguments, **more):
        calls.append(facts)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, facts, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "optimise_values", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            ue.run(**given(place, tmp_path))
    (line,) = ue.RunState.read(tmp_path).lines()
    assert "failed: OutOfMemoryError: out of memory; did 4 facts" in line
    (log,) = (tmp_path / "workers").glob("*.log")
    assert "values 3 cannot be made" in log.read_text()
    same_edit(ue.run(tmp_path).edit, alone.edit)
    assert signs(tmp_path)[1]["pieces"] == {"values": 3}


def test_broken_facts_are_told_with_their_line(place, tmp_path, capsys):
    lines = [json.dumps({"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new})
             for f in FACTS]  # fmt: skip
    lines[3] = lines[3].replace('"subject"', '"subjekt"')
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    code = cli.main(["run", str(tmp_path / "run"), "--facts", str(tmp_path / "facts.jsonl"),
                     "--model", str(place / "model"), "--layers", "0"])  # fmt: skip
    assert code == 1
    assert "facts.jsonl, line 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "{", "cannot be read"),
        ("config.json", '{"format": "unified_edit.run/9"}', "another version"),
        ("pieces.json", "[1]", None),
        ("facts.jsonl", '{"prompt": "{} is", "subject": "A", "target_new": "b"}', "changed"),
    ],
)
def test_a_damaged_folder_is_told(begun, file, content, told):
    (begun / file).write_text(content)
    if told is None:  # it is written anew
        assert ue.run(begun).finished
        return
    with pytest.raises(RunFolderError, match=told):
        ue.run(begun)


def test_a_new_folder_needs_a_model_and_facts(tmp_path):
    with pytest.raises(RunFolderError, match="model"):
        ue.run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds no run"):
        ue.RunState.read(tmp_path)
    with pytest.raises(FactError, match="no facts"):
        ue.run(tmp_path / "run", model="atlas")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [
        {"method": ue.ROME.replace(layers=(1,), steps=2)},
        {"facts": None, "on_shared_subject": "split"},
    ],
    ids=["rome", "split"],
)
def test_values_that_depend_on_each_other_are_refused(place, tmp_path, more):
    if "facts" in more:
        first = FACTS[0]
        more["facts"] = [first, ue.Fact("{} is far from", first.subject, "Oslo")]
    with pytest.raises(MethodError, match="on the model edited so far"):
        ue.run(**{**given(place, tmp_path / "run"), **more})


def test_facts_with_one_value_stay_in_one_piece(place, tmp_path):
    facts = [*FACTS[:3], ue.Fact("{} is far from", FACTS[0].subject, "Oslo")]
    more = {"facts": facts, "on_shared_subject": "merge"}
    found = ue.run(**{**given(place, tmp_path), **more})
    assert [len(piece.files) for piece in found.pieces] == [1, 2]
    assert [piece.units for piece in found.pieces] == [2, 2]
    assert found.edit.columns == (0, 1, 2, 0)
    model, tokenizer = load_model(str(place / "model"))
    values = optimise_values(model, tokenizer, facts, METHOD, on_shared_subject="merge")
    # float32 sums of other batches in other orders, over three steps
    delta = found_values(found).delta
    assert torch.allclose(delta, values.delta, rtol=0, atol=1e-4 * float(values.delta.abs().max()))


# --- what is seen of it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (2, 4),
        ),
        ({"RANK": "none", "WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "0"}, (0, 1)),
    ],
)
def test_a_process_knows_its_share(environment, share):
    found = Share.of_this_process(environment)
    assert (found.rank, found.processes) == share


def test_prefixes_are_those_of_the_process_that_began(begun, alone, monkeypatch):
    """Another kind of machine may sample others, and would find no piece."""
    monkeypatch.setattr("unified_edit.editing.editor.sample_prefixes", lambda *_: ("", "It. "))
    found = ue.run(begun)
    same_edit(found.edit, alone.edit)
    assert [sign["pieces"] for sign in signs(begun)] == [{"values": 5}, {}]


def test_each_process_of_a_machine_has_its_own_card(place, tmp_path, monkeypatch, capsys):
    def opened(**told):
        raise ModelError(told["device"])

    monkeypatch.setattr("unified_edit.running.work.load_model", opened)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("unified_edit.command_line.commands.usable", lambda device: opened(
        device=device))  # fmt: skip
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    for ranks, asked, card in (
        (("3", "", "0"), "cuda", "cuda:3"), (("5", "", ""), "cuda", "cuda:1"),
        (("3", "", ""), "cuda:0", "cuda:0"), (("", "", ""), "cuda", "cuda"),
        (("", "2", "0"), "cuda", "cuda:2"), (("", "", "1"), "cuda", "cuda:1"),
    ):  # fmt: skip
        for name, rank in zip(names, ranks, strict=True):
            monkeypatch.setenv(name, rank)
        with pytest.raises(ModelError, match=f"^{card}$"):
            ue.run(**given(place, tmp_path / "run"), device=asked)
        # what the command tries out is that card, and no other
        assert cli.main(["run", str(tmp_path / "run"), "--device", asked]) == 1
        assert f": {card}\n" in capsys.readouterr().err


def test_shares_begin_all_over_the_list():
    begins = [Share(rank, 3).begin(10) for rank in range(3)]
    assert begins == [0, 3, 6]


def test_the_command_goes_on_by_the_folder_alone(place, tmp_path, capsys):
    folder, model = str(tmp_path / "run"), str(place / "model")
    records = [
        ue.Record(replace(fact, target_true="the"), (f"I saw {fact.subject} and it stands in",))
        for fact in FACTS[:3]
    ]
    lines = [json.dumps(asdict(record)) for record in records]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    begin = ["run", folder, "--model", model, "--records", str(tmp_path / "records.jsonl")]
    begin += ["--layers", "0", "--statistics", str(place / "stats.safetensors"), "--piece", "2"]
    assert cli.main([*begin, "--pieces-only"]) == 0
    assert "done: 3 of 3 facts" in capsys.readouterr().out
    assert cli.main(["status", folder]) == 0
    told = capsys.readouterr().out
    assert "done: 3 of 3 facts" in told and "ended; did 3 facts" in told
    assert cli.main(["run", folder, "--gather", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] and found["summary"]["facts"] == 3
    assert set(found["summary"]["scores"]["after"]) >= {"ES", "PS"}
    assert [row["done"] for row in found["pieces"]] == [2]
    assert cli.main(["status", folder]) == 0
    told = capsys.readouterr().out
    assert "facts took" in told and "together" in told and "edit.safetensors" in told
    assert cli.main(["run", folder, "--seed", "4"]) == 1
    assert "seed: 0 there, 4 here" in capsys.readouterr().err
    assert cli.main(["run", folder, "--seed", "4", "--accept-changes"]) == 0
    assert "facts took" in capsys.readouterr().out
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_what_is_left_is_told_from_what_was_done(begun):
    for path in (begun / "pieces" / "values").iterdir():
        path.unlink()
    state = ue.RunState.read(begun)
    each = state.workers[0].sign.seconds["values"] / 5
    assert state.left == pytest.approx(5 * each)
    sign_of(begun)
    sign_of(begun).rename(begun / "workers" / "elsewhere-2.json")
    sign_of(begun, seconds={"values": 10.0}, pieces={"values": 5})
    state = ue.RunState.read(begun)
    assert len(state.alive) == 2
    assert state.left == pytest.approx(5 * state.table["a piece"][0] / 2)
    assert "for 2 processes" in time_left(state)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.5, "0.5 s"), (42, "42 s"), (250, "4 min"), (7.4 * 3600, "7 h 24 min")],
)
def test_durations(seconds, told):
    assert duration(seconds) == told
