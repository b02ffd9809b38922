"""Hook layers (COMEBA-HK): against the published loop written out, and what the gates must do."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from fixtures_tiny import Factory, assert_unchanged, snapshot
from recipe import contexts, loop, relative, tiny_method

import unified_edit as ue
from unified_edit.editing.hook_gates import fallen_threshold, gate_of, z_score
from unified_edit.errors import (
    ContradictionError,
    EditError,
    EditFileError,
    MethodError,
    ModelChangedError,
    ObjectiveError,
    StatisticsError,
)
from unified_edit.model import Encoder, anatomy, ledger_of, tensor_hash
from unified_edit.objective import Metric
from unified_edit.statistics.key_sample import collect_sample, ends_at, subject_ends

#: Targets of one token: with more of them, what is read at the subject depends on the target where
#: the gate is the published one.
BATCHES = (
    (
        ue.Fact("I walked from the {} to the", "old river", "market"),
        ue.Fact("The {} is in the city of", "tower", "Rome"),
    ),
    (
        ue.Fact("The {} is in the city of", "museum", "Oslo"),
        ue.Fact("{} was born in", "Lisbon", "Oslo"),
    ),
    (ue.Fact("I walked from the {} to the", "old garden", "bridge"),),
)
FACTS = [fact for batch in BATCHES for fact in batch]
METHOD = tiny_method(ue.MEMIT, "gpt2", layers=(0, 1, 2), ridge=0.5)
Q = 0.02


@pytest.fixture
def make(make_gpt2: Factory, tiny_tokenizer, tiny_texts, statistics_of) -> Any:
    """make(gate, ...): a tiny GPT-2 in float64, and hook layers that nothing was written into."""

    def made(gate: str = "causal", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
        model = make_gpt2(2, dtype)
        given = {"method": METHOD, "q": Q, "alpha": 1.5, "texts": tiny_texts, "sample": 5000}
        given |= {"statistics": statistics_of(model), "gate": gate} | more
        return model, ue.HookLayers(model, tiny_tokenizer, **given)

    return made


@pytest.fixture
def written(make) -> Any:
    """written(gate, batches): the same with some batches in force."""

    def after(gate: str = "causal", batches: int = 2, **more: Any) -> Any:
        model, hooks = make(gate, **more)
        for batch in BATCHES[:batches]:
            hooks.edit(batch)
        return model, hooks

    return after


# --- the loop -------------------------------------------------------------------------------------


def preserved_keys(model, tokenizer, texts, subjects, layer) -> torch.Tensor:
    """Keys of all tokens of every other text, without those at which a subject ends."""
    kept = []
    for text in texts[::2]:
        ids = reference.encode(tokenizer, text)
        keys = reference.keys_of_text(model, ids, layer)
        spelled = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
        ends = [
            found.end() - 1
            for subject in subjects
            for found in re.finditer(rf"\b{subject}\b", text)
        ]
        for n, k in enumerate(keys):
            if not any(spelled[n] <= end < spelled[n + 1] for end in ends):
                kept.append(k)
    return torch.stack(kept)


@pytest.mark.parametrize("gate", ["causal", "published"])
def test_three_batches(make, tiny_tokenizer, tiny_texts, statistics_of, gate) -> None:
    texts = tiny_texts[::4]
    model, hooks = make(gate, texts=texts)
    method, stats = METHOD.resolve(model), statistics_of(model)
    prefixes = contexts(ue.Editor(model, tiny_tokenizer).prefixes(method.contexts))
    wanted = {
        layer: reference.Hook(
            reference.weight_of(model, layer),
            method.ridge * stats.C0(layer),
            float("inf") if gate == "causal" else 1.5,
        )
        for layer in method.layers
    }
    seen: list[str] = []
    for batch in BATCHES:
        seen += [fact.subject for fact in batch]
        with hooks.out():
            keys = {
                layer: preserved_keys(model, tiny_tokenizer, texts, seen, layer)
                for layer in (method.layers if gate == "causal" else ())
            }
            plain = [(fact.prompt, fact.subject, fact.target_new) for fact in batch]
            settings = {name: value for name, value in loop(method).items() if name != "site"}
            reference.hook_batch(
                model, tiny_tokenizer, plain, wanted, gate, prefixes, keys, Q, **settings
            )
        hooks.edit(batch)
        for layer in method.layers:
            W0 = reference.weight_of(model, layer)
            assert relative(hooks.delta(layer), wanted[layer].W_h - W0) <= 1e-7
            assert hooks.thresholds[layer] == pytest.approx(wanted[layer].threshold, rel=1e-7)
    # and the gates did something
    assert all(0 < threshold < float("inf") for threshold in hooks.thresholds.values())


def test_a_batch_of_one_layer_is_memit_with_the_earlier_keys(make) -> None:
    """Delta = R K' (lam C0 + K1 K1' + K K')^-1, from what a report says of values and keys."""
    model, hooks = make(method=METHOD.replace(layers=(1,)))
    hooks.edit(BATCHES[0])
    first = hooks.delta(1)
    other, twin = make(method=METHOD.replace(layers=(1,)))
    twin.edit(BATCHES[0])
    assert torch.equal(first, twin.delta(1))
    # written again with the same target, there is little left to do, and the sum stays close
    hooks.edit(BATCHES[0])
    assert relative(hooks.delta(1), first) < 1.0


