"""What is preserved by name: against the formulas, the conditions, and what a model then says."""

from __future__ import annotations

import pytest
import reference
import torch
from fixtures_refusals import (
    IN_TURN,
    ONE,
    OSLO,
    SPREAD,
    TOWER,
    VIENNA,
    Interrupted,
    raising,
    refused,
)
from recipe import TINY_FACTS, contexts, loop, relative, tiny_method
from test_recipe import plain

import unified_edit as ue
from unified_edit.editing import layer_loop, named
from unified_edit.errors import (
    ContradictionError,
    EditFileError,
    FactError,
    InfeasibleError,
    MethodError,
    ReportFileError,
    SharedSubjectError,
)
from unified_edit.model.tensor_files import read_safetensors, write_safetensors

PROMPT = "The museum is in the city of"
ATHENS = ue.Fact("{} was born in", "Athens", "a target that is not looked at")
ITEMS = [PROMPT, ATHENS, "The museum was"]
WEIGHTS = pytest.mark.parametrize("weight", ["exact", 2.5])
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def double(make_gpt2, statistics_of):
    """(a tiny GPT-2 in float64, C0 of all its layers)."""
    model = make_gpt2(2, torch.float64)
    return model, statistics_of(model)


@pytest.fixture
def editor(tiny, tiny_tokenizer, tiny_statistics):
    """editor(history, method, **more) of the tiny model."""

    def made(history=None, method=ONE, **more):
        return ue.Editor(
            tiny, tiny_tokenizer, method=method, statistics=tiny_statistics, history=history, **more
        )

    return made


def literal_keys(model, tokenizer, templates, layer, mean):
    """K_p of ITEMS, read one text at a time: the beginning that both prompts have once."""
    whole, short = (
        reference.keys_of_text(model, reference.encode(tokenizer, text), layer).T
        for text in (ITEMS[0], ITEMS[2])
    )
    common = reference.encode(tokenizer, "The museum")
    assert reference.encode(tokenizer, ITEMS[0])[: len(common)] == common
    k = reference.key(model, tokenizer, ATHENS.prompt, ATHENS.subject, templates, layer, mean)
    return torch.cat([k[:, None], whole, short[:, len(common) :]], dim=1)


def literal_edit(model, tokenizer, stats, method, facts, templates, weight, more=lambda layer: ()):
    """{layer: what was solved}, K_p of each; `more(layer)`: keys whose values are held as well."""
    kept, todo = {}, list(method.layers)

    def solve(C0, K, R):
        layer = todo.pop(0)
        kept[layer] = literal_keys(model, tokenizer, templates, layer, method.key_mean.name)
        return reference.preserving_delta(
            C0, K, R, method.ridge_for(len(facts)), torch.cat([kept[layer], *more(layer)], dim=1),
            weight,
        )  # fmt: skip

    return reference.edit_deltas_multi_layer(
        model, tokenizer, plain(facts), method.layers, {at: stats.C0(at) for at in LAYERS}, solve,
        templates, mean=method.key_mean.name, **loop(method),
    ), kept  # fmt: skip


@WEIGHTS
@pytest.mark.parametrize(
    ("method", "changes"),
    [(ue.EMMET, {"layers": LAYERS}), (ue.MEMIT, {"layers": LAYERS, "ridge": 0.5}), (ue.ROME, {})],
    ids=lambda one: getattr(one, "name", ""),
)
def test_whole_edits(double, tiny_tokenizer, method, changes, weight) -> None:
    model, stats = double
    facts = TINY_FACTS[:1] if method.sequential else TINY_FACTS
    method = tiny_method(method, "gpt2", **changes).resolve(model)
    edit = ue.edit(
        model, tiny_tokenizer, facts, method, statistics=stats, apply=False,
        preserve=ue.Preserve(ITEMS, weight=weight),
    )  # fmt: skip
    templates = contexts(edit.provenance.prefixes)
    wanted, kept = literal_edit(model, tiny_tokenizer, stats, method, facts, templates, weight)
    for layer in method.layers:
        name = edit.names[layer]
        assert relative(edit.preserved_keys[name], kept[layer]) <= 1e-10
        assert relative(edit.delta(layer), wanted[layer].delta) <= 1e-8
    # without them it is another edit
    free = ue.edit(model, tiny_tokenizer, facts, method, statistics=stats, apply=False)
    assert relative(free.delta(method.layers[0]), edit.delta(method.layers[0])) > 1e-3
    assert free.preserved.empty and not free.preserved_keys


