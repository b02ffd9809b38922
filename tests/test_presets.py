"""Methods of other papers, as data over one loop, against their literal loops in float64.

On a tiny GPT-2, as in `test_recipe`; what is a closed form alone is in `test_formulas`.
"""

from __future__ import annotations

import pytest
import reference
import reference_methods as code
import torch
from fixtures_refusals import ONE, SHORT, TOWER, VIENNA, refused
from recipe import TINY_FACTS, contexts, loop, relative, tiny_method
from test_recipe import plain

import unified_edit as ue
from unified_edit.editing import SPREADS, optimise_values, read_values, values_for
from unified_edit.editing.early_stop import losses_there
from unified_edit.errors import MethodError
from unified_edit.model import anatomy
from unified_edit.objective import NullSpace

LAYERS = (0, 1, 2)
FACTS = plain(TINY_FACTS)


@pytest.fixture(scope="module")
def double(make_gpt2, statistics_of):
    """(a tiny GPT-2 in float64, C0 of all its layers)."""
    model = make_gpt2(2, torch.float64)
    return model, statistics_of(model)


@pytest.fixture
def made(double, tiny_tokenizer):
    """made(method, facts): (the resolved method, the edit, its contexts)."""
    model, stats = double

    def make(method, facts=TINY_FACTS):
        method = method.resolve(model)
        edit = ue.edit(model, tiny_tokenizer, facts, method, statistics=stats, apply=False)
        return method, edit, contexts(edit.provenance.prefixes)

    return make


def moments(stats):
    return {layer: stats.C0(layer) for layer in LAYERS}


def same_deltas(edit, wanted, tolerance=1e-8):
    for layer in LAYERS:
        assert relative(edit.delta(layer), wanted[layer].delta) <= tolerance
        assert relative(edit.keys[edit.names[layer]], wanted[layer].K) <= tolerance


# --- ROME, by three codes ---

CODES = {
    "original": ue.ROME_RELEASED,
    "enable_random_prefix_keys": ue.R_ROME,
    "enable_prompt_keys": ue.P_ROME,
}


@pytest.mark.parametrize("which", CODES)
def test_rome_as_released(double, made, tiny_tokenizer, which):
    model, stats = double
    method, edit, templates = made(tiny_method(CODES[which], "gpt2"), TINY_FACTS[:1])
    settings = {name: value for name, value in loop(method).items() if name != "site"}
    wanted = code.rome_code(
        model, tiny_tokenizer, FACTS[0], 1, stats.C0(1), templates, which, **settings
    )
    assert relative(edit.delta(1), wanted) <= 1e-8
    # it says nothing unless ours is something else
    _, ours, _ = made(tiny_method(ue.ROME, "gpt2"), TINY_FACTS[:1])
    assert relative(ours.delta(1), wanted) > 1e-2


def test_what_each_code_holds(double, made, tiny_tokenizer):
    """The released ROME adds delta at the bare prompt's key, r-ROME makes W' k* the value."""
    model, _ = double
    fact = TINY_FACTS[:1]
    parts = anatomy(model)
    values = optimise_values(model, tiny_tokenizer, fact, tiny_method(ue.ROME, "gpt2"))
    _, original, templates = made(tiny_method(ue.ROME_RELEASED, "gpt2"), fact)
    bare = reference.key(model, tiny_tokenizer, *FACTS[0][:2], templates[:1], 1)
    assert relative(original.delta(1) @ bare, values.delta[:, 0]) <= 1e-8
    _, rome, _ = made(tiny_method(ue.R_ROME, "gpt2"), fact)
    k = rome.keys[rome.names[1]][:, 0]
    W, bias = parts.weight(1).parameter.detach().T, parts.down(1).bias.detach()
    assert relative((W + rome.delta(1)) @ k + bias, values.z[:, 0]) <= 1e-8


# --- where layers have targets of their own ---