def test_values_may_be_given(make) -> None:
    model, hooks = make()
    hooks.edit(BATCHES[0])
    twin_model, twin = make()
    twin.edit(BATCHES[0])
    editor = ue.Editor(twin_model, twin._editor.tokenizer)
    values = editor.optimise_values(BATCHES[1], twin.method)
    hooks.edit(BATCHES[1])
    twin.edit(BATCHES[1], values=values)
    assert all(torch.equal(hooks.delta(layer), twin.delta(layer)) for layer in hooks.layers)
    with pytest.raises(MethodError, match="another model or state"):
        twin.edit(BATCHES[1], values=values)


# --- the weights ----------------------------------------------------------------------------------


def test_weights_are_never_written(make) -> None:
    model, hooks = make()
    before = {name: tensor_hash(one) for name, one in model.named_parameters()}
    counts = {name: one._version for name, one in model.named_parameters()}
    fingerprint = ledger_of(model).fingerprint(wholly=True)
    clean = snapshot(model)
    hooks.edit(BATCHES[0])
    hooks.edit(BATCHES[1])
    assert {name: tensor_hash(one) for name, one in model.named_parameters()} == before
    assert {name: one._version for name, one in model.named_parameters()} == counts
    assert ledger_of(model).fingerprint(wholly=True) == fingerprint
    hooks.remove()
    assert_unchanged(model, clean)
    assert not hooks.is_attached


def test_in_and_out(written, tiny_tokenizer) -> None:
    model, hooks = written()
    ids = torch.tensor([tiny_tokenizer(FACTS[0].text)["input_ids"]])
    edited = model(ids).logits
    state = ledger_of(model).state()
    hooks.remove()
    base = model(ids).logits
    assert not torch.equal(edited, base)
    with hooks:
        assert torch.equal(model(ids).logits, edited)
        with hooks.out():
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, edited)
    assert torch.equal(model(ids).logits, base)
    assert ledger_of(model).state() != state
    assert hooks.attach().attach() is hooks
    assert ledger_of(model).state() == state
    ue.Editor(model, tiny_tokenizer).reset()
    assert not hooks.is_attached
    assert torch.equal(model(ids).logits, base)


def test_beside_an_edit_in_the_weights(written, tiny_tokenizer, tiny_texts, statistics_of) -> None:
    """They add up, and either can be taken out; statistics are those of the base all the while."""
    model, hooks = written()
    stats = statistics_of(model)  # collected while the hooks are in force
    hooks.remove()
    assert torch.equal(stats.C0(1), statistics_of(model).C0(1))
    base = model.transformer.h[1].mlp.c_proj.weight.clone()
    hooks.attach()
    edit = ue.edit(model, tiny_tokenizer, BATCHES[2], METHOD.replace(layers=(1,)), statistics=stats)
    assert edit.is_applied and hooks.is_attached
    hooks.remove()
    assert edit.is_applied
    edit.undo()
    assert torch.equal(model.transformer.h[1].mlp.c_proj.weight, base)


def test_evaluation_sees_them(written, tiny_tokenizer) -> None:
    model, hooks = written()
    records = [ue.Record(fact=replace(fact, target_true="Dublin")) for fact in BATCHES[0]]
    report = ue.evaluate(model, tiny_tokenizer, records, bootstrap=100)
    assert set(report.table["state"]) == {"before", "after"} if "state" in report.table else True
    assert report.before is not None
    compared = ue.compare(model, tiny_tokenizer, BATCHES[0][0].text, "market")
    with hooks.out():
        base = ue.compare(model, tiny_tokenizer, BATCHES[0][0].text, "market")
    assert compared["before"][0] == base["after"][0]
    assert compared["after"][0] > compared["before"][0]
    assert hooks.is_attached


