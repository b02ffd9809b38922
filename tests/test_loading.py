"""Loading: whole or not at all, nothing that runs code, and a message that says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from checkout import ROOT
from fixtures_refusals import FACTS, SPREAD, TOWER
from fixtures_tiny import LAYERS
from safetensors.torch import load_file, save_file

import unified_edit as ue
from unified_edit.errors import ModelError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(make_gpt2, tiny_tokenizer, tmp_path):
    """(a model, a folder with its tokenizer and nothing else)."""
    tiny_tokenizer.save_pretrained(tmp_path)
    return make_gpt2(), tmp_path


@pytest.fixture
def saved(folder):
    """A folder with a whole model."""
    model, path = folder
    model.save_pretrained(path)
    return path


def said(path, **arguments):
    """What the ModelError says that loading `path` raises."""
    with pytest.raises(ModelError) as caught:
        ue.load_model(str(path), **arguments)
    assert caught.type is ModelError
    return str(caught.value)


def same_weights(model, loaded):
    found = dict(loaded.named_parameters())
    return all(torch.equal(value, found[name]) for name, value in model.named_parameters())


def test_local_folders_load_from_safetensors(folder):
    model, path = folder
    model.save_pretrained(path)
    loaded, tokenizer = ue.load_model(str(path))
    assert not loaded.training
    assert tokenizer.is_fast
    assert same_weights(model, loaded)
    half, _ = ue.load_model(str(path), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert same_weights(model, ue.load_model(path)[0])  # a Path is as good as a text


def test_the_user_s_own_folder(folder, monkeypatch):
    model, path = folder
    model.save_pretrained(path)
    monkeypatch.setenv("HOME", str(path.parent))
    assert same_weights(model, ue.load_model(f"~/{path.name}")[0])


def test_shards_of_an_index_load_together(folder):
    model, path = folder
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert same_weights(model, ue.load_model(path)[0])


def test_pickled_weights_only_on_request_and_restricted(folder):
    model, path = folder
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    message = said(path)
    for word in ("allow_bin=True", "weights_only=True", "save_pretrained"):
        assert word in message
    loaded, _ = ue.load_model(str(path), allow_bin=True)
    assert same_weights(model, loaded)


class _Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_code_in_a_pickle_does_not_run(folder, capsys):
    model, path = folder
    model.config.save_pretrained(path)
    torch.save({**model.state_dict(), "evil": _Evil()}, path / "pytorch_model.bin")
    assert "could not be read" in said(path, allow_bin=True)
    assert "must not run" not in capsys.readouterr().out


def test_remote_code_never_runs(saved):
    config = (saved / "config.json").read_text()
    marker = saved / "it_ran"
    (saved / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    changed = config.replace(
        '"model_type": "gpt2"',
        '"model_type": "own", "auto_map": {"AutoConfig": "own.Own", '
        '"AutoModelForCausalLM": "own.Model"}',
    )
    assert changed != config
    (saved / "config.json").write_text(changed)
    said(saved)
    assert not marker.exists()


def test_a_model_that_is_not_there(tmp_path):
    assert "could not be loaded" in said(tmp_path / "nothing")
    for name in ("", None, 5):
        with pytest.raises(ModelError, match="give 'atlas', a folder, or a Hub name"):
            ue.load_model(name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float33"}, ["'float33'", "not a torch type"]),
        ({"dtype": "int8"}, ["'int8'", "holds no weights"]),
        ({"device": "nowhere"}, ["'nowhere'", "could not be moved"]),
    ],
    ids=["no type", "whole numbers", "no device"],
)
def test_a_type_or_place_that_there_is_not(arguments, words):
    message = said("atlas", **arguments)
    for word in words:
        assert word in message


# --- checkpoints that are not whole ---


def rewritten(path, change):
    """Replace the weights of a folder by what `change` makes of them."""
    tensors = change(load_file(path / WEIGHTS))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / WEIGHTS,
              metadata={"format": "pt"})  # fmt: skip


def configured(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


GONE = "transformer.h.1.mlp.c_fc.weight"


def compiled(path):
    rewritten(path, lambda tensors: {f"_orig_mod.{n}": value for n, value in tensors.items()})


def data_parallel(path):
    rewritten(path, lambda tensors: {f"module.{n}": value for n, value in tensors.items()})


def peft_wrapped(path):
    rewritten(path, lambda tensors: {f"base_model.model.{n}": v for n, v in tensors.items()})


def one_missing(path):
    rewritten(path, lambda tensors: {n: v for n, v in tensors.items() if n != GONE})


def one_too_many(path):
    rewritten(path, lambda tensors: {**tensors, "transformer.h.1.adapter.weight": torch.ones(2)})


def one_narrower(path):
    rewritten(path, lambda tensors: {**tensors, GONE: tensors[GONE][:, :40]})


def a_layer_less_than_saved(path):
    configured(path, n_layer=LAYERS - 1)


def a_layer_more_than_saved(path):
    configured(path, n_layer=LAYERS + 1)


MISFITS = {
    compiled: ["torch.compile", "'_orig_mod.'", "model._orig_mod"],
    data_parallel: ["DataParallel", "'module.'", "model.module"],
    peft_wrapped: ["PEFT", "'base_model.model.'", "merge_and_unload"],
    one_missing: ["1 weights of the model are missing", GONE, "complete checkpoint"],
    one_too_many: ["1 of its weights are none of the model's", "h.1.adapter", "config.json"],
    one_narrower: ["another shape", GONE, "config.json"],
    a_layer_less_than_saved: [f"transformer.h.{LAYERS - 1}.", "none of the model's", "layers"],
    a_layer_more_than_saved: [f"transformer.h.{LAYERS}.", "are missing", "number of layers"],
}


@pytest.mark.parametrize("damage", MISFITS, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_does_not_fit(saved, damage):
    damage(saved)
    message = said(saved)
    for word in (str(saved), *MISFITS[damage]):
        assert word in message, f"{word!r} is not in: {message}"


def test_the_names_of_wrapped_weights_can_be_mended(saved):
    """What the message asks for must work."""
    compiled(saved)
    rewritten(saved, lambda tensors: {n.removeprefix("_orig_mod."): v for n, v in tensors.items()})
    ue.load_model(saved)


def truncated(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def emptied(path):
    (path / WEIGHTS).write_bytes(b"")


def web_page(path):
    (path / WEIGHTS).write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>\n")


def lfs_pointer(path):
    (path / WEIGHTS).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"
    )


def shard_missing(path):
    model, _ = ue.load_model(path)
    (path / WEIGHTS).unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    sorted(path.glob("model-*.safetensors"))[1].unlink()


def weights_missing(path):
    (path / WEIGHTS).unlink()


def unknown_activation(path):
    configured(path, activation_function="gelu_of_tomorrow")


def config_broken(path):
    content = (path / "config.json").read_text()
    (path / "config.json").write_text(content[: len(content) // 2])


def config_of_nothing(path):
    (path / "config.json").write_text("{}")


def tokenizer_broken(path):
    content = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(content[: len(content) // 2])


DAMAGED = {
    truncated: ["missing or damaged", "download the folder again"],
    emptied: [f"{WEIGHTS} is empty", "Download the folder again"],
    web_page: [f"{WEIGHTS} is a web page", "the download failed"],
    lfs_pointer: [f"{WEIGHTS} is a pointer of git lfs", "git lfs pull"],
    shard_missing: ["model-00002-of", "missing or damaged", "download the folder again"],
    weights_missing: [WEIGHTS, "download the folder again"],
    unknown_activation: ["gelu_of_tomorrow"],
    config_broken: ["config.json", "download the folder again"],
    config_of_nothing: ["config.json", "model_type"],
    tokenizer_broken: ["no tokenizer", "tokenizer.json", "download the folder again"],
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
def test_a_damaged_folder(saved, damage):
    damage(saved)
    message = said(saved)
    for word in (str(saved), "could", "be loaded", *DAMAGED[damage]):
        assert word in message, f"{word!r} is not in: {message}"


def test_a_folder_without_a_tokenizer(make_gpt2, tmp_path):
    """transformers makes one of the family's class then, with no word in it."""
    make_gpt2().save_pretrained(tmp_path)
    message = said(tmp_path)
    for word in (str(tmp_path), "no tokenizer", "knows no words", "tokenizer.save_pretrained"):
        assert word in message, f"{word!r} is not in: {message}"


