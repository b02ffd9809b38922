"""Sums of key statistics: exact for every family, in parts, in passes, in files, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reference
import torch
from fixtures_tiny import Factory, byte_level_tokenizer, own_seed, sentences
from safetensors import safe_open
from test_families import TINY, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import unified_edit as ue
from unified_edit.errors import ModelError, StatisticsError, StatisticsFileError
from unified_edit.model import anatomy
from unified_edit.model.fingerprints import tensor_hash
from unified_edit.model.tensor_files import write_safetensors
from unified_edit.statistics import (
    Source,
    cache,
    collect,
    dataset_texts,
    default_corpus,
    file_texts,
    files,
    forwards,
    sums,
    wikipedia,
)

#: Of float64 sums of the same products in another order: some ten of them, of entries that are no
#: larger than the trace.
SAME = 1e-14


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 20 texts, so that the small corpus has eleven; and a buffer that overflows."""
    monkeypatch.setattr(collect, "GROUP", 20)
    monkeypatch.setattr(sums, "ROWS", 100)
    monkeypatch.setattr(sums, "THINNEST", 10)


@pytest.fixture
def made(make_gpt2: Factory, tiny_tokenizer: Any, tiny_texts: list[str]) -> Any:
    """made(**options): statistics of layers 0 and 2 of the tiny model."""
    model = make_gpt2()

    def collected(texts: Any = tiny_texts, layers: Any = (0, 2), **options: Any) -> Any:
        return ue.KeyStatistics.collect(model, tiny_tokenizer, texts, layers, **options)

    return collected


def apart(one: Any, other: Any, layer: int) -> float:
    """Largest difference of two C0, as a share of the trace."""
    wanted = other.C0(layer)
    return float((one.C0(layer) - wanted).abs().max() / wanted.trace())


@pytest.mark.parametrize("name", sorted(TINY))
def test_c0_is_that_of_one_text_at_a_time(
    name: str, tiny_tokenizer: Any, tiny_texts: list[str]
) -> None:
    model = tiny_model(name, len(tiny_tokenizer)).float()
    texts = tiny_texts[::16]
    found = ue.KeyStatistics.collect(
        model, tiny_tokenizer, texts, (0, 2), shrinkage=1e-3, batch_tokens=60
    )
    for layer in (0, 2):
        rows = [reference.encode(tiny_tokenizer, text) for text in texts]
        keys = torch.cat([reference.keys_of_text(model, ids, layer) for ids in rows]).double()
        wanted = keys.T @ keys / len(keys)
        wanted.diagonal().add_(1e-3 * wanted.diagonal().mean())
        # float32 forwards of other batches, and float32 products
        assert float((found.C0(layer) - wanted).norm() / wanted.norm()) < 1e-5
        assert found.C0(layer).equal(found.C0(layer).T)
    assert found.source.tokens == sum(map(len, rows))


def test_nothing_above_the_deepest_layer_is_computed(
    make_gpt2: Factory, tiny_tokenizer: Any, tiny_texts: list[str]
) -> None:
    """Not even the product behind the deepest keys."""
    model = make_gpt2()
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts[:20], (0, 2), shrinkage=1e-2)
    assert "transformer.h.2.mlp.c_fc" in ran and "transformer.h.1.mlp.c_proj" in ran
    assert not {"transformer.h.2.mlp.c_proj", "transformer.h.3", "transformer.ln_f"} & set(ran)


def test_batches_do_not_say_which_keys_are_set_aside(made: Any) -> None:
    wide, narrow = made(), made(batch_tokens=1)
    assert wide.source == narrow.source
    for layer in (0, 2):
        assert apart(wide, narrow, layer) < 1e-6
        assert torch.allclose(wide.fresh[layer], narrow.fresh[layer], atol=1e-5)
        assert wide.agreement[layer] == pytest.approx(narrow.agreement[layer], rel=1e-3)


