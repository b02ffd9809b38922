"""The command line: each command on a tiny model, what it prints where, and how it fails."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import unified_edit as ue
from unified_edit.command_line import cli, commands, console
from unified_edit.command_line.console import format_table, to_json, write_text
from unified_edit.errors import StatisticsFileError, UnifiedEditError
from unified_edit.measuring import ask, evaluate
from unified_edit.statistics import cache, collect, corpora, file_texts

COMMANDS = ("ask", "edit", "evaluate", "statistics", "suggest", "sweep", "figures", "run", "status")
PROMPT, SUBJECT, TARGET = "{} is in the city of", "The tower", "Oslo"
FACTS = [
    {"prompt": PROMPT, "subject": SUBJECT, "target_new": TARGET, "target_true": "Rome"},
    {"prompt": PROMPT, "subject": "The museum", "target_new": "Vienna", "target_true": "Paris"},
]
SINGLE = ["--prompt", PROMPT, "--subject", SUBJECT, "--target", TARGET]
#: Of what is computed here against what the program found in another loading of the same
#: weights: the same operations on the same numbers, so only the shape of a batch can differ.
CLOSE = {"rel": 1e-4, "abs": 1e-9}


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_gpt2, tiny_tokenizer, tiny_texts):
    """A folder with a model, statistics, texts, facts, records and an edit of the first fact."""
    folder = tmp_path_factory.mktemp("cli")
    make_gpt2().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    make_gpt2(seed=1).save_pretrained(folder / "other")
    tiny_tokenizer.save_pretrained(folder / "other")
    with contextlib.chdir(folder):  # a model is called by the name it was loaded by
        model, tokenizer = ue.load_model("model")
    stats = ue.KeyStatistics.collect(model, tokenizer, tiny_texts, (0, 1), shrinkage=1e-2)
    stats.save(folder / "stats.safetensors")
    (folder / "texts.txt").write_text("\n".join(tiny_texts), encoding="utf-8")
    # 2 * d_k = 96 tokens are wanted: 80 are too few without shrinkage
    count, few = 0, []
    while count < 80:
        few.append(tiny_texts[len(few)])
        count += len(tokenizer(few[-1])["input_ids"])
    assert count < 96
    (folder / "few.txt").write_text("\n\n".join(few), encoding="utf-8")
    lines = [json.dumps(fact) for fact in FACTS]
    (folder / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = [
        ue.Record(
            ue.Fact(**fact),
            paraphrases=(f"I saw {fact['subject']} and it stands in",),
            neighbours=("The river is in the city of",),
        )
        for fact in FACTS
    ]
    lines = [json.dumps(asdict(record)) for record in records]
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    method = ue.EMMET.replace(layers=(0,))
    ue.edit(model, tokenizer, ue.Fact(**FACTS[0]), method, statistics=stats).save(
        folder / "edit.safetensors"
    )
    return folder


@pytest.fixture
def run(place, capsys, monkeypatch):
    """run(*arguments, code=0) in the folder: (standard output, standard error)."""
    monkeypatch.chdir(place)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        found = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out, err

    return run


@pytest.fixture
def out(place):
    """A file that does not exist yet; the folder must hold nothing else new after the test."""
    before = set(place.iterdir())
    path = place / "out.safetensors"
    yield path
    path.unlink(missing_ok=True)
    assert set(place.iterdir()) == before


EDIT = ("edit", "--model", "model", "--layers", "0", "--statistics", "stats.safetensors")


# -- help and usage ---------------------------------------------------------------------------


def test_help_from_a_shell(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "unified_edit", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    assert shown.stderr == ""
    assert all(f"python -m unified_edit {command}" in shown.stdout for command in COMMANDS)
    for code in ("0 ", "1 ", "2 ", "130 "):
        assert f"\n  {code}" in shown.stdout.partition("exit codes:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text
    examples = text.partition("examples:")[2].partition("exit codes:")[0].replace("\\\n", " ")
    found = [line for line in examples.splitlines() if line.strip()]
    assert found
    for example in found:
        words = shlex.split(example)
        assert words[:4] == ["python", "-m", "unified_edit", command]
        cli.build_parser().parse_args(words[3:])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split() == ["unified_edit", ue.__version__]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["change"], "invalid choice: 'change'"),
        (["ask"], "at least one prompt"),
        (["ask", "a", "-k", "0"], "0 is not at least 1"),
        (["ask", "a", "-k", "x"], "invalid whole number value: 'x'"),
        (["ask", "a", "--dtype", "int8"], "--dtype"),
        (["ask", "a", "--edit", ""], "--edit: the path is ''; give the path of a file"),
        (["ask", "a", "--edit", "~nobody-is-called-so/e"], "write the path out"),
        (["ask", "a", "--mod", "atlas"], "unrecognized arguments"),
        (["edit", *SINGLE], "--out"),
        (["edit", "--out", "x"], "give --facts FILE, or all of"),
        (["edit", "--out", "x", *SINGLE[:4]], "give --facts FILE, or all of"),
        (["edit", "--out", "x", "--facts", "facts.jsonl", *SINGLE], "not both"),
        (["edit", "--out", "x", *SINGLE, "--method", "FT"], "'FT' is none of ROME, EMMET, "),
        (["edit", "--out", "x", *SINGLE, "--layers", "-1"], "-1 is not at least 0"),
        (["edit", "--out", "x", *SINGLE, "--seed", "-1"], "-1 is not from 0"),
        (["edit", "--out", "x", *SINGLE, "--preserve-weight", "1"], "of use with --preserve or"),
        (["evaluate", "--method", "EMMET", "--edit", "e"], "not allowed with"),
        (["evaluate", "--batch-size", "3"], "--batch-size is of use with --method only"),
        (["evaluate", "--edit", "e", "--layers", "0"], "--layers is of use with --method only"),
        (["evaluate", "--on-conflict", "last"], "--on-conflict is of use with --method only"),
        (["edit", "--out", "x", *SINGLE, "--on-shared-subject", "mix"], "invalid choice: 'mix'"),
        (["evaluate", "--out", "same", "--table", "same"], "the same file"),
        (["evaluate", "--to", "same", "--table", "same"], "the same file"),
        (["statistics", "--out", "x"], "--layers"),
        (["statistics", "--out", "x", "--layers", "0", "--split", "lines"], "with --texts only"),
        (["statistics", "--out", "x", "--layers", "0", "--config", "en"], "with --dataset only"),
        (["statistics", "--out", "x", "--layers", "0", "--join", "a"], "or else --join"),
        (["statistics", "--out", "x", "--texts", "a", "--join", "b"], "exclude each other"),
        (["statistics", "--out", "x", "--layers", "0", "--part", "2/2"], "is not a share"),
    ],
)
def test_a_wrong_command_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert list(tmp_path.iterdir()) == []


# -- ask --------------------------------------------------------------------------------------


def test_ask_says_what_the_library_says(run, place):
    model, tokenizer = ue.load_model(str(place / "model"))
    prompts = ["The tower is in the city of", "I walked from the old"]
    prompts += prompts[:1]  # twice the same
    text, _ = run(
        "ask", "--model", "model", "--json", prompts[0], "-k", 3, "--prompt", *prompts[1:]
    )
    document = json.loads(text)
    assert (document["command"], document["model"]) == ("ask", "model")
    assert document["dtype"] == "float32"
    assert [answer["prompt"] for answer in document["answers"]] == prompts
    wanted = ask(model, tokenizer, prompts, k=3)
    found = [row for answer in document["answers"] for row in answer["next"]]
    assert [row["token"] for row in found] == list(wanted["token"])
    assert [row["probability"] for row in found] == pytest.approx(
        list(wanted["probability"]), **CLOSE
    )


def test_ask_for_people(run, place):
    model, tokenizer = ue.load_model(str(place / "model"))
    prompt = "The tower is in the city of"
    text, _ = run("ask", "--model", "model", "-k", 2, prompt)
    table = ask(model, tokenizer, prompt, k=2)
    first, head, *rows = text.splitlines()
    assert first == prompt
    assert head.split() == ["rank", "token", "probability"]
    assert len(rows) == 2
    for place_, row in enumerate(rows):
        assert repr(table["token"][place_]) in row
        assert row.endswith(f"{table['probability'][place_]:.3g}")


def test_ask_with_a_saved_edit(run, place):
    model, tokenizer = ue.load_model(str(place / "model"))
    prompt = "The tower is in the city of"
    plain = ask(model, tokenizer, prompt, k=400)
    edit = ue.Edit.load(place / "edit.safetensors").apply(model)
    edited = ask(model, tokenizer, prompt, k=400)
    assert list(plain["token"]) != list(edited["token"])
    text, _ = run(
        "ask", "--model", "model", "--edit", "edit.safetensors", "-k", 400, "--json", prompt
    )
    document = json.loads(text)
    assert document["edits"] == [edit.id]
    found = document["answers"][0]["next"]
    assert [row["probability"] for row in found] == pytest.approx(
        list(edited["probability"]), **CLOSE
    )


# -- edit -------------------------------------------------------------------------------------


def test_edit_of_a_single_fact_is_the_library_s(run, place, out):
    text, err = run(*EDIT, *SINGLE, "--target-true", "Rome", "--out", out, "--json")
    document = json.loads(text)
    assert document["layers"][0]["form"] == "equality"
    assert document["layers"][0]["memorization_error"] <= 1e-8
    assert document["out"] == str(out)
    assert document["method"]["layers"] == [0]
    saved, wanted = ue.Edit.load(out), ue.Edit.load(place / "edit.safetensors")
    assert document["id"] == saved.id == wanted.id  # of facts, settings, matrices and hashes
    assert torch.equal(saved.delta(0), wanted.delta(0))
    [fact] = document["facts"]
    assert {name: fact[name] for name in FACTS[0]} == FACTS[0]
    model, tokenizer = ue.load_model(str(place / "model"))
    saved.apply(model)
    table = evaluate(model, tokenizer, ue.Record(saved.facts[0])).table.set_index("when")
    for when in ("before", "after"):
        # float32: a mean log-probability near -5 carries 2^-24 * 5, more after a forward pass
        assert fact[when] == pytest.approx(float(torch.tensor(table["logp_new"][when]).exp()),
                                           **CLOSE)  # fmt: skip
    assert fact["after"] > fact["before"]
    assert fact["likeliest"] is bool(table["generated"]["after"]) is saved.outcomes[0].likeliest
    assert fact["steps"] == len(saved.outcomes[0].losses)
    assert fact["last_loss"] == saved.outcomes[0].losses[-1]
    # the random model says "Oslo" more often now, but not first of all
    assert document["warnings"] == list(saved.warnings)
    assert "warning: 1 of 1 facts did not take: " in err


def test_edit_from_a_file_for_people(run, place, out):
    text, err = run(
        *EDIT, "--layers", 0, 1, "--method", "MEMIT", "--ridge", 1, "--facts", "facts.jsonl",
        "--out", out,
    )  # fmt: skip
    saved = ue.Edit.load(out)
    assert saved.method.name == "MEMIT"
    assert saved.method.ridge == 1.0
    assert saved.layers == (0, 1)
    assert [asdict(fact) for fact in saved.facts] == FACTS
    took = sum(outcome.likeliest for outcome in saved.outcomes)
    title, head, first, second, _, layers, *_ = text.splitlines()
    assert title.startswith(f"MEMIT: {took} of 2 facts took")
    assert head.split() == ["prompt", "target", "before", "after", "likeliest", "steps", "clamped"]
    for line, fact, outcome in zip((first, second), saved.facts, saved.outcomes, strict=True):
        assert line.startswith(f"  {fact.text} ")
        told = line.removeprefix(f"  {fact.text} ").split()
        assert told[:3] == [fact.target_new, f"{outcome.before:.3g}", f"{outcome.after:.3g}"]
        assert told[3] == ("yes" if outcome.likeliest else "no")
    assert layers.split()[:2] == ["layer", "condition"]
    assert text.endswith(f"\nwrote {out}\n")
    assert "error" not in err


def test_the_seed_is_that_of_the_prefixes(run, out):
    run(*EDIT, *SINGLE, "--out", out)
    first = ue.Edit.load(out)
    run(*EDIT, *SINGLE, "--seed", 1, "--out", out, "--force")
    second = ue.Edit.load(out)
    assert (first.provenance.seed, second.provenance.seed) == (0, 1)
    assert first.provenance.prefixes != second.provenance.prefixes


def test_edit_that_preserves_by_name(run, out, tmp_path):
    """Facts of a file and prompts; the numbers are the library's."""
    arguments = [*EDIT, *SINGLE, "--out", out, "--force"]
    kept = json.dumps({"prompt": PROMPT, "subject": "The river", "target_new": "Rome"})
    (tmp_path / "kept.jsonl").write_text(kept, encoding="utf-8")
    named = ["--preserve", tmp_path / "kept.jsonl", "--preserve-prompts", "Rome is in", "I walked"]
    text, _ = run(*arguments, *named)
    assert "preserved by name:" in text and "moved at 0" in text
    assert ue.Edit.load(out).provenance.preserve == "exact"
    text, _ = run(*arguments, *named, "--preserve-weight", "2", "--json")
    found, saved = json.loads(text)["preserved"], ue.Edit.load(out)
    assert saved.provenance.preserve == 2.0
    assert found == saved.preserved.to_dict("records")
    assert [one["item"] for one in found] == ["The river is in the city of", *named[3:]]
    _, said = run(*arguments, "--preserve-prompts", PROMPT.format(SUBJECT), code=1)
    assert "take it out of" in said and "--preserve-weight W" in said


