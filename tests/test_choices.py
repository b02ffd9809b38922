"""Functions of a user's own in a method: used like the built-in ones, and known by their name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures_refusals import FACTS, ONE, OSLO, SPREAD, TOWER, VIENNA, refused

import unified_edit as ue
from unified_edit.editing import Choice, Contexts, compute_keys, context_weights, shares
from unified_edit.errors import MethodError
from unified_edit.model import anatomy
from unified_edit.objective import Metric

BARE = Choice("bare alone", lambda count: [1.0] + [0.0] * (count - 1))
FLAT = Choice("flat", lambda statistics, weight: Metric.identity(weight.d_in))
AGAIN = Choice("the mlp again", lambda parts, layer: parts.mlp(layer))
EVEN = Choice("as memit", lambda left: 1 / left)

OWN = {"distribution": EVEN, "site": AGAIN, "key_mean": BARE, "preservation": FLAT}


@pytest.fixture
def write(tiny, tiny_tokenizer, tiny_statistics):
    """write(facts, method): an edit of `tiny` that is not applied."""

    def made(facts, method, **more):
        return ue.edit(
            tiny, tiny_tokenizer, facts, method, statistics=tiny_statistics, apply=False, **more
        )

    return made


def same(one, other):
    return all(torch.equal(one.delta(layer), other.delta(layer)) for layer in other.layers)


def test_a_spread_of_one_s_own(write) -> None:
    assert same(write([TOWER], SPREAD.replace(distribution=EVEN)), write([TOWER], SPREAD))
    last = Choice("the last alone", lambda left: 1.0 if left == 1 else 0.0)
    made = write([TOWER], SPREAD.replace(distribution=last))
    assert [float(made.delta(layer).norm()) > 0 for layer in (0, 1, 2)] == [False, False, True]
    assert shares(3, last) == (0.0, 0.0, 1.0)


def test_a_site_of_one_s_own(write, tiny, tiny_tokenizer) -> None:
    made = write([TOWER], ONE.replace(site=AGAIN))
    assert same(made, write([TOWER], ONE.replace(site="mlp")))
    assert not same(made, write([TOWER], ONE))
    values = ue.optimise_values(tiny, tiny_tokenizer, [TOWER], ONE.replace(site=AGAIN))
    assert values.site == "the mlp again"
    with refused(tiny, MethodError, "the mlp again 1", "block 1"):
        write([TOWER], ONE, values=values)


def test_a_mean_of_keys_of_one_s_own(write, tiny, tiny_tokenizer) -> None:
    made = write([TOWER, OSLO], ONE.replace(key_mean=BARE))
    bare = compute_keys(anatomy(tiny), tiny_tokenizer, [TOWER, OSLO], [""], [1])[1]
    assert torch.allclose(made.keys[made.names[1]], bare, rtol=0, atol=1e-5)
    assert not torch.allclose(write([TOWER, OSLO], ONE).keys[made.names[1]], bare, atol=1e-2)


def test_a_preservation_of_one_s_own(write, tiny, tiny_tokenizer) -> None:
    """Where every direction costs the same, one fact's Delta is r k' / k'k."""
    made = write([TOWER], ONE.replace(preservation=FLAT))
    r = ue.optimise_values(tiny, tiny_tokenizer, [TOWER], ONE).delta
    k = made.keys[made.names[1]]
    assert torch.allclose(made.delta(1), r @ k.T / (k.T @ k), rtol=1e-9, atol=0)
    assert not torch.allclose(write([TOWER], ONE).delta(1), made.delta(1), rtol=0.1)