def test_a_batch_that_memory_does_not_suffice_for_is_run_in_two(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, usual, tries = made(), forwards.left_padded, []

    def scarce(rows: Any, device: Any, most: int = 7) -> Any:
        tries.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("no room")
        return usual(rows, device)

    monkeypatch.setattr(forwards, "left_padded", scarce)
    found = made()
    assert max(tries) > 7
    assert found.source == whole.source
    assert apart(found, whole, 2) < 1e-6
    monkeypatch.setattr(forwards, "left_padded", lambda *given: scarce(*given, most=0))
    with pytest.raises(ModelError, match=r"even for one at a time.*shorter texts"):
        made()


def test_where_sums_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model, where there is room for them and for as much again, and float64."""
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 4000))
    assert sums.place_for(card, 500) == card
    assert sums.place_for(card, 501) == cpu
    assert sums.place_for(torch.device("mps"), 1) == cpu
    assert sums.place_for(cpu, 10**15) == cpu


def test_batches_fit_the_memory_of_a_card(
    make_gpt2: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = anatomy(make_gpt2())
    weights = [parts.weight(layer) for layer in (0, 2)]
    assert forwards.batch_size(parts, weights) == 512
    monkeypatch.setattr(type(parts.model), "device", torch.device("cuda", 0))
    # a token takes four bytes in each of 4 * 48 + 2 * 48 entries, and a quarter may be taken
    for free, tokens in ((10**9, 8192), (4 * 8192 * 4 * 288 - 1, 4096), (0, 512)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 10**9))
        assert forwards.batch_size(parts, weights) == tokens


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])
def test_shares_add_up_to_one_run(made: Any, tmp_path: Path, number: int) -> None:
    shares = [made(part=(index, number)) for index in range(number)]
    assert [one.source.part for one in shares] == [f"{i} of 0..{number - 1}" for i in range(number)]
    for index, one in enumerate(shares):
        one.save(tmp_path / f"{index}.safetensors")
    read = [ue.KeyStatistics.load(tmp_path / f"{index}.safetensors") for index in range(number)]
    whole, joined = made(), ue.KeyStatistics.joined(read)
    assert joined.source == replace(whole.source, corpus=joined.source.corpus)
    backwards = ue.KeyStatistics.joined(shares[::-1])
    in_steps = ue.KeyStatistics.joined([ue.KeyStatistics.joined(shares[:-1]), shares[-1]])
    for layer in (0, 2):
        assert apart(joined, whole, layer) < SAME
        assert joined.C0(layer).equal(backwards.C0(layer))
        assert apart(in_steps, whole, layer) < SAME
        assert joined.convergence(layer) == pytest.approx(disagreement(shares, layer), rel=1e-4)
    assert in_steps.source.part is None and in_steps.source.tokens == whole.source.tokens


def disagreement(shares: Any, layer: int) -> float:
    """Of the shares in turn, on the keys set aside in the first, written out."""
    fresh = shares[0].fresh[layer].double()
    sums_, counts = [-fresh.T @ fresh, torch.zeros(48, 48).double()], [-len(fresh), 0]
    for place, one in enumerate(shares):
        sums_[place % 2] += one.source.tokens * one.C0(layer)
        counts[place % 2] += one.source.tokens
    first, second = (
        (fresh @ torch.linalg.inv(total / count) * fresh).sum(1)
        for total, count in zip(sums_, counts, strict=True)
    )
    return float((first / second - 1).abs().median())


def test_texts_of_two_corpora_add_up(made: Any, tiny_texts: list[str]) -> None:
    """By their numbers of tokens, though neither is a share of the other's corpus."""
    first, second = made(tiny_texts[:60]), made(tiny_texts[60:])
    joined, whole = ue.KeyStatistics.joined([second, first]), made()
    assert joined.source.tokens == whole.source.tokens
    assert joined.source.texts == len(tiny_texts)
    assert apart(joined, whole, 2) < 1e-6  # other groups: other float32 products


def test_what_is_counted_twice_is_not_added_up(made: Any, tiny_texts: list[str]) -> None:
    def refused(words: str, *each: Any) -> None:
        with pytest.raises(StatisticsError, match=words):
            ue.KeyStatistics.joined(each)

    with pytest.raises(StatisticsError, match="no statistics to join"):
        ue.KeyStatistics.joined([])

    first, second = (made(part=(index, 2)) for index in range(2))
    refused(r"the same share of one corpus \(1 of 0..1\)", first, second, second)
    refused(r"the same share of one corpus \(0 of 0..0\)", made(), made(tokens=700))
    refused("texts in statistics number 0 are in number 1 too", second, made(tiny_texts[:60]))
    # a share of the same texts in another order is no share of the same corpus
    refused("texts in statistics number 0 are in", first, made(tiny_texts[::-1], part=(1, 2)))
    assert ue.KeyStatistics.joined([first, second]).source.part is None


def test_parts_that_count_otherwise_are_not_added_up(made: Any) -> None:
    first, second = (made(part=(index, 2)) for index in range(2))

    def refused(words: str, other: Any) -> None:
        with pytest.raises(StatisticsError, match=words):
            ue.KeyStatistics.joined([first, other])

    refused("same max_tokens", made(part=(1, 2), max_tokens=5))
    refused("same skip_start", made(part=(1, 2), skip_start=True))
    refused("one dtype", replace(second, source=replace(second.source, dtype="bfloat16")))
    refused("same weighting", replace(second, source=replace(second.source, weighting="norm")))
    refused("different models", replace(second, source=replace(second.source, fingerprint="a")))
    refused("shrink the sum", second.shrunk(0.1))
    refused("older version", replace(second, counted=None))
    refused("share layers and some do not", made(layers=(2,), part=(1, 2)))


def test_too_little_in_all_shares_together(made: Any, tiny_texts: list[str]) -> None:
    """One share may have less than C0 needs; all of them may not."""
    monotone = ["Rome"] * 80
    shares = [made(monotone, part=(index, 2)) for index in range(2)]
    with pytest.raises(StatisticsError, match="fewer than 2"):
        ue.KeyStatistics.joined(shares)
    with pytest.raises(StatisticsError, match=r"no tokens for share 1 of 0\.\.1"):
        made(tiny_texts[:20], part=(1, 2))


def test_each_share_draws_its_part_of_the_tokens(made: Any) -> None:
    shares = [made(tokens=900, part=(index, 3)) for index in range(3)]
    assert all(300 <= one.source.tokens < 320 for one in shares)


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0), 1, "01", (0, 1, 2), None], ids=repr)
def test_a_wrong_part(made: Any, part: Any) -> None:
    with pytest.raises(StatisticsError, match="part"):
        made(part=part)