def test_nothing_is_random_in_a_loaded_model(saved):
    """A weight that is not in the file would be drawn anew: two loads would differ."""
    first, second = (ue.load_model(saved)[0] for _ in range(2))
    assert same_weights(first, second)


# --- where it goes, and what it takes --------------------------------------------------------

PEAK = """
import sys, threading, time
import torch, unified_edit as ue

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)

ue.load_model(sys.argv[1], dtype=sys.argv[3])  # what is imported and made once
before, done = anonymous(), threading.Event()
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
model, _ = ue.load_model(sys.argv[2], dtype=sys.argv[3])
for weight in model.parameters():
    weight.data.add_(0)  # files are mapped until somebody writes
done.set()
thread.join()
print((peak[0] - before) / sum(weight.nbytes for weight in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux says")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_second_copy_is_made(make_gpt2, tiny_tokenizer, tmp_path, dtype) -> None:
    """Of 25 million weights; pages of files that are mapped are the system's, not the process's."""
    for name, width in (("small", 24), ("large", 640)):
        make_gpt2(n_embd=width, n_layer=5, n_inner=4 * width).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert float(out.split()[-1]) <= 1.2


def test_a_map_of_devices(saved, make_gpt2) -> None:
    loaded, _ = ue.load_model(saved, device_map={"": "cpu"})
    assert same_weights(make_gpt2(), loaded)
    message = said(saved, device_map="auto", device="cpu")
    assert "device_map" in message and "no device besides" in message


def test_what_is_offloaded_to_disk_is_refused(saved, tmp_path) -> None:
    places = {"transformer": "cpu", "transformer.h.2": "disk", "lm_head": "cpu"}
    assert "offload" in said(saved, device_map=places)


def test_a_map_of_devices_needs_accelerate(saved, monkeypatch) -> None:
    monkeypatch.setattr("unified_edit.model.load.find_spec", lambda name: None)
    assert "pip install accelerate" in said(saved, device_map="auto")


@pytest.mark.parametrize("second", ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])])
def test_a_model_on_several_devices_is_edited_like_any_other(
    make_gpt2, tiny_tokenizer, statistics_of, second
) -> None:
    """Each block's own hook brings to its device what enters it."""
    plain, spread = make_gpt2(), make_gpt2()
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "lm_head": "cpu"}
    places |= {f"transformer.h.{n}": "cpu" if n < 2 else second for n in range(LAYERS)}
    places |= {"transformer.ln_f": second}
    accelerate.dispatch_model(spread, places, main_device="cpu", force_hooks=True)
    assert hasattr(spread.transformer.h[3], "_hf_hook")
    record = ue.Record(TOWER, paraphrases=("I walked from the tower in the city of",))
    found = []
    for model in (plain, spread):
        statistics = statistics_of(model)
        edit = ue.edit(model, tiny_tokenizer, FACTS, SPREAD, statistics=statistics)
        report = ue.evaluate(model, tiny_tokenizer, record)
        found.append((edit, report))
        edit.undo()
    (one, before), (other, after) = found
    # on another device sums are rounded otherwise, in float32
    close = 0.0 if second == "cpu" else 1e-2
    for layer in one.layers:
        assert (
            float((one.delta(layer) - other.delta(layer)).norm()) <= close * one.delta(layer).norm()
        )
    assert after.table["logp_new"].tolist() == pytest.approx(
        before.table["logp_new"].tolist(), abs=close, rel=0
    )
    assert all(
        torch.equal(weight, found.cpu())
        for weight, found in zip(plain.parameters(), spread.parameters(), strict=True)
    )