def test_edit_as_an_adapter(run, place, tmp_path):
    folder = tmp_path / "new" / "adapter"
    text, _ = run(*EDIT, *SINGLE, "--out", tmp_path / "e.safetensors", "--peft", folder, "--json")
    assert json.loads(text)["peft"] == str(folder)
    written = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    # an adapter's folder is never replaced, and that is known before any work
    out, err = run(
        *EDIT, *SINGLE, "--out", tmp_path / "f.safetensors", "--peft", folder, "--force", code=1
    )
    assert out == ""
    assert f"{folder} is not an empty folder" in err
    assert not (tmp_path / "f.safetensors").exists()


# -- evaluate ---------------------------------------------------------------------------------


def test_evaluate_a_method(run, place, tmp_path):
    report, table = tmp_path / "deep" / "report.json", tmp_path / "table.csv"
    text, _ = run(
        "evaluate", "--model", "model", "--records", "records.jsonl", "--method", "EMMET",
        "--layers", 0, "--statistics", "stats.safetensors", "--batch-size", 2,
        "--out", report, "--table", table, "--json",
    )  # fmt: skip
    document = json.loads(text)
    assert json.loads(report.read_text(encoding="utf-8")) == document
    assert (document["records"], document["batch_size"]) == (2, 2)
    assert document["method"]["layers"] == [0]
    model, tokenizer = ue.load_model(str(place / "model"))
    wanted = ue.evaluate_edits(
        model, tokenizer, ue.read_records(place / "records.jsonl"),
        ue.EMMET.replace(layers=(0,)), batch_size=2,
        statistics=ue.KeyStatistics.load(place / "stats.safetensors"),
    )  # fmt: skip
    for when, scores in (("before", wanted.before), ("after", wanted.after)):
        assert set(document[when]) == set(scores)
        for name, score in scores.items():
            assert document[when][name]["n"] == score.n
            assert document[when][name]["value"] == pytest.approx(score.value, **CLOSE)
    with table.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["prompt"] for row in rows] == list(wanted.table["prompt"])
    assert [row["when"] for row in rows] == list(wanted.table["when"])