@WEIGHTS
@pytest.mark.parametrize("history", ["hard", "soft"])
def test_beside_a_history(double, tiny_tokenizer, history, weight) -> None:
    model, stats = double
    method = tiny_method(ue.MEMIT, "gpt2", layers=(1,), ridge=0.5).resolve(model)
    owner = ue.Editor(model, tiny_tokenizer, method=method, statistics=stats, history=history)
    earlier = owner.edit(TINY_FACTS[:1])
    edit = owner.edit(TINY_FACTS[1:], apply=False, preserve=ue.Preserve(ITEMS, weight=weight))
    templates, past = contexts(edit.provenance.prefixes), earlier.keys[earlier.names[1]]
    lam, K = 0.5, edit.keys[edit.names[1]]
    kept = literal_keys(model, tiny_tokenizer, templates, 1, method.key_mean.name)
    K0 = model.transformer.h[1].mlp.c_proj.weight.detach().T
    R = edit.targets[edit.names[1]] - K0 @ K
    C0 = stats.C0(1)
    if history == "hard" and weight == "exact":
        wanted = reference.preserving_delta(C0, K, R, lam, torch.cat([kept, past], 1), "exact")
    elif history == "hard":
        C0 = C0 + weight / lam * kept @ kept.T
        wanted = reference.preserving_delta(C0, K, R, lam, past, "exact")
    else:
        wanted = reference.preserving_delta(C0 + past @ past.T / lam, K, R, lam, kept, weight)
    owner.reset()
    assert relative(edit.preserved_keys[edit.names[1]], kept) <= 1e-10
    assert relative(edit.delta(1), wanted) <= 1e-8
    if history == "hard":
        assert float((edit.delta(1) @ past).norm()) <= 1e-10 * float(edit.delta(1).norm())


def test_what_is_preserved_exactly_does_not_move(double, tiny_tokenizer) -> None:
    """Delta K_p = 0 where each layer is written; of a prompt nothing changes, whatever it is."""
    model, stats = double
    method = tiny_method(ue.MEMIT, "gpt2", layers=LAYERS, ridge=0.5)
    ids = reference.encode(tiny_tokenizer, PROMPT)
    with torch.no_grad():
        before = reference.logits_of(model, ids)
    edit = ue.edit(
        model, tiny_tokenizer, TINY_FACTS, method, statistics=stats, preserve=iter(ITEMS)
    )
    for layer in LAYERS:
        delta, K = edit.delta(layer), edit.preserved_keys[edit.names[layer]]
        assert float((delta @ K).norm()) <= 1e-10 * float(delta.norm() * K.norm())
    with torch.no_grad():
        assert relative(reference.logits_of(model, ids), before) <= 1e-10
    assert (edit.preserved.filter(like="moved") <= 1e-10).all(axis=None)
    edit.undo()
    # the keys of the last layer are those of the edited model: lower layers count
    with torch.no_grad():
        free = ue.edit(model, tiny_tokenizer, TINY_FACTS, method, statistics=stats)
        assert relative(reference.logits_of(model, ids), before) > 1e-4
        free.undo()