def test_forward_replay(double, made, tiny_tokenizer):
    model, stats = double
    changes = {"layers": LAYERS, "ridge": 0.5}
    method, edit, templates = made(tiny_method(ue.MEMIT_REPLAY, "gpt2", **changes))
    wanted = code.replay_deltas(
        model, tiny_tokenizer, FACTS, LAYERS, moments(stats),
        lambda C0, K, R: reference.memit_delta(C0, K, R, 0.5), templates,
        **{name: value for name, value in loop(method).items() if name != "site"},
    )  # fmt: skip
    same_deltas(edit, wanted)
    values = optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
    assert (values.layer, method.value_layer) == (0, 0)
    again = ue.edit(
        model, tiny_tokenizer, TINY_FACTS, method, statistics=stats, values=values, apply=False
    )
    assert torch.equal(again.delta(2), edit.delta(2))


def test_one_layer_needs_no_replay(made):
    method = tiny_method(ue.MEMIT, "gpt2", ridge=0.5)
    _, once, _ = made(method)
    _, replayed, _ = made(method.replace(distribution="replay"))
    assert torch.equal(once.delta(1), replayed.delta(1))


def test_replay_with_one_value_for_two_facts(double, tiny_tokenizer):
    """The target of a shared value at a later layer is the mean of what its facts have there."""
    model, stats = double
    facts = [
        ue.Fact("I walked from the {} to the", "old river", "market"),
        ue.Fact("The {} is in the city of", "old river", "Rome"),
    ]
    method = tiny_method(ue.MEMIT_REPLAY, "gpt2", layers=(0, 1), ridge=0.5)
    given = {"statistics": stats, "apply": False, "on_shared_subject": "merge"}
    edit = ue.edit(model, tiny_tokenizer, facts, method, **given)
    values = optimise_values(model, tiny_tokenizer, facts, method, on_shared_subject="merge")
    targets = []
    with reference.edited(model, {0: edit.delta(0)}):
        now = [
            reference.site_value(model, tiny_tokenizer, one.prompt, one.subject, 1, "block")
            for one in facts
        ]
    for one in facts:
        text, place = reference.filled_in(tiny_tokenizer, one.prompt, one.subject, "{}")
        block = reference.site_module(model, 0, "block")
        with reference.delta_added(block, place, values.delta[:, 0]):
            out = reference.module_at_work(
                model,
                reference.site_module(model, 1, "block"),
                reference.encode(tiny_tokenizer, text),
            )[1]
        targets.append(out[place])
    R = (torch.stack(targets) - torch.stack(now)).mean(dim=0)[:, None]
    K = edit.keys[edit.names[1]]
    assert relative(edit.delta(1), reference.memit_delta(stats.C0(1), K, R, 0.5)) <= 1e-8


# --- null spaces ---


def test_a_whole_edit_by_alphaedit(double, made, tiny_tokenizer):
    model, stats = double
    method, edit, templates = made(tiny_method(ue.ALPHAEDIT, "gpt2", layers=LAYERS, ridge=1.0))
    wanted = reference.edit_deltas_multi_layer(
        model, tiny_tokenizer, FACTS, LAYERS, moments(stats),
        lambda C0, K, R: code.alphaedit_delta(
            code.get_project(C0, 2e-2), torch.zeros_like(C0), K, R, 1.0
        ),
        templates, **loop(method),
    )  # fmt: skip
    same_deltas(edit, wanted)


def test_a_threshold_is_remembered(made, tmp_path):
    for choice, name in (
        (ue.null_space(), "null_space"),
        (ue.null_space(0.05), "null_space(0.05)"),
        (ue.null_space(1e-3, relative=True), "null_space(0.001, relative)"),
    ):
        method = tiny_method(ue.EMMET, "gpt2", preservation=choice)
        _, edit, _ = made(method)
        assert method == method.replace(preservation=name)
        edit.save(tmp_path / "edit.safetensors")
        loaded = ue.Edit.load(tmp_path / "edit.safetensors")
        assert loaded.method == edit.method and loaded.id == edit.id
        assert loaded.method.preservation.name == name
        _, again, _ = made(loaded.method)
        assert torch.equal(again.delta(1), edit.delta(1))
    for wrong in ("null_space(-1)", "null_space(x)", "null_space()", "null_spaces"):
        with pytest.raises(MethodError, match=r"preservation is .*'C0', 'null_space'"):
            ONE.replace(preservation=wrong)
    with pytest.raises(MethodError, match="null_space: threshold is 0"):
        ue.null_space(0)
    with pytest.raises(MethodError, match="null_space: relative is 1"):
        ue.null_space(relative=1)


