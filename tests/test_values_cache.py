"""Values from the cache: the same as optimised ones, and never those of something else."""

from __future__ import annotations

import logging

import pytest
import torch

import unified_edit as ue
from unified_edit.editing import values_cache
from unified_edit.editing.values_cache import FORMAT, values_for
from unified_edit.errors import FactError
from unified_edit.model.tensor_files import read_safetensors, write_safetensors

METHOD = ue.EMMET.replace(steps=3, contexts=ue.Contexts(starts=("The",), lengths=(3,)))
FACTS = (
    ue.Fact("{} was born in", "Marie Curie", "Italy", "Poland"),
    ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome"),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def never(monkeypatch):
    """Nothing may be optimised any more once this is called."""

    def refuse(*arguments, **keywords):
        pytest.fail("values were optimised again")

    return lambda: monkeypatch.setattr(values_cache, "optimise_values", refuse)


@pytest.fixture(scope="module")
def few(_atlas, atlas_texts):
    """C0 from little text: enough to compute an edit."""
    return ue.KeyStatistics.collect(*_atlas, atlas_texts[:40], (1,), shrinkage=1e-2)


def files(cache):
    return sorted(cache.rglob("values-*.safetensors"))


def test_the_second_time_they_are_read(atlas, cache, never):
    optimised = ue.optimise_values(*atlas, FACTS, METHOD)
    first = values_for(*atlas, FACTS, METHOD)
    assert len(files(cache)) == 1
    never()
    second = values_for(*atlas, list(FACTS), METHOD)
    for found in (first, second):
        assert torch.equal(found.delta, optimised.delta)
        assert torch.equal(found.target_init, optimised.target_init)
        fields = ("facts", "layer", "site", "losses", "conditions")
        assert [getattr(found, f) for f in fields] == [getattr(optimised, f) for f in fields]


def test_an_edit_takes_them(atlas, few, cache, never):
    values_for(*atlas, FACTS, METHOD)
    never()
    kept = values_for(*atlas, FACTS, METHOD)
    edit = ue.edit(*atlas, FACTS[1], METHOD, statistics=few, values=kept, apply=False)
    assert edit.outcomes[0].losses == kept.losses[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"facts": FACTS[::-1]},
        lambda: {"facts": FACTS[:1]},
        lambda: {"method": METHOD.replace(clamp=0.5)},
        lambda: {"method": METHOD.replace(layers=(0,))},
        lambda: {"seed": 1},
    ],
    ids=["order", "fewer", "clamp", "layer", "seed"],
)
def test_another_request_is_another_file(atlas, cache, change):
    asked = {"facts": FACTS, "method": METHOD, "seed": 0}
    values_for(*atlas, **asked)
    values_for(*atlas, **(asked | change()))
    assert len(files(cache)) == 2


def test_an_edited_model_has_values_of_its_own(atlas, few, cache):
    values_for(*atlas, FACTS[:1], METHOD)
    edit = ue.edit(*atlas, FACTS[1], METHOD, statistics=few)
    values_for(*atlas, FACTS[:1], METHOD)
    edit.undo()
    assert len(files(cache)) == 2
    assert len({path.parent for path in files(cache)}) == 1  # one folder a base model


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_conditions(path):
    tensors, description = read_safetensors(path, FORMAT, FactError)
    write_safetensors(path, tensors, FORMAT, {**description, "conditions": "others"})


def lose_losses(path):
    tensors, description = read_safetensors(path, FORMAT, FactError)
    description.pop("losses")
    write_safetensors(path, tensors, FORMAT, description)


def lose_a_column(path):
    tensors, description = read_safetensors(path, FORMAT, FactError)
    tensors["delta"] = tensors["delta"][:, 1:]
    write_safetensors(path, tensors, FORMAT, description)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_bytes, "checksum"),
        (lambda path: path.write_bytes(b"no"), "cannot be read as safetensors"),
        (replace_conditions, "optimised for something else"),
        (lose_losses, "incomplete"),
        (lose_a_column, "incomplete"),
    ],
    ids=["damaged", "foreign", "others", "no losses", "a column"],
)
def test_a_file_that_does_not_match_is_replaced(atlas, cache, caplog, spoil, message):
    right = values_for(*atlas, FACTS, METHOD)
    (path,) = files(cache)
    spoil(path)
    with caplog.at_level(logging.WARNING):
        again = values_for(*atlas, FACTS, METHOD)
    assert f"cached values are not used: {path}" in caplog.text
    assert message in caplog.text
    assert torch.equal(again.delta, right.delta)
    caplog.clear()
    values_for(*atlas, FACTS, METHOD)
    assert caplog.text == ""


def test_a_file_is_written_whole_or_not_at_all(atlas, cache, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("unified_edit.model.tensor_files.save_file", fail)
        with pytest.raises(OSError, match="full"):
            values_for(*atlas, FACTS, METHOD)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_no_facts_are_refused(atlas, cache):
    with pytest.raises(FactError, match="no facts"):
        values_for(*atlas, [], METHOD)