# --- the gates ------------------------------------------------------------------------------------


def test_the_published_score_by_hand() -> None:
    moved = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = np.linalg.norm(moved.numpy(), axis=-1)
    wanted = (size - size.mean(-1, keepdims=True)) / size.std(-1, ddof=1, keepdims=True)
    assert z_score(moved).numpy() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("tokens", range(2, 12))
def test_the_largest_z_that_tokens_can_reach(tokens) -> None:
    """One token apart from all others has (n - 1) / sqrt(n), and none has more."""
    moved = torch.zeros(1, tokens, 4, dtype=torch.float64)
    moved[0, -1] = 5.0
    most = (tokens - 1) / tokens**0.5
    assert float(z_score(moved).max()) == pytest.approx(most, rel=1e-12)
    noise = torch.rand(500, tokens, 1, dtype=torch.float64)
    assert float(z_score(noise).max()) <= most * (1 + 1e-12)
    assert (most < 2.2) == (tokens <= 6)


def test_one_token_alone_never_opens_the_published_gate() -> None:
    one = torch.full((1, 1, 4), 100.0)
    assert z_score(one).isnan().all()
    assert not (z_score(one) >= -1e30).any()
    assert (gate_of("causal", 2.2).score(one) >= 100.0).all()


def test_the_published_threshold_only_falls() -> None:
    assert fallen_threshold(2.2, [3.0, 2.5]) == 2.2
    assert fallen_threshold(2.2, [3.0, 1.5]) == 1.5
    assert fallen_threshold(1.5, [float("nan"), 3.0]) == 1.5