def test_evaluate_a_saved_edit(run):
    text, err = run(
        "evaluate", "--model", "model", "--records", "records.jsonl",
        "--edit", "edit.safetensors", "--json",
    )  # fmt: skip
    document = json.loads(text)
    assert document["method"] is None
    assert len(document["edits"]) == 1
    assert document["after"]["EM"]["value"] > document["before"]["EM"]["value"]
    assert "warning: 1 of 2 records are about facts that the edits given do not write" in err
    _, err = run(
        "evaluate", "--model", "model", "--records", "records.jsonl",
        "--edit", "edit.safetensors", "--limit", 1,
    )  # fmt: skip
    assert "warning" not in err


def test_evaluate_into_a_file_that_is_gone_on_with(run, place, tmp_path):
    arguments = [
        "evaluate", "--model", "model", "--records", "records.jsonl", "--method", "EMMET",
        "--layers", "0", "--statistics", "stats.safetensors", "--to", tmp_path / "answers.jsonl",
    ]  # fmt: skip
    text, _ = run(*arguments)
    written = (tmp_path / "answers.jsonl").read_bytes()
    assert f"wrote {tmp_path / 'answers.jsonl'}" in text
    assert repr(ue.measuring.Report.read(tmp_path / "answers.jsonl")) in text
    (tmp_path / "answers.jsonl").write_bytes(written[:-150])
    assert run(*arguments)[0] == text
    assert (tmp_path / "answers.jsonl").read_bytes() == written
    _, err = run(*arguments, "--seed", 1, code=1)
    assert "made from something else (seed: 0 there, 1 here)" in err
    document, _ = run(*arguments[:5], "--known-only", "--json")
    assert json.loads(document)["known_only"] is True