def test_earlier_facts_as_keys_to_preserve(write) -> None:
    """C0 of the corpus and an earlier edit's key: a new edit leaves what was written alone."""
    first = write([TOWER], ONE)
    name = first.names[1]
    k = first.keys[name]

    def with_history(statistics, weight):
        return statistics.metric(weight.layer).plus(first.keys[weight.name], 1e6)

    free, bound = (
        write([VIENNA], method) for method in (ONE, ONE.replace(preservation=with_history))
    )
    assert bound.method.preservation.name == "with_history"
    assert float((bound.delta(1) @ k).norm()) <= 1e-4 * float((free.delta(1) @ k).norm())
    assert bound.diagnosis[1].memorization_error <= 1e-8


@pytest.mark.parametrize("field", OWN)
def test_a_choice_is_remembered_by_its_name(write, tiny, tiny_tokenizer, tmp_path, field) -> None:
    method = SPREAD.replace(**{field: OWN[field]})
    made = write([TOWER], method)
    made.save(tmp_path / "edit.safetensors")
    loaded = ue.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.id == made.id
    assert getattr(loaded.method, field).name == OWN[field].name
    assert OWN[field].name in repr(loaded.method)
    loaded.apply(tiny).undo()  # what it does is in the file; how it was found is not
    words = (field, repr(OWN[field].name), f"method.replace({field}=")
    with refused(tiny, MethodError, *words, "caller's own", "give it again"):
        write([VIENNA], loaded.method)
    again = write([TOWER], loaded.method.replace(**{field: OWN[field]}))
    assert same(again, made)


def test_a_built_in_choice_is_found_again_by_its_name(write, tmp_path) -> None:
    method = SPREAD.replace(distribution="pmet", site="mlp", key_mean="plain")
    made = write([TOWER], method)
    made.save(tmp_path / "edit.safetensors")
    loaded = ue.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.method == made.method
    assert same(write([TOWER], loaded.method), made)


def test_what_is_no_choice() -> None:
    for name, function in ((None, len), ("", len), ("mine", None), ("mine", "mlp")):
        with pytest.raises(MethodError, match="a choice is a name and a function"):
            Choice(name, function)
    for field, known in (
        ("distribution", "pmet"), ("site", "mlp"), ("key_mean", "plain"), ("preservation", "C0"),
    ):  # fmt: skip
        with pytest.raises(MethodError, match=rf"{field} is 5.*{known}.*Choice\('mine'"):
            ONE.replace(**{field: 5})


def test_a_choice_that_gives_something_else(write, tiny) -> None:
    short = Choice("short", lambda count: [1.0])
    with refused(tiny, MethodError, "'short'", "(1,) weights", "2 contexts", "one finite number"):
        write([TOWER], ONE.replace(key_mean=short))
    lost = Choice("lost", lambda count: [float("nan")] * count)
    with refused(tiny, MethodError, "'lost'", "one finite number"):
        write([TOWER], ONE.replace(key_mean=lost))
    wordy = Choice("wordy", lambda left: "half")
    with refused(tiny, MethodError, "share of wordy", "'half'", "finite number"):
        write([TOWER], SPREAD.replace(distribution=wordy))


def test_the_weights_of_contexts() -> None:
    assert context_weights(3, "typed").tolist() == [0.5, 0.25, 0.25]
    assert context_weights(1, "typed").tolist() == [1.0]
    assert context_weights(4, "plain").tolist() == [0.25] * 4
    assert context_weights(2, BARE).tolist() == [1.0, 0.0]


# --- a method under another name, prefixes and numbers of a user's own ---


@pytest.mark.parametrize("name", ["EMMET", "MEMIT", "ROME", "EMMET_RELEASED"])
def test_a_method_under_another_name_keeps_its_settings(make_gpt2, name) -> None:
    """Published settings are found by the preset, not by what a table calls the method."""
    model = make_gpt2(n_layer=6, n_embd=192)  # the sizes for which there are settings
    method = ue.METHODS[name]
    resolved = method.resolve(model)
    mine = method.replace(name="mine").resolve(model)
    assert mine.layers is not None
    assert mine.replace(name=name) == resolved
    with pytest.raises(MethodError, match="mine has no published setting of layers"):
        method.replace(name="mine", preset=None).resolve(model)