def rows_of(tokenizer, texts) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Ids of each text, and all of them left-padded as the library does it."""
    from unified_edit.model.batching import left_padded

    rows = [tokenizer(text)["input_ids"] for text in texts]
    return rows, left_padded(rows, torch.device("cpu"))


def differences(model, tokenizer, texts) -> tuple[float, float]:
    """How far logits of the last token of each row are from those of the row alone: in a padded
    batch, and token by token with a cache."""
    rows, batch = rows_of(tokenizer, texts)
    together = model(**batch).logits[:, -1]
    padded = cached = 0.0
    for row, padded_logits in zip(rows, together, strict=True):
        alone = model(torch.tensor([row])).logits[0, -1]
        padded = max(padded, float((padded_logits - alone).abs().max()))
        past = None
        for token in row:
            given = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = given.past_key_values
        cached = max(cached, float((given.logits[0, -1] - alone).abs().max()))
    return padded, cached


TEXTS = [fact.text for fact in FACTS[:4]] + [f"I walked back. {FACTS[1].text}"]


@torch.no_grad()
def test_the_causal_gate_asks_the_token_alone(written, tiny_tokenizer) -> None:
    model, hooks = written("causal")
    assert differences(model, tiny_tokenizer, TEXTS) == pytest.approx((0, 0), abs=1e-9)
    with hooks.out():
        base = model(torch.tensor([tiny_tokenizer(TEXTS[0])["input_ids"]])).logits[0, -1]
    edited = model(torch.tensor([tiny_tokenizer(TEXTS[0])["input_ids"]])).logits[0, -1]
    assert float((edited - base).abs().max()) > 0.1


@torch.no_grad()
def test_the_published_gate_asks_padding_and_needs_company(written, tiny_tokenizer) -> None:
    model, hooks = written("published")
    padded, cached = differences(model, tiny_tokenizer, TEXTS)
    assert padded > 0.1 and cached > 0.1
    with hooks.out():  # without hooks the model has neither fault
        assert differences(model, tiny_tokenizer, TEXTS) == pytest.approx((0, 0), abs=1e-9)
    # token by token the gate is never open: the model says what the base says
    ids = tiny_tokenizer(TEXTS[1])["input_ids"]

    def stepwise() -> torch.Tensor:
        past = None
        for token in ids:
            given = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = given.past_key_values
        return given.logits

    edited = stepwise()
    with hooks.out():
        assert torch.equal(stepwise(), edited)


def generated(model, tokenizer, texts, **how: Any) -> list[list[int]]:
    """Twelve tokens behind each text, each text alone or all in one padded batch."""
    rows, batch = rows_of(tokenizer, texts)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    if how.pop("together", False):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.generate(**inputs, **options, **how)[:, -12:].tolist()
    return [
        model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **options, **how
        )[0, -12:].tolist()
        for row in rows
    ]


@pytest.mark.parametrize("gate", ["causal", "published"])
def test_generation(written, tiny_tokenizer, tiny_texts, gate) -> None:
    model, hooks = written(gate)
    texts = [*TEXTS, " ".join([*tiny_texts[:6], FACTS[1].text])]
    alone = generated(model, tiny_tokenizer, texts, use_cache=True)
    without = generated(model, tiny_tokenizer, texts, use_cache=False)
    together = generated(model, tiny_tokenizer, texts, use_cache=True, together=True)
    if gate == "causal":
        assert alone == without == together
        with hooks.out():
            assert generated(model, tiny_tokenizer, texts, use_cache=True) != alone
    else:
        assert alone != without and alone != together


def test_false_opens_and_misses(written, tiny_texts) -> None:
    model, hooks = written("causal", 3)
    found = hooks.false_opens()
    subjects = [fact.subject for fact in FACTS]
    table = hooks.gates(tiny_texts[1::2])
    others = table[~table["subject"]]
    assert found.tokens == len(others) // len(hooks.layers) > 500
    below = 0.0
    for layer in hooks.layers:
        share = others[others["layer"] == layer]["open"].mean()
        assert found.share[layer] == pytest.approx(share)
        # q, and the chance of some nine hundred tokens; where a lower layer opens, the key up here
        # is another one than the threshold was made for
        assert share - below <= 3 * Q
        below += share
    asked = [f"I walked back. {fact.text}" for fact in FACTS]
    missed, table = hooks.misses(asked), hooks.gates(asked)
    named = table[table["subject"]]
    assert missed.tokens == len(named) // len(hooks.layers) == len(FACTS)
    assert all(token.strip() in " ".join(subjects) for token in named["token"])
    for layer in hooks.layers:
        shut = 1 - named[named["layer"] == layer]["open"].mean()
        assert missed.share[layer] == pytest.approx(shut)
    assert (table["open"] == (table["score"] >= table["threshold"])).all()
    with pytest.raises(StatisticsError, match="edited subject"):
        hooks.misses(["Nothing of that."])


def test_what_the_gate_shuts_out_is_said(make) -> None:
    """With a threshold above all keys nothing that was written shows."""
    model, hooks = make(q=2e-4, sample=5000)
    report = hooks.edit(BATCHES[0])
    shut = [layer for layer, share in report.opened.items() if share < 1]
    told = [one for one in report.warnings if "stays shut" in one]
    assert len(told) == len(shut)
    assert set(report.thresholds) == set(hooks.layers)


# --- on and on ------------------------------------------------------------------------------------


def test_memory_does_not_grow(written) -> None:
    model, hooks = written("causal", 1)
    after_one = hooks.nbytes
    hooks.edit(BATCHES[1])
    hooks.edit(BATCHES[2])
    assert hooks.nbytes == after_one
    assert (hooks.batches, set(hooks.facts)) == (3, set(FACTS))


def test_saved_loaded_and_edited_on(
    written, tiny_tokenizer, tiny_texts, make_gpt2, tmp_path
) -> None:
    model, hooks = written("causal", 2)
    place = tmp_path / "hooks.safetensors"
    hooks.save(place)
    other = make_gpt2(2, torch.float64)
    loaded = ue.HookLayers.load(place, other, tiny_tokenizer, texts=tiny_texts)
    assert not loaded.is_attached
    assert (loaded.id, loaded.facts, loaded.batches) == (hooks.id, hooks.facts, 2)
    loaded.attach()
    ids = torch.tensor([tiny_tokenizer(FACTS[0].text)["input_ids"]])
    assert torch.equal(model(ids).logits, other(ids).logits)
    for one in (hooks, loaded):
        one.edit(BATCHES[2])
    assert hooks.thresholds == loaded.thresholds
    assert all(torch.equal(hooks.delta(layer), loaded.delta(layer)) for layer in hooks.layers)


def test_files_are_refused(written, tiny_tokenizer, make_gpt2, tmp_path, make) -> None:
    model, hooks = written("causal", 1)
    place = tmp_path / "hooks.safetensors"
    hooks.save(place)
    with pytest.raises(EditFileError, match="not beside this model"):
        ue.HookLayers.load(place, make_gpt2(3, torch.float64), tiny_tokenizer)
    place.write_bytes(place.read_bytes()[:-8])
    with pytest.raises(EditFileError, match="damaged"):
        ue.HookLayers.load(place, model, tiny_tokenizer)
    with pytest.raises(EditFileError, match="no such file"):
        ue.HookLayers.load(tmp_path / "nothing", model, tiny_tokenizer)
    with pytest.raises(EditError, match="nothing was written"):
        make()[1].save(place)


def test_going_on_needs_the_same_texts(written, tiny_tokenizer, tmp_path) -> None:
    model, hooks = written("causal", 1)
    place = tmp_path / "hooks.safetensors"
    hooks.save(place)
    hooks.remove()
    loaded = ue.HookLayers.load(place, model, tiny_tokenizer)
    with pytest.raises(EditError, match=r"texts=\.\.\."):
        loaded.edit(BATCHES[1])
    assert not loaded.is_attached


@pytest.mark.parametrize(
    "where", ["layer_loop.solve", "hook_writing.values_at", "layer_loop.keys_of"]
)
@pytest.mark.parametrize("in_force", [False, True])
def test_a_failed_batch_leaves_everything(written, make, monkeypatch, where, in_force) -> None:
    model, hooks = written() if in_force else make()
    before, state = snapshot(model), (hooks.id, hooks.facts, hooks.nbytes, hooks.thresholds)
    calls = 0
    module, name = where.split(".")
    place = f"unified_edit.editing.{module}.{name}"
    usual = getattr(importlib.import_module(f"unified_edit.editing.{module}"), name)

    def fails(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or name == "values_at":
            raise KeyboardInterrupt("stopped")
        return usual(*args, **more)

    monkeypatch.setattr(place, fails)
    with pytest.raises(KeyboardInterrupt):
        hooks.edit(BATCHES[2])
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert (hooks.id, hooks.facts, hooks.nbytes, hooks.thresholds) == state
    assert hooks.is_attached == in_force
    hooks.edit(BATCHES[2])
    other, twin = written() if in_force else make()
    twin.edit(BATCHES[2])
    assert all(torch.equal(hooks.delta(layer), twin.delta(layer)) for layer in hooks.layers)


# --- what is refused ------------------------------------------------------------------------------


def test_an_earlier_batch_is_contradicted(written) -> None:
    model, hooks = written("causal", 1)
    other = replace(BATCHES[0][1], target_new="Madrid")
    before = hooks.id
    with pytest.raises(ContradictionError, match="an earlier batch"):
        hooks.edit(other)
    assert hooks.id == before
    model, hooks = written("causal", 1, on_conflict="last")
    report = hooks.edit(other)
    assert any("overrules" in one for one in report.warnings)
    assert other in hooks.facts and BATCHES[0][1] not in hooks.facts
    report = hooks.edit(ue.Fact("In {} is the", BATCHES[0][0].subject, "Rome"))
    assert any("share a subject" in one for one in report.warnings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": ue.EMMET.replace(layers=(1,))}, "equality"),
        ({"method": ue.ROME.replace(layers=(1,))}, "equality"),
        ({"method": "MEMIT"}, "give a Method"),
        ({"gate": "open"}, "choose one of"),
        ({"q": 0.0}, "q is"),
        ({"q": 1.0}, "below 1"),
        ({"alpha": float("nan")}, "alpha is"),
        ({"sample": 3}, "1 / q keys"),
        ({"on_conflict": "first"}, "on_conflict"),
    ],
)
def test_arguments(make, given, words) -> None:
    with pytest.raises(MethodError, match=words):
        make(**given)


def test_other_hook_layers_and_other_weights(written, make, tiny_tokenizer) -> None:
    model, hooks = written("causal", 1)
    second = ue.HookLayers(model, tiny_tokenizer, method=METHOD)
    with pytest.raises(EditError, match="other hook layers"):
        second.attach()
    with pytest.raises(EditError, match="nothing was written"):
        second.false_opens()
    hooks.remove()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] += 1.0
    with pytest.raises(ModelChangedError, match="something changed them"):
        hooks.attach()
    with pytest.raises(ModelChangedError):
        hooks.edit(BATCHES[1])


# --- what it stands on ----------------------------------------------------------------------------


def test_a_sample_of_keys(make_gpt2, tiny_tokenizer, tiny_texts) -> None:
    model = make_gpt2()
    parts, encoder = anatomy(model), Encoder(tiny_tokenizer, anatomy(model))
    texts = [*tiny_texts[:40], " ", *tiny_texts[40:]]
    sample = collect_sample(parts, encoder, texts, (0, 2), 200, seed=1)
    assert len(sample) == 200 and sample.keys[2].shape == (200, 48)
    assert len({tuple(one) for one in sample.places.tolist()}) == 200
    again = collect_sample(parts, encoder, texts, (0, 2), 200, seed=1)
    assert torch.equal(sample.places, again.places)
    other = collect_sample(parts, encoder, texts, (0, 2), 200, seed=2)
    assert not torch.equal(sample.places, other.places)
    # drawn evenly from the first 64 texts, some 700 tokens: three standard deviations are 22
    lengths = [len(reference.encode(tiny_tokenizer, text)) if text.strip() else 0 for text in texts]
    assert int(sample.places[:, 0].max()) in range(32, 64)
    early = 200 * sum(lengths[:32]) / sum(lengths[:64])
    assert int((sample.places[:, 0] < 32).sum()) == pytest.approx(early, abs=22)
    for row in (0, 77, 199):
        number, start, end = sample.places[row].tolist()
        keys = reference.keys_of_text(model, reference.encode(tiny_tokenizer, texts[number]), 2)
        place = encoder.encode([texts[number]])[0].spans.index((start, end))
        assert relative(sample.keys[2][row], keys[place]) <= 1e-5
    few = collect_sample(parts, encoder, tiny_texts[:2], (0,), 200)
    assert len(few) == sum(len(reference.encode(tiny_tokenizer, text)) for text in tiny_texts[:2])
    with pytest.raises(StatisticsError, match="no text"):
        collect_sample(parts, encoder, ["", " "], (0,), 10)


def test_where_subjects_end() -> None:
    text = "York and New York, not Yorkshire; york. New York"
    assert subject_ends(text, ["York"]) == [3, 16, len(text) - 1]
    assert subject_ends(text, ["New York", "york"]) == [16, 37, len(text) - 1]
    assert subject_ends(text, ["x", "Yor", "ork"]) == []
    places = torch.tensor([[0, 0, 4], [0, 4, 8], [0, 12, 18]])
    assert ends_at(places, {0: text}, ["York", "York", ""]).tolist() == [True, False, True]


def test_a_metric_from_its_factor() -> None:
    C0 = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64))
    metric = Metric(C0)
    again = Metric.from_factor(metric.factor, metric.alive, 4)
    K = torch.tensor([[1.0], [0.0], [2.0], [0.5]], dtype=torch.float64)
    assert again.dim == 4 and torch.equal(again.whiten(K), metric.whiten(K))
    for factor, alive in (
        (metric.factor, None),
        (-metric.factor, metric.alive),
        (metric.factor[:2], metric.alive),
        (metric.factor * float("nan"), metric.alive),
    ):
        with pytest.raises(ObjectiveError):
            Metric.from_factor(factor, alive, 4) if alive is not None else Metric.from_factor(
                factor[:, :2]
            )


def test_a_file_says_where_it_comes_from(written, tmp_path) -> None:
    from safetensors import safe_open

    model, hooks = written("causal", 1)
    hooks.save(tmp_path / "hooks.safetensors")
    with safe_open(tmp_path / "hooks.safetensors", "pt") as handle:
        told = json.loads(handle.metadata()["description"])
    assert told["fingerprint"] == ledger_of(model).fingerprint()
    assert told["settings"] == asdict(hooks.settings)
    assert [ue.Fact(**fact) for fact in told["facts"]] == list(hooks.facts)


# --- atlas ----------------------------------------------------------------------------------------


def test_two_batches_on_atlas(atlas) -> None:
    model, tokenizer = atlas
    records = ue.load_records("atlas", limit=8, seed=1)
    before = [tensor_hash(one) for one in model.parameters()]
    hooks = ue.HookLayers(model, tokenizer, q=1e-2, sample=2000)
    for batch in (records[:4], records[4:]):
        report = hooks.edit([record.fact for record in batch])
        assert all(outcome.likeliest for outcome in report.outcomes)
        assert all(share == 1 for share in report.opened.values())
    scores = ue.evaluate(model, tokenizer, records, bootstrap=100).summary
    assert scores["ES"].value == 1 and scores["NS"].value >= 0.9
    paraphrases = [text for record in records for text in record.paraphrases]
    assert max(hooks.misses(paraphrases).share.values()) <= 0.1
    assert max(hooks.false_opens(tokens=4000).share.values()) <= 2e-2
    texts = [record.fact.text for record in records]
    alone = generated(model, tokenizer, texts, use_cache=True)
    assert alone == generated(model, tokenizer, texts, use_cache=False)
    assert alone == generated(model, tokenizer, texts, use_cache=True, together=True)
    assert [tensor_hash(one) for one in model.parameters()] == before
    hooks.remove()