def test_a_null_space_is_found_once(double, monkeypatch):
    model, stats = double
    stats = stats.only(1)
    asked = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda C0: asked.append(1) or eigh(C0))
    weight = anatomy(model).weight(1)
    for threshold in (2.5e-2, 2.5e-2, 3.5e-2, 2.5e-2):
        kept = ue.null_space(threshold)(stats, weight).kept
        assert kept == NullSpace(stats.metric(1), threshold).kept
    assert len(asked) == 4 + 2


# --- what is asked of values ---


#: Facts whose subject ends the prompt: at the last block a value there decides what is said, so
#: that even a random model can be made to say it.
AT_THE_END = (
    ue.Fact("I walked from the {}", "old river", "market"),
    ue.Fact("The city of {}", "Rome", "Paris"),
    ue.Fact("{}", "Lisbon", "Oslo"),
)


@pytest.mark.parametrize("cutoff", [-1, -3, 0.3])
def test_encore_stops_early(double, tiny_tokenizer, cutoff):
    model, _ = double
    settings = {"layers": (3,), "clamp": 3.0, "steps": 12, "stop_loss": 0.0}
    method = tiny_method(ue.EMMET, "gpt2", prob_cutoff=cutoff, **settings).resolve(model)
    values = optimise_values(model, tiny_tokenizer, AT_THE_END, method)
    prefixes = contexts(ue.Editor(model, tiny_tokenizer).prefixes(method.contexts))
    lengths = []
    for column, fact in enumerate(plain(AT_THE_END)):
        wanted = code.encore_value(model, tiny_tokenizer, fact, prefixes, 3, cutoff, **loop(method))
        assert len(values.losses[column]) == wanted.steps
        assert relative(values.delta[:, column], wanted.delta) <= 1e-6
        lengths.append(wanted.steps)
    assert min(lengths) < 12 and len(set(lengths)) > 1


def test_how_often_a_target_must_be_there():
    assert [losses_there(cutoff) for cutoff in (-1.0, -4.0, 0.3)] == [1, 4, 1]
    assert losses_there(0.0) > 1e9


def test_encore_as_a_whole(double, made, tiny_tokenizer):
    """C0 + (lam_n / lam) I, and values that stop early."""
    model, stats = double
    settings = {"layers": (2, 3), "clamp": 3.0, "steps": 8, "stop_loss": 0.0}
    settings |= {"ridge": 0.5, "norm_weight": 0.2, "prob_cutoff": -1}
    fact = AT_THE_END[2]
    method, edit, templates = made(tiny_method(ue.ENCORE, "gpt2", **settings), [fact])
    value = code.encore_value(
        model, tiny_tokenizer, *plain([fact]), templates, 3, -1, **loop(method)
    )
    assert value.steps < 8
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    with reference.edited(model, {}, (2, 3)):
        for layer, left in ((2, 2), (3, 1)):
            now = reference.site_value(model, tiny_tokenizer, fact.prompt, fact.subject, 3, "block")
            R = (value.z - now)[:, None] / left
            K = edit.keys[edit.names[layer]]
            wanted = code.encore_delta(stats.C0(layer), nothing, K, R, 0.5, 0.1)
            assert relative(edit.delta(layer), wanted) <= 1e-6
            reference.add_to_weight(model, layer, wanted)