def test_prefixes_that_are_given_replay_an_edit(
    write, make_gpt2, tiny_tokenizer, tiny_statistics, monkeypatch
) -> None:
    contexts = Contexts(starts=("The", ""), lengths=(3, 5), per_start=2)
    made = write(FACTS, ONE.replace(contexts=contexts))
    assert len(made.provenance.prefixes) == 1 + contexts.count == 9

    def sample(*_args, **_kwargs):
        raise AssertionError("something was sampled")

    monkeypatch.setattr(torch, "multinomial", sample)
    given = Contexts(prefixes=list(made.provenance.prefixes[1:]))
    assert given.count == 8
    again = ue.edit(
        make_gpt2(), tiny_tokenizer, FACTS, ONE.replace(contexts=given),
        statistics=tiny_statistics, seed=5,
    )  # fmt: skip
    assert again.provenance.prefixes == made.provenance.prefixes
    assert same(again, made)
    with pytest.raises(AssertionError, match="sampled"):  # or the test says nothing
        write(FACTS, ONE.replace(contexts=contexts), seed=5)


@pytest.mark.parametrize("prefixes", ["one text", [""], ["It is {}. "], [5], []], ids=repr)
def test_prefixes_that_are_none(prefixes) -> None:
    with pytest.raises(MethodError, match=r"Contexts: .*prefix"):
        Contexts(prefixes=prefixes)


NUMBERS = {
    "numpy": {
        "layers": np.array([0, 1, 2]), "steps": np.int32(4), "ridge": np.float32(1.5),
        "clamp": np.float64(0.75), "ridge_from": np.uint8(1), "sequential": np.bool_(False),
    },
    "torch": {
        "layers": torch.tensor([0, 1, 2]), "steps": torch.tensor(4), "ridge": torch.tensor(1.5),
        "clamp": torch.tensor(0.75, dtype=torch.float64), "ridge_from": torch.tensor([1]),
        "sequential": torch.tensor(False),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_libraries(write, tmp_path, kind) -> None:
    """They are as good as Python's: the same method, the same edit, and files that can be read."""
    plain = SPREAD.replace(ridge=1.5, clamp=0.75)
    method = SPREAD.replace(**NUMBERS[kind])
    assert method == plain
    seed = np.int64(3) if kind == "numpy" else torch.tensor(3)
    made = write([TOWER], method, seed=seed)
    assert made.id == write([TOWER], plain, seed=3).id
    made.save(tmp_path / "edit.safetensors")
    assert ue.Edit.load(tmp_path / "edit.safetensors").method == made.method


def test_a_single_layer_as_a_number(write, tiny, tiny_statistics) -> None:
    """As argmax gives it."""
    made = write([TOWER], ONE)
    for layer in (1, np.argmax([0, 1]), torch.tensor([0, 1]).argmax()):
        assert ONE.replace(layers=layer) == ONE.replace(layers=[layer]) == ONE
        assert anatomy(tiny).check_layers(layer) == (1,)
        assert tiny_statistics.only(layer).layers == (1,)
        assert tiny_statistics.metric(layer) is tiny_statistics.metric(1)
        assert tiny_statistics.convergence(layer) == tiny_statistics.agreement[1]
        assert torch.equal(made.delta(layer), made.delta(1))


def test_numbers_of_other_libraries_in_questions(tiny, tiny_tokenizer) -> None:
    expected = ue.ask(tiny, tiny_tokenizer, TOWER.text, k=2)
    for k in (np.int64(2), torch.tensor(2)):
        assert ue.ask(tiny, tiny_tokenizer, TOWER.text, k=k).equals(expected)
    for k in (2.0, np.float64(2.0), torch.tensor(2.0), np.bool_(True), True, "2"):
        with pytest.raises(MethodError, match=r"k is .*whole number"):
            ue.ask(tiny, tiny_tokenizer, TOWER.text, k=k)