# --- memory ---------------------------------------------------------------------------------------


def test_sums_in_passes_and_in_files_are_the_same(made: Any, tmp_path: Path) -> None:
    whole = made(layers=(0, 1, 2))
    one = sums.LayerSums.needed(48)
    in_passes = made(layers=(0, 1, 2), max_memory=2 * one)
    in_files = made(layers=(0, 1, 2), max_memory=one, folder=tmp_path)
    for found in (in_passes, in_files):
        assert found.source == whole.source and found.agreement == whole.agreement
        assert found.layers == (0, 1, 2)
        assert all(found.C0(layer).equal(whole.C0(layer)) for layer in (0, 1, 2))
    assert list(tmp_path.iterdir()) == []  # they go with the process that has them open


def test_sums_that_do_not_fit(made: Any, tiny_texts: list[str], tmp_path: Path) -> None:
    one = sums.LayerSums.needed(48)
    with pytest.raises(StatisticsError, match=r"layer 0 take.*more than max_memory = 1,000"):
        made(max_memory=1000)
    with pytest.raises(StatisticsError, match="2 passes over the texts are needed: give a list"):
        made(iter(tiny_texts), max_memory=one)
    (tmp_path / "file").write_text("")
    with pytest.raises(StatisticsError, match=r"which cannot be had.*Give another folder"):
        made(max_memory=1, folder=tmp_path / "file")