def test_norm_anchors(double, tiny_tokenizer):
    model, _ = double
    method = tiny_method(ue.EMMET, "gpt2")
    free = optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
    outputs = read_values(anatomy(model), tiny_tokenizer, TINY_FACTS, 1, "mlp")
    sizes = (outputs + free.delta).norm(dim=0)
    anchor = float(sizes.max()) / 2 - 1e-3  # the longest is beyond twice the anchor
    bound = optimise_values(model, tiny_tokenizer, TINY_FACTS, method.replace(norm_anchor=anchor))
    for column, fact in enumerate(FACTS):
        delta = free.delta[:, column]
        wanted = code.nas_delta(model, tiny_tokenizer, fact, 1, delta, anchor)
        assert float((bound.delta[:, column] - wanted).norm() / delta.norm()) <= 1e-8
    assert not bound.delta[:, sizes.argmax()].any()
    assert bound.delta.any()


def test_values_are_those_of_their_settings(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    """New settings make other values; where they are not used, conditions are those of before."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    plain_values = values_for(tiny, tiny_tokenizer, [TOWER], ONE)
    assert "prob_cutoff" not in plain_values.conditions
    assert "norm_anchor" not in plain_values.conditions
    for change in ({"prob_cutoff": -1}, {"norm_anchor": 0.5}):
        other = values_for(tiny, tiny_tokenizer, [TOWER], ONE.replace(**change))
        assert next(iter(change)) in other.conditions
        with refused(tiny, MethodError, "other settings"):
            ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, values=other)
    first = ONE.replace(layers=(0, 1), distribution="replay")
    assert values_for(tiny, tiny_tokenizer, [TOWER], first).layer == 0


# --- as data ---

#: What every file of an edit says of its method since 0.3: a new key would change all ids.
KEYS = set(
    "name preset layers ridge ridge_from distribution preservation sequential site key_mean "
    "contexts steps learning_rate kl_weight weight_decay clamp stop_loss infeasible".split()
)


@pytest.mark.parametrize("name", ["ROME", "EMMET", "MEMIT", "EMMET_RELEASED", "PMET", "FE-MEMIT"])
def test_older_methods_are_written_as_before(name):
    method = ue.METHODS[name]
    assert set(method.to_dict()) == KEYS
    assert "prob_cutoff" not in repr(method) and "divisor" not in repr(method)
    assert ue.Method.from_dict(method.to_dict()) == method


@pytest.mark.parametrize("name", ue.METHODS)
def test_a_preset_is_found_again(name, make_gpt2):
    method = ue.METHODS[name]
    assert ue.Method.from_dict(method.to_dict()) == method
    assert method.name == name
    resolved = method.resolve(make_gpt2(n_layer=6, n_embd=192))  # the sizes of atlas
    assert ue.Method.from_dict(resolved.to_dict()) == resolved
    assert None not in (resolved.ridge, resolved.norm_weight, resolved.prob_cutoff)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prob_cutoff": 1.0}, "prob_cutoff is 1.0; give a probability below 1, or -n"),
        ({"prob_cutoff": -1.5}, "prob_cutoff is -1.5"),
        ({"prob_cutoff": "x"}, "prob_cutoff is 'x'"),
        ({"norm_weight": -1}, "norm_weight is -1"),
        ({"norm_anchor": -1}, "norm_anchor is -1"),
        ({"divisor_mean": "median"}, "divisor_mean is 'median'; choose one of .*'bare'"),
        ({"output_mean": None}, "output_mean is None; choose one of"),
    ],
)
def test_wrong_settings(fields, words):
    with pytest.raises(MethodError, match=words):
        ONE.replace(**fields)


def test_a_spread_of_one_s_own_with_targets(tiny, tiny_tokenizer, tiny_statistics):
    mine = type(SPREADS["replay"])("mine", lambda left: 1.0, own_targets=True)
    deltas = [
        ue.edit(
            tiny, tiny_tokenizer, [VIENNA],
            ue.MEMIT.replace(layers=(0, 1), ridge=1.0, distribution=one, **SHORT),
            statistics=tiny_statistics, apply=False,
        ).delta(1)
        for one in (mine, "replay", "full")
    ]  # fmt: skip
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.equal(deltas[0], deltas[2])
