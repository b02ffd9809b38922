"""Values from the cache: the same as optimised ones, and never those of something else."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from recipe import TINY_FACTS

import unified_edit as ue
from unified_edit.editing import (
    Values,
    editor,
    layer_loop,
    optimise_values,
    values_cache,
    values_for,
)
from unified_edit.editing.values_cache import FORMAT
from unified_edit.errors import FactError
from unified_edit.model.tensor_files import read_safetensors, write_safetensors

METHOD = ue.EMMET.replace(layers=(1,), steps=3, contexts=ue.Contexts(starts=("The",), lengths=(3,)))
FACTS, THIRD = TINY_FACTS[:2], TINY_FACTS[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpt2(make_gpt2, tiny_tokenizer):
    return make_gpt2(), tiny_tokenizer


@pytest.fixture
def optimised(monkeypatch):
    """The lists of facts whose values have been optimised, in order."""
    lists = []

    def noting(parts, rows, *arguments, **keywords):
        lists.append(rows.facts)
        return compute(parts, rows, *arguments, **keywords)

    compute = editor.compute_values
    for module in (editor, layer_loop):
        monkeypatch.setattr(module, "compute_values", noting)
    return lists


def files(cache):
    return sorted(cache.rglob("values/*.safetensors"))


def same(one, other):
    assert torch.equal(one.delta, other.delta)
    assert torch.equal(one.target_init, other.target_init)
    for field in ("facts", "layer", "site", "losses", "conditions"):
        assert getattr(one, field) == getattr(other, field)


def test_the_second_time_they_are_read(gpt2, cache, optimised):
    wanted = optimise_values(*gpt2, FACTS, METHOD)
    first = values_for(*gpt2, FACTS, METHOD)
    assert len(files(cache)) == len(FACTS)
    assert optimised == [FACTS, FACTS]
    second = values_for(*gpt2, list(FACTS), METHOD)
    assert optimised == [FACTS, FACTS]
    same(first, wanted)
    same(second, wanted)


def test_a_fact_is_found_whatever_others_it_is_asked_for_with(gpt2, cache, optimised):
    known = values_for(*gpt2, FACTS, METHOD)
    again = values_for(*gpt2, [FACTS[1], THIRD, FACTS[0]], METHOD)
    assert optimised == [FACTS, (THIRD,)]
    assert again.facts == (FACTS[1], THIRD, FACTS[0])
    same(again.of(FACTS), known)
    same(again.of([THIRD]), optimise_values(*gpt2, THIRD, METHOD))
    alone = values_for(*gpt2, FACTS[1], METHOD)
    same(alone, known.of([FACTS[1]]))
    assert len(files(cache)) == 3


def test_an_edit_takes_them(gpt2, cache, optimised, tiny_statistics):
    kept = values_for(*gpt2, FACTS, METHOD)
    edit = ue.edit(*gpt2, FACTS[1], METHOD, statistics=tiny_statistics, values=kept, apply=False)
    assert edit.outcomes[0].losses == kept.losses[1]
    assert optimised == [FACTS]


def test_values_are_joined_in_the_order_given(gpt2):
    whole = optimise_values(*gpt2, [*FACTS, THIRD], METHOD)
    parts = [whole.of([THIRD]), whole.of(FACTS)]
    joined = Values.joined(parts)
    assert joined.facts == (THIRD, *FACTS)
    assert joined.delta.shape == whole.delta.shape
    same(joined.of(whole.facts), whole)
    assert torch.equal(joined.z[:, 1:], whole.z[:, :2])
    same(Values.joined([whole]), whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"method": METHOD.replace(clamp=0.5)},
        lambda: {"method": METHOD.replace(layers=(0,))},
        lambda: {"method": METHOD.replace(site="mlp")},
        lambda: {"seed": 1},
        lambda: {"facts": ue.Fact(FACTS[0].prompt, FACTS[0].subject, "garden", "bridge")},
    ],
    ids=["clamp", "layer", "site", "seed", "target"],
)
def test_another_request_is_another_file(gpt2, cache, change):
    asked = {"facts": FACTS[0], "method": METHOD, "seed": 0}
    values_for(*gpt2, **asked)
    values_for(*gpt2, **(asked | change()))
    assert len(files(cache)) == 2


def test_an_edited_model_has_values_of_its_own(gpt2, cache, tiny_statistics):
    values_for(*gpt2, FACTS[0], METHOD)
    edit = ue.edit(*gpt2, FACTS[1], METHOD, statistics=tiny_statistics)
    values_for(*gpt2, FACTS[0], METHOD)
    edit.undo()
    assert len(files(cache)) == 2
    assert len({path.parent for path in files(cache)}) == 1  # one folder a base model


def file_of(cache, fact):
    """The file of the cache that describes `fact`."""
    (found,) = [
        path
        for path in files(cache)
        if read_safetensors(path, FORMAT, FactError)[1]["fact"] == asdict(fact)
    ]
    return found


def damage_bytes(path, _other):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(path, **changes):
    tensors, description = read_safetensors(path, FORMAT, FactError)
    for name in changes.keys() & tensors.keys():
        tensors[name] = changes.pop(name)(tensors[name])
    write_safetensors(path, tensors, FORMAT, {**description, **changes}, FactError)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_bytes, "checksum"),
        (lambda path, _: path.write_bytes(b"no"), "cannot be read as safetensors"),
        (lambda path, _: rewrite(path, conditions="others"), "optimised for something else"),
        (lambda path, other: shutil.copy(other, path), "optimised for something else"),
        (lambda path, _: rewrite(path, losses=[]), "incomplete"),
        (lambda path, _: rewrite(path, delta=lambda delta: delta[1:]), "incomplete"),
        (lambda path, _: rewrite(path, target_init=lambda init: init[:, :0]), "incomplete"),
    ],
    ids=["damaged", "foreign", "conditions", "another fact", "no losses", "a row", "no column"],
)
def test_a_file_that_does_not_match_is_replaced(gpt2, cache, caplog, optimised, spoil, message):
    right = values_for(*gpt2, FACTS, METHOD)
    path, other = (file_of(cache, fact) for fact in FACTS)
    spoil(path, other)
    with caplog.at_level(logging.WARNING):
        again = values_for(*gpt2, FACTS, METHOD)
    assert f"cached values are not used: {path}" in caplog.text
    assert message in caplog.text
    assert optimised == [FACTS, FACTS[:1]]
    same(again.of(FACTS[1:]), right.of(FACTS[1:]))
    # alone its rows are shorter: float32 sums in another order, over three steps
    assert torch.allclose(again.delta, right.delta, rtol=0, atol=1e-4 * float(right.delta.max()))
    caplog.clear()
    same(values_for(*gpt2, FACTS, METHOD), again)
    assert caplog.text == ""


def no_room(*_arguments, **_keywords):
    raise OSError(28, "No space left on device")


def test_what_cannot_be_kept_is_used_all_the_same(gpt2, cache, caplog, monkeypatch):
    wanted = optimise_values(*gpt2, FACTS, METHOD)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("unified_edit.model.tensor_files.save_file", no_room)
        same(values_for(*gpt2, FACTS, METHOD), wanted)
    assert "not kept for the next time" in caplog.text
    assert "No space left" in caplog.text
    assert [path for path in cache.rglob("*") if path.is_file()] == []  # whole, or not at all
    values_for(*gpt2, FACTS, METHOD)
    assert len(files(cache)) == len(FACTS)


def test_a_file_in_the_place_of_the_cache_is_no_failure(gpt2, tmp_path, caplog, monkeypatch):
    place = tmp_path / "cache"
    place.write_text("not a folder")
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(place))
    with caplog.at_level(logging.WARNING):
        found = values_for(*gpt2, FACTS, METHOD)
    same(found, optimise_values(*gpt2, FACTS, METHOD))
    assert "not kept for the next time" in caplog.text
    assert place.read_text() == "not a folder"


def test_no_facts_are_refused(gpt2, cache):
    with pytest.raises(FactError, match="no facts"):
        values_for(*gpt2, [], METHOD)


def test_what_was_found_before_a_kill_is_kept(gpt2, cache, monkeypatch) -> None:
    """Facts are optimised some at a time, and each lot is kept before the next."""
    monkeypatch.setattr(values_cache, "TOGETHER", 1)
    usual, calls = editor.compute_values, []

    def killed(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(editor, "compute_values", killed)
        values_for(*gpt2, FACTS, METHOD)
    assert len(files(cache)) == 1
    whole = values_for(*gpt2, FACTS, METHOD)
    assert len(files(cache)) == 2
    wanted = optimise_values(*gpt2, FACTS, METHOD)
    torch.testing.assert_close(whole.delta, wanted.delta, rtol=1e-5, atol=1e-6)