def test_each_pass_goes_on_where_it_was(
    made: Any, tiny_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "CHECKPOINT_TOKENS", 1)
    room, path = sums.LayerSums.needed(48), tmp_path / "partial.safetensors"

    class Broken(list[str]):
        """A list that breaks off when it is read again."""

        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            for number, text in enumerate(super().__iter__()):
                if self.times == 2 and number == 100:
                    raise KeyboardInterrupt
                yield text

    with pytest.raises(KeyboardInterrupt):
        made(Broken(tiny_texts), max_memory=room, checkpoint=path)
    assert {one.name for one in tmp_path.iterdir()} == {
        "partial-0.safetensors", "partial-1.safetensors",
    }  # fmt: skip
    found, whole = made(max_memory=room, checkpoint=path), made()
    assert found.source == whole.source
    assert all(found.C0(layer).equal(whole.C0(layer)) for layer in (0, 2))
    assert list(tmp_path.iterdir()) == []


def test_it_stops_where_the_halves_agree(made: Any, tiny_texts: list[str], tmp_path: Path) -> None:
    texts = [f"{text} {number}" for number in range(4) for text in tiny_texts]
    whole = made(texts)
    found = made(texts, until=1.0)
    assert 4 * 48 <= found.source.tokens < whole.source.tokens
    assert all(one <= 1.0 for one in found.agreement.values())
    assert made(texts, until=1e-9).source.tokens == whole.source.tokens
    with pytest.raises(StatisticsError, match="until"):
        made(texts, until=0)


def collected_until(at: int, path: Path) -> ue.KeyStatistics:
    """Statistics of a tiny model; at one text the process is killed."""
    texts = sentences()
    tokenizer = byte_level_tokenizer(texts)
    with own_seed(0):
        size = {"n_positions": 128, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 48}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).eval()

    def reading() -> Iterator[str]:
        for number, text in enumerate(texts):
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield text

    return ue.KeyStatistics.collect(model, tokenizer, reading(), (0, 1), checkpoint=path)


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from unified_edit.statistics import collect, sums
collect.GROUP, collect.CHECKPOINT_TOKENS, sums.ROWS, sums.THINNEST = 20, 1, 100, 10
from test_statistics_parts import collected_until
collected_until(130, __import__("pathlib").Path(sys.argv[2]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """kill -9 in the middle: what is there is whole, and the run ends as if undisturbed."""
    path, tests = tmp_path / "partial", Path(__file__).parent
    command = [sys.executable, "-c", _KILLED, str(tests), str(path)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [one.name for one in tmp_path.iterdir()] == ["partial"]
    whole = collected_until(-1, tmp_path / "other")
    resumed = collected_until(-1, path)
    assert resumed.source == whole.source and resumed.agreement == whole.agreement
    assert all(resumed.C0(layer).equal(whole.C0(layer)) for layer in (0, 1))


# --- files of older versions ----------------------------------------------------------------------


def as_older(path: Path) -> None:
    """Make of a file what the version before would have written."""
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys() if name[:2] == "C0"}  # noqa: SIM118
    found = files.read(path)
    meta = {
        "source": {name: value for name, value in vars(found.source).items() if name != "part"},
        "agreement": found.agreement,
    }
    write_safetensors(path, tensors, files.OLDER, meta, StatisticsFileError)


def test_a_file_of_an_older_version_is_read(made: Any, tmp_path: Path) -> None:
    found, path = made(), tmp_path / "c0.safetensors"
    found.save(path)
    as_older(path)
    older = ue.KeyStatistics.load(path)
    assert older.source == found.source and older.counted is None
    assert older.C0(2).equal(found.C0(2))


def test_a_file_of_an_older_version_in_the_cache_is_made_again(
    make_gpt2: Factory, tiny_tokenizer: Any, tiny_texts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "default_corpus", lambda _model: iter(tiny_texts))
    first = cache.statistics_for(make_gpt2(), tiny_tokenizer, (1,))
    (path,) = tmp_path.rglob("layer-1*")
    before = tensor_hash(first.C0(1))
    as_older(path)
    again = cache.statistics_for(make_gpt2(), tiny_tokenizer, (1,))
    assert "of an older version" in caplog.text
    assert tensor_hash(again.C0(1)) == before
    assert ue.KeyStatistics.load(path).counted is not None
    part = ue.KeyStatistics.collect(make_gpt2(), tiny_tokenizer, tiny_texts, (1,), part=(0, 2))
    part.save(path)
    cache.statistics_for(make_gpt2(), tiny_tokenizer, (1,))
    assert "of a part of the text only" in caplog.text


def test_a_source_is_read_without_what_came_later() -> None:
    fields = {"fingerprint": "f", "model": "m", "revision": None, "dtype": "float32"}
    old = Source(**fields, corpus="c", texts=1, tokens=2, max_tokens=3, library="1")  # type: ignore[arg-type]
    assert old.part is None


# --- texts ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for `datasets`: hub(records) is what is loaded; the list says what was asked for."""
    asked: list[Any] = []
    module: Any = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)

    def give(records: Any) -> list[Any]:
        def load_dataset(*given: Any, **more: Any) -> Any:
            asked.append((given, more))
            return iter(records)

        module.load_dataset = load_dataset
        return asked

    return give


def test_texts_of_a_data_set(hub: Any, make_gpt2: Factory) -> None:
    long = "a" * 300
    asked = hub([{"text": "short", "body": "b"}, {"text": long, "body": ""}])
    assert list(dataset_texts("name", "config", split="test", streaming=False)) == ["short", long]
    assert asked[-1] == (("name", "config"), {"split": "test", "streaming": False})
    hub([{"text": "short", "body": "b"}, {"text": long, "body": ""}])
    assert list(dataset_texts("name", column="body")) == ["b"]
    hub([{"text": long}, {"text": "= stub ="}])
    assert list(wikipedia()) == [long]
    assert asked[-1][0] == ("wikimedia/wikipedia", "20231101.en")
    hub([{"text": f" {long}\n"}, {"text": " = heading = "}])
    assert list(default_corpus(make_gpt2())) == [long]
    assert asked[-1][0] == ("Salesforce/wikitext", "wikitext-103-raw-v1")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": None}, "record 1 of name .train. holds None in column 'text'"),
        ({"text": 5}, "record 1 of name .train. holds 5"),
        ({"text": ["a"]}, "record 1 of name"),
        ({"body": "a"}, r"record 1 of name .* no column 'text', only \['body'\]"),
        ("a", "record 1 of name .* not a record"),
    ],
    ids=repr,
)
def test_a_broken_record_is_named(hub: Any, record: Any, words: str) -> None:
    hub([{"text": "fine"}, record])
    with pytest.raises(StatisticsError, match=words):
        list(dataset_texts("name"))