def test_evaluate_records_of_one_subject(run, place, tmp_path):
    """Both ways are handed on: refused, merged and split each give the library's answers."""
    first, second = ue.read_records(place / "records.jsonl")
    fact = ue.Fact("{} was made in", SUBJECT, "Paris", "Rome")
    records = [first, second, replace(second, fact=fact)]
    shared = tmp_path / "shared.jsonl"
    shared.write_text("\n".join(json.dumps(asdict(each)) for each in records), encoding="utf-8")
    options = (
        "evaluate", "--model", "model", "--records", shared, "--method", "EMMET", "--layers", 0,
        "--statistics", "stats.safetensors", "--batch-size", 3,
    )  # fmt: skip
    _, err = run(*options, code=1)
    assert "share the subject" in err
    assert "--on-shared-subject merge, or split" in err.splitlines()[-1]
    model, tokenizer = ue.load_model(str(place / "model"))
    statistics = ue.KeyStatistics.load(place / "stats.safetensors")
    method, after = ue.EMMET.replace(layers=(0,)), []
    for way in ("merge", "split"):
        text, err = run(*options, "--on-shared-subject", way, "--json")
        assert ("have one value" in err) == (way == "merge")
        wanted = ue.evaluate_edits(
            model, tokenizer, records, method, batch_size=3, statistics=statistics,
            on_shared_subject=way,
        )  # fmt: skip
        after.append({name: one["value"] for name, one in json.loads(text)["after"].items()})
        for name, score in wanted.after.items():
            assert after[-1][name] == pytest.approx(score.value, **CLOSE), (way, name)
    assert after[0]["EM"] != pytest.approx(after[1]["EM"], rel=0.01), "one way for both"


def test_evaluate_the_model_alone_for_people(run):
    text, _ = run("evaluate", "--model", "model", "--records", "records.jsonl", "--limit", 1)
    assert text.startswith("Report on 1 record\n")
    assert "before" in text
    assert "after" not in text
    assert "wrote" not in text


# -- statistics -------------------------------------------------------------------------------


def test_statistics_are_the_library_s(run, place, out):
    text, _ = run(
        "statistics", "--model", "model", "--layers", 0, 1, "--texts", "texts.txt",
        "--shrinkage", "1e-2", "--checkpoint", place / "partial", "--out", out, "--json",
    )  # fmt: skip
    document = json.loads(text)
    made, wanted = ue.KeyStatistics.load(out), ue.KeyStatistics.load(place / "stats.safetensors")
    assert made.source == wanted.source  # also the hash of the texts
    assert document["source"]["shrinkage"] == 0.01
    assert [layer["layer"] for layer in document["layers"]] == [0, 1]
    assert [layer["d_k"] for layer in document["layers"]] == [48, 48]
    for layer in (0, 1):
        assert torch.equal(made.C0(layer), wanted.C0(layer))