@WEIGHTS
def test_it_is_the_best_of_what_is_allowed(double, tiny_tokenizer, monkeypatch, weight) -> None:
    """The gradient of the cost vanishes, or answers to the keys that are held and nothing else."""
    model, stats = double
    lam, asked = 0.5, []
    own = layer_loop.solve
    monkeypatch.setattr(
        layer_loop, "solve", lambda *args, **more: asked.append(args) or own(*args, **more)
    )
    edit = ue.edit(
        model, tiny_tokenizer, TINY_FACTS, tiny_method(ue.MEMIT, "gpt2", ridge=lam),
        statistics=stats, apply=False, preserve=ue.Preserve(ITEMS, weight=weight),
    )  # fmt: skip
    (_, K, R), delta = asked[0], edit.delta(1)
    Kp = edit.preserved_keys[edit.names[1]]
    gradient = lam * delta @ stats.C0(1) + (delta @ K - R) @ K.T
    size = float((R @ K.T).norm())
    if weight == "exact":
        Q = torch.linalg.qr(Kp).Q
        assert float(gradient.norm()) > 1e-3 * size, "nothing was in the way"
        gradient = gradient - gradient @ Q @ Q.T
    else:
        gradient = gradient + weight * delta @ Kp @ Kp.T
    assert float(gradient.norm()) <= 1e-10 * size


# --- what an edit says of it ---


def test_how_far_each_moved(double, tiny_tokenizer) -> None:
    model, stats = double
    method = tiny_method(ue.MEMIT, "gpt2", layers=LAYERS, ridge=0.5)
    given = ue.Preserve(ITEMS, weight=0.5)
    rows = [reference.encode(tiny_tokenizer, text) for text in (PROMPT, ATHENS.text, ITEMS[2])]

    def after():
        with torch.no_grad():
            return [reference.logits_of(model, ids)[-1].softmax(-1) for ids in rows]

    before = after()
    W0 = {at: model.transformer.h[at].mlp.c_proj.weight.detach().T.clone() for at in LAYERS}
    edit = ue.edit(
        model, tiny_tokenizer, TINY_FACTS, method, statistics=stats, preserve=given
    )  # fmt: skip
    table, now = edit.preserved, after()
    assert list(table.item) == [PROMPT, ATHENS.text, ITEMS[2]]
    assert list(table["keys"]) == [len(rows[0]), 1, len(rows[2])]
    for number, row in enumerate(table.itertuples()):
        token = int(before[number].argmax())
        assert edit.kept[number].token == token
        assert row.said == tiny_tokenizer.decode([token])
        assert row.before == pytest.approx(float(before[number][token]), rel=1e-9)
        assert row.after == pytest.approx(float(now[number][token]), rel=1e-9)
        assert row.says == tiny_tokenizer.decode([int(now[number].argmax())])
        for layer in LAYERS:
            K = edit.preserved_keys[edit.names[layer]][:, list(edit.kept[number].columns)]
            moved = (edit.delta(layer) @ K).norm() / (W0[layer] @ K).norm()
            assert table[f"moved at {layer}"][number] == pytest.approx(float(moved), rel=1e-9)
    assert (table.after != table.before).all()
    edit.undo()
    # a larger weight leaves less
    heavier = ue.edit(
        model, tiny_tokenizer, TINY_FACTS, method, statistics=stats, apply=False,
        preserve=ue.Preserve(ITEMS, weight=500.0),
    )  # fmt: skip
    assert (heavier.preserved["moved at 0"] < 0.1 * table["moved at 0"]).all()


@WEIGHTS
def test_it_is_saved_and_loaded(tiny, editor, tmp_path, weight) -> None:
    given = ue.Preserve(ITEMS, weight=weight)
    edit = editor(None, SPREAD).edit([TOWER, VIENNA], preserve=given)
    edit.save(tmp_path / "edit.safetensors")
    loaded = ue.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.id == edit.id and loaded.kept == edit.kept
    assert loaded.provenance == edit.provenance and loaded.provenance.preserve == weight
    assert loaded.preserved.equals(edit.preserved) and loaded.kept[1].item == ATHENS
    assert all(torch.equal(loaded.preserved_keys[n], edit.preserved_keys[n]) for n in edit.updates)
    edit.undo()
    loaded.apply(tiny).undo()