def test_a_data_set_that_breaks_off(hub: Any) -> None:
    def records() -> Any:
        yield {"text": "one"}
        yield {"text": "two"}
        raise ConnectionError("the line is dead")

    hub(records())
    with pytest.raises(StatisticsError, match=r"after record 1 of name \(train\): ConnectionError"):
        list(dataset_texts("name"))


def test_texts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("four\nfive\n", encoding="utf-8")
    both = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert list(file_texts(both)) == ["one\ntwo", "three", "four", "five"]
    assert list(file_texts(str(both[0]), "lines")) == ["one", "two", "three"]
    with pytest.raises(StatisticsFileError, match="cannot be read"):
        list(file_texts(tmp_path / "none.txt"))
    with pytest.raises(StatisticsError, match="split is 'words'"):
        list(file_texts(both, "words"))


def test_a_truncated_checkpoint_is_not_gone_on_from(
    made: Any, tiny_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "CHECKPOINT_TOKENS", 1)
    path = tmp_path / "partial.safetensors"

    def reading() -> Any:
        yield from tiny_texts[:130]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(reading(), checkpoint=path, part=(1, 2))
    with pytest.raises(StatisticsError, match="another run"):
        made(checkpoint=path, part=(0, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(StatisticsFileError, match="truncated"):
        made(checkpoint=path, part=(1, 2))
    path.write_bytes(whole)
    found, wanted = made(checkpoint=path, part=(1, 2)), made(part=(1, 2))
    assert found.source == wanted.source and found.C0(2).equal(wanted.C0(2))
    assert found.counted.texts.equal(wanted.counted.texts)
    assert found.counted.marks.equal(wanted.counted.marks)
    assert not path.exists()