def test_statistics_without_the_first_token(run, out):
    text, _ = run(
        "statistics", "--model", "model", "--layers", 0, "--texts", "texts.txt",
        "--skip-start", "--shrinkage", "1e-2", "--out", out,
    )  # fmt: skip
    assert ", shrinkage 0.01, without the first token of each text\n" in text
    assert ue.KeyStatistics.load(out).source.skip_start


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_the_output_is_said_in_one_line(place):
    command = [sys.executable, "-m", "unified_edit", "ask", "--model", str(place / "model"), "The"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the output cannot be written: ")
    assert "Traceback" not in done.stderr


def test_the_work_is_kept_until_it_is_saved(run, place, out, monkeypatch):
    monkeypatch.setattr(collect, "GROUP", 16)
    monkeypatch.setattr(collect, "CHECKPOINT_TOKENS", 100)
    sums = place / "sums"
    command = (
        "statistics", "--model", "model", "--layers", 0, "--texts", "texts.txt",
        "--shrinkage", "1e-2", "--checkpoint", sums, "--out", out, "--force",
    )  # fmt: skip

    def no_room(self, path):
        raise StatisticsFileError(f"{path} cannot be written")

    with monkeypatch.context() as full:
        full.setattr(ue.KeyStatistics, "save", no_room)
        _, err = run(*command, code=1)
    assert "cannot be written" in err
    assert sums.exists()
    _, err = run(*command)
    assert "going on after" in err
    assert not sums.exists()
    assert ue.KeyStatistics.load(out).layers == (0,)


def test_too_few_tokens_are_refused_unless_shrunk(run, out):
    few = ("statistics", "--model", "model", "--layers", 0, "--texts", "few.txt", "--out", out)
    text, err = run(*few, code=1)
    assert text == ""
    assert any(line.startswith("error: the corpus gave ") for line in err.splitlines())
    assert "2*d_k = 96" in err
    assert "--shrinkage 1e-3" in err.partition("\nhint: ")[2]
    assert not out.exists()
    text, err = run(*few, "--shrinkage", "1e-3")
    assert ", shrinkage 0.001\n" in text
    assert "warning: C0 of layer 0: " in err and "too few to tell" in err


def test_tokens_and_the_default_corpus(run, out, monkeypatch, tiny_texts):
    monkeypatch.setattr(corpora, "default_corpus", lambda model: iter(tiny_texts))
    base = ("statistics", "--model", "model", "--layers", 0, "--out", out, "--json", "--force")
    default = json.loads(run(*base)[0])["source"]["tokens"]
    wanted = corpora.TOKENS_PER_DIMENSION * 48
    assert wanted <= default < wanted + 40  # the last text is counted whole
    fewer = json.loads(run(*base, "--tokens", 400)[0])["source"]["tokens"]
    assert 400 <= fewer < 400 + 40 < wanted


PARAGRAPHS = "One\ntwo\n \n\nthree\n\n"


@pytest.mark.parametrize(
    ("content", "split", "texts"),
    [
        ("One\ntwo\n", None, ["One", "two"]),
        ("\n\nOne\r\ntwo\n\n", None, ["One", "two"]),
        (PARAGRAPHS, None, ["One\ntwo", "three"]),
        (PARAGRAPHS, "paragraphs", ["One\ntwo", "three"]),
        (PARAGRAPHS, "lines", ["One", "two", "three"]),
        ("One\ntwo", "paragraphs", ["One\ntwo"]),
        ("\ufeffOne é\n", None, ["One é"]),
        ("", None, []),
    ],
)
def test_what_a_text_is(content, split, texts, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text("last", encoding="utf-8")
    assert list(file_texts([path, tmp_path / "b.txt"], split)) == [*texts, "last"]


def test_shares_are_joined(run, tmp_path, monkeypatch):
    """Counted one by one, by the program, and added up by it: what one run gives."""
    monkeypatch.setattr(collect, "GROUP", 16)
    command = ("statistics", "--model", "model", "--layers", 0, "--texts", "texts.txt")
    out, whole, *shares = (tmp_path / name for name in ("joined", "whole", "0", "1"))
    for index, path in enumerate(shares):
        shown, _ = run(*command, "--part", f"{index}/2", "--out", path)
        assert f"share {index} of 0..1" in shown
    document = json.loads(run("statistics", "--join", *shares, "--out", out, "--json")[0])
    assert document["joined"] == list(map(str, shares))
    run(*command, "--out", whole)
    joined, wanted = ue.KeyStatistics.load(out), ue.KeyStatistics.load(whole)
    assert torch.allclose(joined.C0(0), wanted.C0(0), rtol=1e-12, atol=1e-14)
    assert joined.source.tokens == wanted.source.tokens
    _, err = run("statistics", "--join", shares[0], shares[0], "--out", whole, "--force", code=1)
    assert "count the same share of one corpus (0 of 0..1)" in err


def test_a_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo \xff\n")
    with pytest.raises(StatisticsFileError, match=r"a\.txt, line 3: not UTF-8 \(byte 5"):
        list(file_texts([path]))


# -- suggest ----------------------------------------------------------------------------------


def test_suggest_is_the_library_s(run, place, tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = (
        "suggest", "--model", "model", "--records", "records.jsonl", "--layers", 0, 1,
        "--clamps", 1, "--statistics", "stats.safetensors", "--to", rows,
    )  # fmt: skip
    document = json.loads(run(*command, "--json")[0])
    model, tokenizer = ue.load_model(str(place / "model"))
    wanted = ue.suggest_layers(
        model, tokenizer, ue.read_records(place / "records.jsonl"), layers=(0, 1), clamps=(1.0,),
        statistics=ue.KeyStatistics.load(place / "stats.safetensors"),
    )  # fmt: skip
    assert document["method"]["layers"] == list(wanted.method.layers)
    assert [row["layer"] for row in document["table"]] == [0, 1]
    assert [row["score"] for row in document["table"]] == pytest.approx(list(wanted.table["score"]))
    assert document["used"] == [0, 1]
    kept = rows.read_text(encoding="utf-8")
    text, _ = run(*command)  # goes on: nothing is left to do
    assert rows.read_text(encoding="utf-8") == kept
    assert "<Suggestion for EMMET" in text
    assert f"wrote {rows}" in text


# -- errors -----------------------------------------------------------------------------------


def test_a_wrong_field_on_line_17(run, place, out):
    path = place.parent / "bad.jsonl"
    lines = [json.dumps({**FACTS[0], "subject": "The tower"}) for _ in range(20)]
    lines[16] = json.dumps({"prompt": PROMPT, "subject": SUBJECT, "target": TARGET})
    path.write_text("\n".join(lines), encoding="utf-8")
    text, err = run(*EDIT, "--facts", path, "--out", out, code=1)
    assert text == ""
    assert err == (
        f"error: {path}, line 17: unknown field 'target'. Did you mean 'target_new'? Expected "
        "fields: 'prompt', 'subject', 'target_new', 'target_true'.\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", *SINGLE, "--model", "./absent", "--layers", "0"), "'./absent' could not"),
        (("edit", *SINGLE, "--model", "model"), "no published setting of layers"),
        ((*EDIT, *SINGLE, "--layers", "0", "7"), "(0, 7) do not fit this model"),
        ((*EDIT, *SINGLE, "--layers", "2"), "no key statistics for layer 2"),
        ((*EDIT, *SINGLE, "--ridge", "-1"), "ridge is -1.0"),
        ((*EDIT, "--facts", "absent.jsonl"), "absent.jsonl: no such file"),
        ((*EDIT, "--facts", "records.jsonl"), "records.jsonl, line 1: this is a record"),
        ((*EDIT, *SINGLE[:3], "The moon", *SINGLE[4:], "--prompt", "The sun is"), "subject does"),
        ((*EDIT[:-1], "absent.safetensors", *SINGLE), "absent.safetensors: there is no such file"),
        ((*EDIT[:-1], "edit.safetensors", *SINGLE), "edit.safetensors holds "),
        ((*EDIT, *SINGLE, "--model", "other"), "not from this model 'other'"),
        ((*EDIT, *SINGLE, "--device", "nowhere"), "device 'nowhere' cannot be used"),
        ((*EDIT, *SINGLE, "--device", "meta"), "device 'meta' cannot be used"),
        (("evaluate", "--model", "model", "--records", "absent"), "'absent' is neither"),
        (("evaluate", "--model", "other", "--records", "records.jsonl", "--edit",
          "edit.safetensors"), "not for this model"),
        (("ask", "--model", "model", "--edit", "stats.safetensors", "a"), "holds 'unified"),
        (("ask", "--model", "model", "  "), "is empty"),
        (("statistics", "--model", "model", "--layers", "0", "--texts", "absent.txt"),
         "absent.txt: cannot be read"),
        (("statistics", "--model", "model", "--layers", "9", "--texts", "texts.txt"),
         "blocks 0.."),
        (("statistics", "--model", "model", "--layers", "0", "--texts", "texts.txt",
          "--shrinkage", "-1"), "shrinkage is -1.0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("json_", [False, True], ids=["people", "json"])
def test_what_the_library_foresaw(arguments, message, json_, run, out):
    if arguments[0] in ("edit", "statistics", "evaluate"):
        arguments = (*arguments, "--out", str(out))
    text, err = run(*arguments, *(["--json"] if json_ else []), code=1)
    assert text == ""
    [told] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in told
    assert not out.exists()


def test_hints_say_the_options(run, out):
    _, err = run("edit", *SINGLE, "--model", "model", "--out", out, code=1)
    assert err.splitlines()[-1] == "hint: these settings are --layers and --ridge"
    twice = out.parent.parent / "twice.jsonl"
    other = {"prompt": "{} was made in", "subject": SUBJECT, "target_new": "Paris"}
    twice.write_text("\n".join(map(json.dumps, [FACTS[0], other])), encoding="utf-8")
    _, err = run(*EDIT, "--facts", twice, "--out", out, code=1)
    assert "share the subject" in err
    assert "--ridge" in err.splitlines()[-1]
    assert "--on-shared-subject merge" in err.splitlines()[-1]
    other = {**FACTS[0], "target_new": "Vienna"}
    twice.write_text("\n".join(map(json.dumps, [FACTS[0], other])), encoding="utf-8")
    _, err = run(*EDIT, "--facts", twice, "--out", out, code=1)
    assert err.splitlines()[-1] == "hint: the last one wins with --on-conflict last"


def test_facts_of_one_subject_and_contradictions(run, out):
    facts = out.parent.parent / "shared.jsonl"
    other = {"prompt": "{} was made in", "subject": SUBJECT, "target_new": "Paris"}
    first = {**FACTS[0], "target_new": "Vienna"}
    given = [first, FACTS[0], other]
    facts.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    options = (*EDIT, "--facts", facts, "--out", out, "--on-conflict", "last")
    text, err = run(*options, "--on-shared-subject", "merge", "--json")
    saved = ue.Edit.load(out)
    assert saved.columns == (0, 0)
    assert [fact.target_new for fact in saved.facts] == [FACTS[0]["target_new"], "Paris"]
    document = json.loads(text)
    assert document["on_shared_subject"] == "merge"
    assert document["id"] == saved.id
    assert "warning: fact 0" in err and "the last one wins" in err
    assert "have one value" in err
    run(*options, "--on-shared-subject", "split", "--force")
    assert ue.Edit.load(out).columns == (0, 1)


@pytest.mark.parametrize("command", ["edit", "statistics", "evaluate"])
def test_nothing_is_overwritten_unasked(command, run, place, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("precious", encoding="utf-8")
    arguments = {
        "edit": [*EDIT, *SINGLE],
        "statistics": ["statistics", "--model", "model", "--layers", "0", "--texts", "texts.txt"],
        "evaluate": ["evaluate", "--model", "model", "--records", "records.jsonl"],
    }[command]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "load_model", None)  # refused before the model is loaded
        out, err = run(*arguments, "--out", path, code=1)
    assert out == ""
    assert err == f"error: {path} is there already; give another name, or --force\n"
    assert path.read_text(encoding="utf-8") == "precious"
    # a run that fails leaves the old file also where it may be replaced
    out, err = run(*arguments, "--model", "./absent", "--out", path, "--force", code=1)
    assert path.read_text(encoding="utf-8") == "precious"
    run(*arguments, "--out", path, "--force")
    assert path.read_bytes() != b"precious"
    assert [path] == list(tmp_path.iterdir())


def test_where_nothing_can_be_written(run, place, monkeypatch):
    monkeypatch.setattr(commands, "load_model", None)
    _, err = run(*EDIT, *SINGLE, "--out", "model", "--force", code=1)
    assert err == "error: model is there and is not a file; give another name\n"
    _, err = run(*EDIT, *SINGLE, "--out", "facts.jsonl/e.safetensors", code=1)
    assert err == (
        "error: facts.jsonl/e.safetensors cannot be written: "
        f"{place / 'facts.jsonl'} is not a writable folder; give another place\n"
    )


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UnifiedEditError, match=r"b\.json cannot be written: .*No space left"):
        write_text(path, "other")
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_what_the_system_says_against_writing(run, out, monkeypatch):
    long = "x" * 300
    for arguments in ([*EDIT, *SINGLE], ["evaluate", "--model", "model", "--limit", "1"]):
        _, err = run(*arguments, "--out", long, code=1)
        assert err.startswith(f"error: {long} cannot be written: ")
        assert err.count("\n") == 1

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)  # after all the work; the folder is as it was
        _, err = run(*EDIT, *SINGLE, "--out", out, code=1)
    assert err.splitlines()[-1].startswith(f"error: {out} cannot be written: [Errno 28] No space")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        patch.setattr(commands, "load_model", None)
        _, err = run(*EDIT, *SINGLE, "--out", out, code=1)
        assert f"{out.parent} is not a writable folder" in err
        _, err = run(*EDIT, *SINGLE, "--out", out, "--force", "--peft", out.parent / "a", code=1)
        assert "is not a writable folder" in err


@pytest.mark.parametrize(
    ("option", "name"), [("--statistics", "stats.safetensors"), ("--edit", "edit.safetensors")]
)
def test_files_of_an_older_version(option, name, run, place, tmp_path):
    with safe_open(place / name, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    kind = metadata["kind"]
    assert kind[-2:] in ("/2", "/3")
    old = tmp_path / name
    save_file(tensors, old, metadata={**metadata, "kind": kind[:-1] + "1"})
    arguments = ["--model", "model", "--records", "records.jsonl", option, old]
    method = ["--method", "EMMET"] if option == "--statistics" else []
    _, err = run("evaluate", *arguments, *method, code=1)
    assert f"error: {old} holds '{kind[:-1]}1', but '{kind}' is needed here" in err
    assert "by an older version of this library: make it again" in err


def test_the_home_folder(run, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    home = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    home.symlink_to(place)
    made = ["e.safetensors", "adapter", "r.json", "t.csv", "s.safetensors"]

    def run_there(command, *arguments):
        found = cli.main([command, "--model", "~/model", *map(str, arguments)])
        assert found == 0

    try:
        run_there(
            "edit", "--facts", "~/facts.jsonl", "--statistics", "~/stats.safetensors",
            "--layers", 0, "--out", "~/e.safetensors", "--peft", "~/adapter",
        )  # fmt: skip
        run_there(
            "evaluate", "--records", "~/records.jsonl", "--edit", "~/e.safetensors",
            "--out", "~/r.json", "--table", "~/t.csv",
        )  # fmt: skip
        run_there(
            "statistics", "--layers", 0, "--texts", "~/texts.txt", "--checkpoint", "~/partial",
            "--out", "~/s.safetensors",
        )  # fmt: skip
        assert all((place / name).exists() for name in made)
        assert list(tmp_path.iterdir()) == [home]
    finally:
        for name in made:
            subprocess.run(["rm", "-r", place / name], check=False)


# -- Ctrl-C -----------------------------------------------------------------------------------

#: The program with a Ctrl-C of its own at one moment: while a module is imported, while something
#: is printed, in a command at work and once more while that is broken off.
STRUCK = """
import os, signal, sys, time
moment = sys.argv.pop(1)
usual = signal.SIG_IGN if moment == "ignored" else signal.default_int_handler
signal.signal(signal.SIGINT, usual)

def strike(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)

def struck_twice(*_, **__):
    try:
        strike()
        time.sleep(60)
    finally:
        print("breaking off", file=sys.stderr, flush=True)
        strike()
        time.sleep(60)

class Lost:
    def __del__(self):  # where exceptions are reported, and nothing more
        strike()
        sum(range(10))

class Paper:
    encoding, write, flush = "utf-8", strike, print

def on_import(event, arguments):
    if event == "import" and arguments[0] == ("argparse" if moment == "ignored" else moment):
        strike()

def installed(*arguments):
    install(*arguments)
    print("ready", flush=True)

install = signal.signal
if moment == "anytime":
    signal.signal = installed
elif moment == "print":
    sys.stdout = Paper()
elif moment in ("load", "lost"):
    from unified_edit.command_line import commands
    commands.load_model = struck_twice if moment == "load" else lambda *_, **__: Lost() and None
else:
    sys.addaudithook(on_import)
from unified_edit.__main__ import main
sys.exit(main())
"""


def start(moment: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STRUCK, moment, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("torch", ""),
        ("transformers", ""),
        ("argparse", ""),
        ("print", ""),
        ("load", "breaking off\n"),
        ("lost", ""),
    ],
)
def test_ctrl_c_at_any_moment(moment, said):
    arguments = ["--version"] if moment in ("argparse", "print") else ["ask", "a"]
    out, err = (program := start(moment, *arguments)).communicate(timeout=300)
    assert (out, err, program.returncode) == ("", f"{said}interrupted\n", 130)


def test_what_ignores_ctrl_c_goes_on():
    out, err = (program := start("ignored", "--version")).communicate(timeout=300)
    assert (out, err, program.returncode) == (f"unified_edit {ue.__version__}\n", "", 0)


def test_help_does_not_wait_for_torch(tmp_path):
    code = """
import sys
from unified_edit.command_line.cli import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers", "pandas"} & set(sys.modules)
"""
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=300,
        )


@pytest.mark.parametrize(("seconds", "times"), [(0, 1), (0.3, 2), (1, 1), (4, 1), (8, 2)])
def test_ctrl_c_after_some_time(seconds, times, tmp_path):
    os.mkfifo(tmp_path / "texts")  # reading it takes as long as nobody writes
    out = tmp_path / "out.safetensors"
    program = start("anytime", "statistics", "--layers", 0, "--texts", tmp_path / "texts",
                    "--out", out)  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    time.sleep(seconds)
    for _ in range(times):
        program.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert program.communicate(timeout=300) == ("", "interrupted\n")
    assert program.returncode == 130
    assert not out.exists()


def test_an_edit_that_was_interrupted_is_in_nobody_s_way(
    run, out, monkeypatch, tmp_path, tiny_texts
):
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(collect, "GROUP", 16)
    monkeypatch.setattr(collect, "CHECKPOINT_TOKENS", 100)

    def texts(stop: int | None):
        for number, text in enumerate(tiny_texts):
            if number == stop:
                raise KeyboardInterrupt  # what Ctrl-C is, where signals are not ignored
            yield text

    def files() -> list[str]:
        return sorted(path.name.partition("-")[0] for path in tmp_path.rglob("*.safetensors"))

    emmet = ["edit", "--model", "model", *SINGLE, "--layers", "0", "--out", out, "--force"]
    memit = [*emmet, "--method", "MEMIT", "--layers", "0", "1", "--ridge", "1"]
    monkeypatch.setattr(cache, "default_corpus", lambda model: texts(stop=40))
    with pytest.raises(KeyboardInterrupt):
        run(*emmet)
    assert files() == ["partial"]
    assert not out.exists()
    monkeypatch.setattr(cache, "default_corpus", lambda model: texts(stop=None))
    _, err = run(*memit)
    assert "going on" not in err
    assert files() == ["layer", "layer", "partial"]
    assert ue.Edit.load(out).layers == (0, 1)
    for path in tmp_path.rglob("layer-0.safetensors"):
        path.unlink()
    _, err = run(*emmet)  # goes on where it was interrupted
    assert "note: going on after 32 texts from " in err
    assert files() == ["layer", "layer"]


# -- the program ------------------------------------------------------------------------------


def test_what_nobody_foresaw_is_not_hidden(run, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "load_model", broken)
    with pytest.raises(ZeroDivisionError):
        run("ask", "--model", "model", "a")


def test_what_others_print_does_not_spoil_the_json(run, monkeypatch):
    load = commands.load_model

    def chatty(*arguments, **options):
        print("hello from elsewhere")
        logging.getLogger("unified_edit.somewhere").info("a note")
        return load(*arguments, **options)

    monkeypatch.setattr(commands, "load_model", chatty)
    handlers, level = list(logging.getLogger("unified_edit").handlers), _level()
    text, err = run("ask", "--model", "model", "--json", "a")
    json.loads(text)
    assert "hello from elsewhere" in err
    assert "note: a note\n" in err
    assert logging.getLogger("unified_edit").handlers == handlers
    assert _level() == level


def _level() -> int:
    return logging.getLogger("unified_edit").level


def test_a_terminal_that_cannot_show_everything(place, monkeypatch):
    monkeypatch.chdir(place)
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert cli.main(["ask", "--model", "model", "Málaga", "-k", "1"]) == 0
    assert buffer.getvalue().startswith(b"M\\xe1laga")


def test_a_reader_that_went_away(place, monkeypatch, tmp_path, capfd):
    class Closed(io.StringIO):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def write(self, text: str) -> int:
            raise BrokenPipeError(text)

        def fileno(self) -> int:
            return self.number

    monkeypatch.chdir(place)
    number = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_CREAT)
    try:
        monkeypatch.setattr(sys, "stdout", Closed(number))
        assert cli.main(["ask", "--model", "model", "a"]) == 1
        os.write(number, b"lost")  # goes to the null device now
    finally:
        os.close(number)
    assert (tmp_path / "pipe").read_bytes() == b""
    assert "Traceback" not in capfd.readouterr().err


