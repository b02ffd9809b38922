"""Facts about one subject: one value for all of them, or batches in turn; and contradictions.

One value is held against the literal transcription in `reference.py`, to 1e-8 in float64; batches
in turn against that of single batches, one after another.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import reference
import torch
from fixtures_refusals import EVERY, IN_TURN, ONE, SPREAD, TOWER, VIENNA, refused
from recipe import TINY_FACTS, contexts, loop, relative, tiny_method
from transformers.models.gptj.modeling_gptj import GPTJAttention

import unified_edit as ue
from unified_edit.editing import compute_keys, optimise_values, values_for
from unified_edit.errors import (
    ContradictionError,
    EditFileError,
    FactError,
    InfeasibleError,
    MethodError,
    SharedSubjectError,
)
from unified_edit.model import anatomy
from unified_edit.model.tensor_files import read_safetensors, write_safetensors

#: Two of one subject, behind other words, with another one between them.
AGAIN = ue.Fact("I walked from the {} to the", "old tower", "museum")
THRICE = ue.Fact("I have seen the {} in", "old  Tower", "Athens and Oslo")
SHARED = (TINY_FACTS[1], TINY_FACTS[0], AGAIN, TINY_FACTS[2])
GROUPS = ((SHARED[0], AGAIN), (SHARED[1],), (SHARED[3],))


@pytest.fixture(scope="module")
def doubles(make_gpt2, make_gptj, statistics_of):
    """{family: (a tiny model of it in float64, C0 of all its layers)}."""
    models = {"gpt2": make_gpt2(2, torch.float64), "gptj": make_gptj(2, torch.float64)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPTJAttention, "_attn", reference.attention_in_float64)
        yield {family: (model, statistics_of(model)) for family, model in models.items()}


@pytest.fixture
def write(tiny, tiny_tokenizer, tiny_statistics):
    """write(facts, method): an edit of `tiny` that is not applied."""

    def made(facts, method=ONE, **more):
        return ue.edit(
            tiny, tiny_tokenizer, facts, method, statistics=tiny_statistics, apply=False, **more
        )

    return made


def plain(facts):
    return [(fact.prompt, fact.subject, fact.target_new) for fact in facts]


def solver(ridge):
    if ridge:
        return lambda C0, K, R: reference.memit_delta(C0, K, R, ridge)
    return reference.emmet_delta


# --- one value ------------------------------------------------------------------------------------

CASES = {
    "EMMET": (ue.EMMET, {}, float),
    "EMMET spread": (ue.EMMET, {"layers": (0, 1, 2)}, float),
    "MEMIT": (ue.MEMIT, {"layers": (0, 1, 2), "ridge": 0.5}, float),
    "MEMIT pmet": (ue.MEMIT, {"layers": (0, 2), "ridge": 0.5, "distribution": "pmet"}, math.sqrt),
    "mlp": (ue.EMMET, {"site": "mlp"}, float),
}


@pytest.mark.parametrize(
    ("family", "name"), [*(("gpt2", name) for name in CASES), ("gptj", "EMMET spread")]
)
def test_one_value_for_a_subject(doubles, tiny_tokenizer, family, name):
    """The loss, the mean key and the mean residual of the literal transcription."""
    model, stats = doubles[family]
    method, changes, divisor = CASES[name]
    method = tiny_method(method.replace(site=changes.get("site", "block")), family, **changes)
    method = method.resolve(model)
    made = ue.edit(
        model, tiny_tokenizer, SHARED, method, statistics=stats, apply=False,
        on_shared_subject="merge",
    )  # fmt: skip
    wanted = reference.edit_deltas_merged(
        model, tiny_tokenizer, [plain(group) for group in GROUPS], method.layers,
        {layer: stats.C0(layer) for layer in method.layers}, solver(method.ridge),
        contexts(made.provenance.prefixes), mean=method.key_mean.name, divisor=divisor,
        **loop(method),
    )  # fmt: skip
    assert made.facts == SHARED
    assert made.columns == (0, 1, 0, 2)
    for layer in method.layers:
        assert relative(made.keys[made.names[layer]], wanted[layer].K) <= 1e-8
        assert relative(made.delta(layer), wanted[layer].delta) <= 1e-8


def test_the_joint_loss_of_a_subject(doubles, tiny_tokenizer):
    model, _ = doubles["gptj"]
    method = tiny_method(ue.EMMET, "gptj").resolve(model)
    values = optimise_values(model, tiny_tokenizer, SHARED, method, on_shared_subject="merge")
    prefixes = ue.Editor(model, tiny_tokenizer).prefixes(method.contexts)
    for column, group in enumerate(GROUPS):
        wanted = reference.merged_value(
            model, tiny_tokenizer, plain(group), contexts(prefixes), 1, **loop(method)
        )
        assert values.losses[column] == pytest.approx(wanted.losses, rel=1e-9)
        assert relative(values.delta[:, column], wanted.delta) <= 1e-8
        assert relative(values.target_init[:, column], wanted.target_init) <= 1e-12


def test_a_subject_in_a_batch_is_that_subject_alone(doubles, tiny_tokenizer):
    model, _ = doubles["gpt2"]
    method = tiny_method(ue.EMMET, "gpt2")
    facts = [*SHARED, THRICE]
    together = optimise_values(model, tiny_tokenizer, facts, method, on_shared_subject="merge")
    assert together.columns == (0, 1, 0, 2, 0)
    group = [SHARED[0], AGAIN, THRICE]
    alone = optimise_values(model, tiny_tokenizer, group, method, on_shared_subject="merge")
    assert alone.delta.shape == (24, 1)
    assert relative(together.of(group).delta, alone.delta) <= 1e-8
    assert together.of(group).columns == (0, 0, 0)


@EVERY
def test_without_a_shared_subject_nothing_changes(write, method):
    facts = [TOWER, VIENNA, TINY_FACTS[0]]
    usual = write(facts, method)
    for way in ("merge", "split"):
        made = write(facts, method, on_shared_subject=way)
        assert made.outcomes == usual.outcomes
        assert made.columns == usual.columns == (0, 1, 2)
        for name, update in usual.updates.items():
            assert torch.equal(made.keys[name], usual.keys[name])
            assert torch.equal(made.updates[name].left, update.left)
            assert torch.equal(made.updates[name].right, update.right)


def test_an_equality_holds_the_value_at_the_mean_key(tiny, tiny_tokenizer, write):
    made = write(SHARED, on_shared_subject="merge")
    values = optimise_values(tiny, tiny_tokenizer, SHARED, ONE, on_shared_subject="merge")
    keys = made.keys[made.names[1]]
    assert keys.shape == (48, 3)
    assert relative(made.delta(1) @ keys, values.delta) <= 1e-8
    each = compute_keys(anatomy(tiny), tiny_tokenizer, SHARED, made.provenance.prefixes, [1])[1]
    assert relative(keys[:, 0], (each[:, 0] + each[:, 2]) / 2) <= 1e-5
    # each fact has an outcome of its own, and the subject's losses
    assert len(made.outcomes) == len(made.table) == 4
    assert made.outcomes[0].losses == made.outcomes[2].losses == values.losses[0]
    assert made.outcomes[0].after != made.outcomes[2].after
    first = made.warnings[0]
    cosines = torch.cosine_similarity(each[:, [0, 2]], keys[:, :1], dim=0)
    for words in (SHARED[0].text, AGAIN.text, "'old tower'", f"{float(cosines.min()):.6f}"):
        assert words in first


def test_one_value_in_turn(write):
    """ROME writes subjects, not facts, one after another."""
    made = write(SHARED, IN_TURN, on_shared_subject="merge")
    assert made.keys[made.names[1]].shape == (48, 3)
    assert made.columns == (0, 1, 0, 2)
    alone = write([SHARED[0], AGAIN], IN_TURN, on_shared_subject="merge")
    assert torch.allclose(made.keys[made.names[1]][:, 0], alone.keys[made.names[1]][:, 0])


def test_as_many_columns_as_subjects_count(tiny, tiny_tokenizer):
    """For the room in an equality, and for a ridge that begins with so many."""
    d_k = anatomy(tiny).weight(1).d_in
    facts = [
        ue.Fact(prompt, f"House {number}", "Rome")
        for number in range(d_k)
        for prompt in ("{} is in", "{} was sold in")
    ]
    editor = ue.Editor(tiny, tiny_tokenizer)
    with refused(tiny, InfeasibleError, f"{2 * d_k} facts"):
        editor.plan(facts, ONE)
    assert len(editor.plan(facts, ONE, on_shared_subject="merge").names) == d_k
    assert [len(turn) for turn in editor.plan(facts, ONE, on_shared_subject="split").turns] == [
        d_k, d_k,
    ]  # fmt: skip
    released = ONE.replace(ridge=1.0, ridge_from=2)
    assert editor.plan(facts[:2], released, on_shared_subject="merge").ridge == 0
    assert editor.plan(facts[:4], released, on_shared_subject="merge").ridge == 1


# --- values that are given ------------------------------------------------------------------------


def test_values_of_subjects_can_be_given(tiny, tiny_tokenizer, write):
    values = optimise_values(
        tiny, tiny_tokenizer, [*SHARED, THRICE], ONE, on_shared_subject="merge"
    )
    group = [AGAIN, THRICE, SHARED[0]]
    given = write(group, values=values, on_shared_subject="merge")
    assert relative(given.delta(1) @ given.keys[given.names[1]], values.delta[:, :1]) <= 1e-8
    with refused(tiny, FactError, "shares its value with", "left out"):
        write([SHARED[0], SHARED[1]], values=values)
    with pytest.raises(FactError, match="shares its value"):
        values.of(SHARED)
    # each fact its own where one for both is wanted, and the other way round
    apart = optimise_values(tiny, tiny_tokenizer, SHARED, ONE)
    assert apart.columns == (0, 1, 2, 3)
    with refused(tiny, MethodError, "is its own", "on_shared_subject="):
        write(SHARED, values=apart, on_shared_subject="merge")
    with refused(tiny, MethodError, "the other way round"):
        write(group, SPREAD, values=optimise_values(
            tiny, tiny_tokenizer, group, SPREAD, on_shared_subject="merge"
        ))  # fmt: skip


def test_values_cannot_be_given_for_several_batches(tiny, tiny_tokenizer, write):
    values = optimise_values(tiny, tiny_tokenizer, SHARED, ONE, on_shared_subject="split")
    with refused(tiny, MethodError, "2 turns", "'split'", "leave values out"):
        write(SHARED, values=values, on_shared_subject="split")
    one = [SHARED[1], AGAIN]
    assert torch.equal(
        write(one, values=values, on_shared_subject="split").delta(1),
        write(one, values=values).delta(1),
    )


def test_values_of_subjects_are_kept(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    merge = {"on_shared_subject": "merge"}
    first = values_for(tiny, tiny_tokenizer, SHARED, ONE, **merge)
    assert len(list(tmp_path.rglob("values/*.safetensors"))) == 3
    monkeypatch.setattr("unified_edit.editing.editor.compute_values", None)
    again = values_for(tiny, tiny_tokenizer, SHARED, ONE, **merge)
    group = values_for(tiny, tiny_tokenizer, [SHARED[0], AGAIN], ONE, **merge)
    assert torch.equal(group.delta, first.delta[:, :1])
    assert torch.equal(first.delta, again.delta)
    assert first.columns == again.columns == (0, 1, 0, 2)
    assert first.losses == again.losses
    monkeypatch.undo()
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    own = values_for(tiny, tiny_tokenizer, SHARED, ONE)  # not those of the subject
    assert own.columns == (0, 1, 2, 3)
    # in another batch its rows are padded otherwise: float32 sums in another order
    wanted = optimise_values(tiny, tiny_tokenizer, SHARED, ONE).delta
    assert torch.allclose(own.delta, wanted, rtol=0, atol=1e-4 * float(wanted.max()))


# --- in turn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_batches_in_turn(doubles, tiny_tokenizer, ridge):
    """Each is that of the transcription on the model that carries those before it."""
    model, stats = doubles["gpt2"]
    method = tiny_method(ue.EMMET, "gpt2", ridge=ridge).resolve(model)
    facts = [*SHARED, THRICE]
    batches = [[0, 1, 3], [2], [4]]
    made = ue.edit(
        model, tiny_tokenizer, facts, method, statistics=stats, apply=False,
        on_shared_subject="split",
    )  # fmt: skip
    deltas, columns = [], {}
    with reference.edited(model, {}, [1]):
        for batch in batches:
            one = reference.edit_delta_single_layer(
                model, tiny_tokenizer, plain([facts[i] for i in batch]), 1, stats.C0(1),
                solver(ridge), contexts(made.provenance.prefixes), **loop(method),
            )  # fmt: skip
            reference.add_to_weight(model, 1, one.delta)
            deltas.append(one.delta)
            columns |= dict(zip(batch, one.K.T, strict=True))
        bare = [
            reference.mean_target_logprob(model, tiny_tokenizer, fact.text, fact.target_new)
            for fact in facts
        ]
    assert relative(made.delta(1), sum(deltas)) <= 1e-8
    keys = torch.stack([columns[i] for i in range(5)], dim=1)
    assert relative(made.keys[made.names[1]], keys) <= 1e-8
    assert made.facts == tuple(facts)
    after = [outcome.after for outcome in made.outcomes]
    assert after == pytest.approx([math.exp(logp) for logp in bare], rel=1e-6)


#: Where a subject ends its prompt, a value at the last layer makes the model say anything.
STRONG = ONE.replace(layers=(3,), steps=30, clamp=8.0)
FIRST = ue.Fact("I walked to {}", "the tower", "Rome")
LATER = ue.Fact("I walked from {}", "the tower", "Madrid")
OTHER = ue.Fact("We walked to {}", "Vienna", "Oslo")


def test_what_a_later_batch_destroys_is_named(write):
    made = write([FIRST, OTHER, LATER], STRONG, on_shared_subject="split")
    lost = [warning for warning in made.warnings if "lost by a later one" in warning]
    assert [outcome.likeliest for outcome in made.outcomes] == [False, True, True]
    assert len(lost) == 1
    assert lost[0].startswith("1 of 3 facts")
    assert FIRST.text in lost[0]
    assert OTHER.text not in lost[0] and LATER.text not in lost[0]
    assert "merge" in lost[0]
    before = [write([fact], STRONG).outcomes[0].before for fact in made.facts]
    assert [outcome.before for outcome in made.outcomes] == pytest.approx(before, rel=1e-5)
    # one at a time by the method itself: as ever, and no word of it
    alone = STRONG.replace(sequential=True)
    assert not any("later one" in one for one in write([FIRST, LATER], alone).warnings)
    asked = write([FIRST, LATER], alone, on_shared_subject="split")
    assert any("1 of 2 facts" in one and "later one" in one for one in asked.warnings)


# --- contradictions -------------------------------------------------------------------------------


@EVERY
def test_the_last_one_wins(tiny, tiny_tokenizer, write, method, caplog):
    other = ue.Fact(TOWER.prompt, TOWER.subject, "Oslo")
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        made = write([TOWER, VIENNA, other], method, on_conflict="last")
    assert made.facts == (VIENNA, other)
    usual = write([VIENNA, other], method)
    assert all(torch.equal(made.delta(layer), usual.delta(layer)) for layer in made.layers)
    first = made.warnings[0]
    assert first in caplog.text
    for words in ("fact 0", "fact 2", "'Rome'", "'Oslo'", "the last one wins"):
        assert words in first
    with refused(tiny, ContradictionError, "on_conflict='last'"):
        write([TOWER, VIENNA, other], method)


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["Merge", "", 1, True, ["merge"]])
def test_wrong_choices_name_the_right_ones(tiny, tiny_tokenizer, write, wrong):
    choices = ("on_shared_subject", "'raise'", "'merge'", "'split'")
    with refused(tiny, MethodError, *choices):
        write(SHARED, on_shared_subject=wrong)
    with refused(tiny, MethodError, *choices):
        optimise_values(tiny, tiny_tokenizer, SHARED, ONE, on_shared_subject=wrong)
    with refused(tiny, MethodError, *choices):
        ue.Editor(tiny, tiny_tokenizer, on_shared_subject=wrong)
    with refused(tiny, MethodError, "on_conflict", "'raise'", "'last'"):
        write(SHARED, on_conflict=wrong)


def test_an_editor_has_defaults(tiny, tiny_tokenizer, tiny_statistics):
    editor = ue.Editor(
        tiny, tiny_tokenizer, method=ONE, statistics=tiny_statistics,
        on_shared_subject="merge", on_conflict="last",
    )  # fmt: skip
    other = dataclasses.replace(AGAIN, target_new="river")
    made = editor.edit([AGAIN, *SHARED[:2], other], apply=False)
    assert made.columns == (0, 1, 0)
    assert editor.optimise_values(SHARED).columns == (0, 1, 0, 2)
    with refused(tiny, SharedSubjectError, "on_shared_subject='merge'", "'split'"):
        editor.edit(SHARED, on_shared_subject="raise")
    with refused(tiny, ContradictionError, "contradict"):
        editor.edit([AGAIN, other], on_conflict="raise")


def test_a_file_says_which_facts_share_a_column(tiny, write, tmp_path):
    path = tmp_path / "edit.safetensors"
    made = write(SHARED, on_shared_subject="merge")
    made.save(path)
    loaded = ue.Edit.load(path)
    assert loaded.columns == made.columns == (0, 1, 0, 2)
    assert loaded.provenance == made.provenance
    assert loaded.provenance.on_shared_subject == "merge"
    assert loaded.id == made.id
    assert all(torch.equal(loaded.keys[name], made.keys[name]) for name in made.keys)
    loaded.apply(tiny).undo()
    tensors, description = read_safetensors(path, "unified_edit.edit/2", EditFileError)
    for columns in ([0, 1, 0], [0, 1, 0, 3], [0, 1, 2, 3], "0102", [0, 1, 0, None], 5):
        changed = {**description, "columns": columns}
        write_safetensors(path, tensors, "unified_edit.edit/2", changed, EditFileError)
        with pytest.raises(EditFileError, match="incomplete or malformed"):
            ue.Edit.load(path)


def test_files_without_a_word_of_it_load(write, tmp_path):
    """Those of before, and all in which nothing is merged or split, have each fact its column."""
    path = tmp_path / "edit.safetensors"
    made = write([TOWER, VIENNA])
    made.save(path)
    _, description = read_safetensors(path, "unified_edit.edit/2", EditFileError)
    assert "columns" not in description
    assert "on_shared_subject" not in description["provenance"]
    loaded = ue.Edit.load(path)
    assert loaded.columns == (0, 1)
    assert loaded.provenance.on_shared_subject == "raise"
    assert loaded.id == made.id