def test_an_edit_that_names_nothing_says_nothing(editor, tmp_path) -> None:
    edit = editor().edit([TOWER], apply=False)
    edit.save(tmp_path / "edit.safetensors")
    tensors, meta = read_safetensors(tmp_path / "edit.safetensors", "unified_edit.edit/2", OSError)
    assert "kept" not in meta and "preserve" not in meta["provenance"]
    assert not any(name.startswith("preserved") for name in tensors)


@pytest.mark.parametrize(
    "damage", ["no keys", "a key too many", "a column too many", "a layer too few", "nothing said"]
)
def test_a_damaged_file(editor, tmp_path, damage) -> None:
    path, kind = tmp_path / "edit.safetensors", "unified_edit.edit/2"
    edit = editor().edit([TOWER], apply=False, preserve=ITEMS)
    edit.save(path)
    tensors, meta = read_safetensors(path, kind, EditFileError)
    name = f"preserved.{edit.names[1]}"
    if damage == "no keys":
        del tensors[name]
    elif damage == "a key too many":
        tensors[name] = torch.cat([tensors[name], tensors[name][:, :1]], dim=1)
    elif damage == "a column too many":
        meta["kept"][1]["columns"] = [900]
    elif damage == "a layer too few":
        meta["kept"][0]["moved"] = []
    else:
        del meta["kept"]
    write_safetensors(path, {n: t.contiguous() for n, t in tensors.items()}, kind, meta, OSError)
    with pytest.raises(EditFileError, match="incomplete or malformed"):
        ue.Edit.load(path)


# --- undone, replayed, in turn ---


@pytest.mark.parametrize(("history", "method"), [("hard", ONE), ("soft", SPREAD)])
@WEIGHTS
def test_a_replay_preserves_it_too(editor, history, method, weight) -> None:
    owner = editor(history, method)
    first = owner.edit([VIENNA])
    second = owner.edit([TOWER], preserve=ue.Preserve(ITEMS, weight=weight))
    (again,) = owner.undo(first, replay=True).replayed
    assert again.provenance.preserve == weight and again.id != second.id
    assert all(torch.equal(again.preserved_keys[n], second.preserved_keys[n]) for n in again.keys)
    alone = editor(history, method)
    alone.reset()
    wanted = alone.edit([TOWER], apply=False, preserve=ue.Preserve(ITEMS, weight=weight))
    name, layer = wanted.names[wanted.layers[0]], wanted.layers[0]
    # the same keys and names at the first layer, for a value that was found on another model
    K, V = again.keys[name], again.targets[name]
    W0 = owner.parts.weight(layer)
    R = V - W0.to_stored(owner.ledger.base_weight(W0)).double() @ K
    literal = reference.preserving_delta(
        owner.statistics.C0(layer), K, R, again.method.ridge_for(1), again.preserved_keys[name],
        weight,
    )  # fmt: skip
    assert relative(again.delta(layer), literal) <= 1e-8
    again.apply()
    probability = again.preserved.after
    said = ue.ask(owner.model, owner.tokenizer, [PROMPT], k=400)
    found = said[said.token == again.kept[0].said].probability.max()
    assert probability[0] == pytest.approx(found, rel=1e-4)
    assert [one.said for one in again.kept] == [one.said for one in second.kept]
    assert again.kept[0].moved != second.kept[0].moved or weight == "exact"


def test_in_turn(editor) -> None:
    """ROME writes facts one after another: each time the names count."""
    edit = editor(None, IN_TURN).edit([TOWER, VIENNA, OSLO], apply=False, preserve=ITEMS)
    delta, K = edit.delta(1), edit.preserved_keys[edit.names[1]]
    assert float((delta @ K).norm()) <= 1e-10 * float(delta.norm() * K.norm())