def test_json_has_no_numbers_that_json_has_not():
    document = {"a": float("nan"), 1: [float("inf"), (2.5, None, True)], "é": "é"}
    text = to_json(document)
    assert text.isascii()
    assert json.loads(text) == {"a": None, "1": [None, [2.5, None, True]], "é": "é"}


def test_tables_for_people():
    rows = [
        {"name": "a\nb", "n": 1, "p": 0.123456, "ok": True},
        {"name": "x" * 99, "n": 22, "p": 1e-9, "ok": False},
    ]
    assert format_table(pd.DataFrame(rows)).splitlines() == [
        "  name" + " " * (console.CELL - 4) + "   n      p  ok ",
        "  a b" + " " * (console.CELL - 3) + "   1  0.123  yes",
        "  " + "x" * (console.CELL - 3) + "...  22  1e-09  no ",
    ]
    many = format_table(pd.DataFrame({"n": range(console.ROWS + 5)})).splitlines()
    assert len(many) == console.ROWS + 2
    assert many[:3] == ["   n", "   0", "   1"]
    assert many[-1] == "  ... and 5 more (--json shows all)"
    names = format_table(pd.DataFrame([{"short": 1.0, "longer name": 2, "word": "a"}])).splitlines()
    assert names == ["  short  longer name  word", "      1            2  a   "]