def test_it_is_undone_bit_for_bit(tiny, editor, monkeypatch) -> None:
    owner = editor(None, SPREAD)
    weight = tiny.transformer.h[1].mlp.c_proj.weight
    before = weight.detach().clone()
    owner.edit([TOWER], preserve=ITEMS).undo()
    assert torch.equal(weight, before)
    wrong = raising(Interrupted(), 2, layer_loop.solve)
    monkeypatch.setattr(layer_loop, "solve", wrong)
    with refused(tiny, Interrupted):
        owner.edit([TOWER], preserve=ITEMS)


# --- what cannot be ---


def test_what_is_written_cannot_be_preserved(tiny, editor) -> None:
    owner, soft = editor(), (lambda *items: ue.Preserve(items, weight=1.0))
    other = ue.Fact(TOWER.prompt, TOWER.subject, "Madrid")
    for given in (TOWER, other, TOWER.text, [ATHENS, TOWER], soft(other), soft(TOWER.text)):
        with refused(tiny, ContradictionError, "'The tower is in the city of'", "take it out of"):
            owner.edit([VIENNA, TOWER], preserve=given)
    shared = ue.Fact("{} was built in", "The  Tower", "Rome")
    with refused(tiny, SharedSubjectError, "was built in", "shares its subject", "weight=1.0"):
        owner.edit([TOWER], preserve=shared)
    with refused(tiny, ContradictionError, "The tower was", "begins as", "weight=1.0"):
        owner.edit([TOWER], preserve="The tower was")
    edit = owner.edit([TOWER], preserve=soft(shared, "The tower was"), apply=False)
    assert [("neither is held exactly" in note) for note in edit.warnings[:2]] == [True, True]


def test_a_key_of_which_nothing_is_left(tiny, editor) -> None:
    """More names than a key has room for: with a ridge too the fact could not be written."""
    places = ("Rome", "Paris", "Oslo", "Madrid", "Lisbon", "Dublin", "Athens")
    many = [f"I walked from {one} to the old harbour of {two}" for one in places for two in places]
    for method in (ONE, SPREAD):
        with refused(tiny, InfeasibleError, TOWER.text, "leaves 0", "I walked", "weight=1.0"):
            editor(None, method).edit([TOWER], preserve=many)
    least = ONE.replace(infeasible="least_violation")
    edit = editor(None, least).edit([TOWER, VIENNA], preserve=many[:1], apply=False)
    assert not edit.warnings or "leaves 0" not in edit.warnings[0]
    weighed = editor().edit([TOWER], preserve=ue.Preserve(many, weight=1.0), apply=False)
    assert weighed.diagnosis[1].memorization_error < 1e-8


def test_a_key_of_which_little_is_left(editor, monkeypatch) -> None:
    """A warning says how much, and which name is in the way."""
    monkeypatch.setattr(named, "CROWDED", 1.0)
    owner = editor()
    edit = owner.edit([TOWER], preserve=ITEMS, apply=False)
    L = torch.linalg.cholesky(owner.statistics.C0(1))
    name = edit.names[1]
    a, A = (torch.linalg.inv(L) @ K for K in (edit.keys[name], edit.preserved_keys[name]))
    Q = torch.linalg.qr(A).Q
    left = float((a - Q @ (Q.T @ a)).norm() / a.norm())
    cosines = ((A / A.norm(dim=0)).T @ a / a.norm()).abs().flatten()
    nearest = next(one for one in edit.kept if int(cosines.argmax()) in one.columns)
    words = (f"what is held leaves {left:.2g};", f"|cosine| {float(cosines.max()):.6g}")
    assert all(word in edit.warnings[0] for word in words) and 0 < left < 1
    assert repr(nearest.prompt) in edit.warnings[0] and TOWER.text in edit.warnings[0]


def test_facts_whose_difference_is_preserved(tiny, editor, monkeypatch) -> None:
    """Each has room, but not both; the message says that names take it up too."""
    own = layer_loop.feasible

    def nearly(metric, K, **more):
        return own(metric, torch.cat([K[:, :1], K[:, :1] * (1 + 1e-12)], dim=1), **more)

    monkeypatch.setattr(layer_loop, "feasible", nearly)
    with refused(tiny, InfeasibleError, "most collinear", "preserved exactly leaves them less"):
        editor().edit([TOWER, VIENNA], preserve=ITEMS)
    with pytest.raises(InfeasibleError) as caught:
        editor().edit([TOWER, VIENNA])
    assert "preserved" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ([], FactError, "names nothing"),
        ("", FactError, "a prompt to preserve is empty"),
        ([3], FactError, "takes facts and prompts: got int"),
        ("{} is in", FactError, "Fill it in, or give a Fact"),
        ({"items": PROMPT, "weight": 0}, MethodError, 'weight is 0; .* give "exact"'),
        ({"items": PROMPT, "weight": "hard"}, MethodError, "weight is 'hard'"),
        ({"items": [], "weight": 1.0}, FactError, "names nothing"),
    ],
)
def test_names_that_are_none(tiny, editor, given, kind, words) -> None:
    with pytest.raises(kind, match=words):
        preserve = ue.Preserve(**given) if isinstance(given, dict) else given
        editor().edit([TOWER], preserve=preserve)


def test_items_are_counted_once(editor) -> None:
    given = ue.Preserve([PROMPT, f" {PROMPT} ", ATHENS, ATHENS], weight=1)
    assert given.items == (PROMPT, ATHENS) and given.weight == 1.0
    assert ue.Preserve(ATHENS).items == (ATHENS,) and ue.Preserve(PROMPT).weight == "exact"
    one = editor().edit([TOWER], apply=False, preserve=PROMPT)
    assert list(one.preserved.item) == [PROMPT]


# --- where else it may be asked for -------------------------------------------------------------


def test_batches_that_are_evaluated_preserve_as_well(
    tiny, tiny_tokenizer, tiny_statistics, tmp_path
) -> None:
    records, made = [ue.Record(TOWER), ue.Record(VIENNA)], []
    given = {"batch_size": 1, "statistics": tiny_statistics, "bootstrap": 100}
    arguments = (tiny, tiny_tokenizer, records, ONE)
    ue.evaluate_edits(
        *arguments, preserve=iter(ITEMS), each=made.append, to=tmp_path / "a.jsonl", **given
    )
    assert len(made) == 2
    for edit in made:
        assert edit.provenance.preserve == "exact" and len(edit.kept) == len(ITEMS)
        (name,) = edit.updates
        moved = edit.updates[name].delta @ edit.preserved_keys[name]
        assert float(moved.norm()) < 1e-10 * float(edit.updates[name].delta.norm())
    with refused(tiny, ReportFileError, "preserve: "):
        ue.evaluate_edits(*arguments, preserve=PROMPT, to=tmp_path / "a.jsonl", **given)
    # it is told before the first batch
    with refused(tiny, SharedSubjectError, "is to be preserved", VIENNA.subject):
        ue.evaluate_edits(
            *arguments, preserve=ue.Fact("I saw {} in", VIENNA.subject, "Oslo"),
            each=lambda _: pytest.fail("something was edited"), **given,
        )  # fmt: skip


def test_what_has_no_closed_form_says_so(tiny, tiny_tokenizer, tiny_statistics) -> None:
    with refused(tiny, MethodError, "fine_tune cannot preserve", "gradient", "edit(..., preserve"):
        ue.fine_tune(tiny, tiny_tokenizer, TOWER, layer=1, norm=None, preserve=[PROMPT])
    hooks = ue.HookLayers(tiny, tiny_tokenizer, method=SPREAD, statistics=tiny_statistics)
    with refused(tiny, MethodError, "HookLayers cannot preserve", "its gate opens"):
        hooks.edit(TOWER, preserve=[PROMPT])
