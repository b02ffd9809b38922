"""Causal tracing, held against a literal version that restores one activation at a time."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fixtures_tiny import LAYERS, POSITIONS, assert_unchanged, snapshot, unusual
from torch import Tensor, nn
from transformers import PreTrainedModel

import unified_edit as ue
from unified_edit.errors import FactError, MethodError, ModelError, TokenizationError
from unified_edit.measuring import Trace, TracedFact, locate, restored_runs, subject_sigma, tracing
from unified_edit.measuring.traced_runs import KINDS
from unified_edit.measuring.traces import PLACES

TOWER = ue.Fact("The {} is in the city of", "old tower", "Oslo", "Rome")
#: The object is not a word of the tokenizer's training text: several tokens.
MARKET = ue.Fact("{} was born in", "The market", "Rome", "Timbuktu")
FACTS = (TOWER, MARKET)


@contextmanager
def hooks(pairs: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_of(model: PreTrainedModel, kind: str, layer: int) -> nn.Module:
    block = model.transformer.h[layer]
    return {"state": block, "mlp": block.mlp, "attention": block.attn}[kind]


@torch.no_grad()
def literal(
    model: PreTrainedModel, tokenizer: Any, one: TracedFact, kind: str, window: int
) -> tuple[float, Tensor, Tensor]:
    """Clean (1), corrupted (samples) and restored (samples x tokens x layers) probabilities.

    One forward of one row for each of them, on a copy of the model in float64, with the noise
    that was used for `one`.
    """
    model = copy.deepcopy(model).double().eval()
    prompt = tokenizer(one.fact.text)["input_ids"]
    whole = tokenizer(f"{one.fact.text} {one.fact.target_true}")["input_ids"]
    assert whole[: len(prompt)] == prompt
    start, end = one.fact.subject_span
    offsets = tokenizer(one.fact.text, return_offsets_mapping=True)["offset_mapping"]
    subject = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    layers = len(model.transformer.h)

    def probability() -> float:
        logits = model(torch.tensor([whole])).logits[0]
        logs = [
            float(logits[place - 1].log_softmax(-1)[whole[place]])
            for place in range(len(prompt), len(whole))
        ]
        return math.exp(sum(logs) / len(logs))

    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            kept[layer] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    with hooks([(module_of(model, kind, i), keep(i)) for i in range(layers)]):
        clean = probability()

    def put_back(token: int, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, token] = kept[layer][0, token]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    samples = len(one.noise)
    corrupted = torch.empty(samples, dtype=torch.float64)
    restored = torch.empty(samples, len(prompt), layers, dtype=torch.float64)
    half = window // 2
    for sample in range(samples):

        def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, subject] += one.noise[sample]  # noqa: B023
            return output

        with hooks([(model.transformer.wte, corrupt)]):
            corrupted[sample] = probability()
            for token in range(len(prompt)):
                for layer in range(layers):
                    near = [i for i in range(layers) if abs(i - layer) <= half]
                    changes = [(module_of(model, kind, i), put_back(token, i)) for i in near]
                    with hooks(changes):
                        restored[sample, token, layer] = probability()
    return clean, corrupted, restored


@pytest.fixture(params=["gpt2", "gptj"])
def model(request: pytest.FixtureRequest, make_gpt2: Any, make_gptj: Any) -> PreTrainedModel:
    make = make_gpt2 if request.param == "gpt2" else make_gptj
    return make(seed=3, dtype=torch.float64)


@pytest.mark.equation("locate-corruption", "locate-total", "locate-indirect")
@pytest.mark.parametrize("window", [1, 3])
def test_tracing_matches_one_restoration_at_a_time(
    model: PreTrainedModel, tiny_tokenizer: Any, window: int
) -> None:
    trace = locate(model, tiny_tokenizer, FACTS, samples=2, window=window)
    assert [one.object for one in trace.facts] == ["Rome", "Timbuktu"]
    tolerance = 1e-9 if model.config.model_type == "gpt2" else 1e-5
    for one in trace.facts:
        for kind in KINDS:
            width = 1 if kind == "state" else window
            clean, corrupted, restored = literal(model, tiny_tokenizer, one, kind, width)
            # float64 on both sides, but for GPT-J's attention scores, which its code always
            # makes in float32: an error of 1e-7, carried on by four layers
            assert one.clean == pytest.approx(clean, rel=tolerance)
            assert torch.allclose(one.corrupted_samples, corrupted, rtol=tolerance)
            assert torch.allclose(one.restored[kind], restored, rtol=tolerance)
            effect = (restored - corrupted[:, None, None]).mean(0)
            assert torch.allclose(one.effect(kind), effect, rtol=0, atol=1e-3 * tolerance)
            # the comparison is not one of zeros
            assert float((restored / corrupted[:, None, None] - 1).abs().max()) > 0.01
        assert one.total_effect == pytest.approx(one.clean - float(corrupted.mean()))


def test_single_precision_and_small_batches_give_the_same(
    make_gpt2: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    precise = locate(make_gpt2(3, torch.float64), tiny_tokenizer, TOWER, samples=3)
    single = locate(make_gpt2(3), tiny_tokenizer, TOWER, samples=3)
    monkeypatch.setattr(restored_runs, "CPU_TOKENS", 70)
    monkeypatch.setattr(restored_runs, "TOGETHER", 170)
    monkeypatch.setattr(restored_runs, "POSITIONS", 2)
    small = locate(make_gpt2(3, torch.float64), tiny_tokenizer, TOWER, samples=3)
    for kind in KINDS:
        wanted = precise.facts[0].restored[kind]
        # probabilities carry an error of about 1e-6 in float32
        assert torch.allclose(single.facts[0].restored[kind], wanted, atol=1e-5)
        assert torch.allclose(small.facts[0].restored[kind], wanted, rtol=1e-9)


def test_each_kind_with_a_window_of_its_own(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    model, own = make_gpt2(3, torch.float64), {"state": 3, "attention": 5}
    trace = locate(model, tiny_tokenizer, TOWER, samples=1, window=3, windows=own)
    assert {kind: trace.width(kind) for kind in KINDS} == {"state": 3, "mlp": 3, "attention": 5}
    for kind in KINDS:
        wanted = literal(model, tiny_tokenizer, trace.facts[0], kind, trace.width(kind))[2]
        assert torch.allclose(trace.facts[0].restored[kind], wanted, rtol=1e-9)
    titles = [ax.get_title() for ax in trace.plot()]
    assert titles == [
        "residual stream, windows of 3", "MLP, windows of 3", "attention, windows of 5"
    ]  # fmt: skip
    plt.close("all")
    usual = locate(model, tiny_tokenizer, TOWER, samples=1, window=3)
    assert [usual.width(kind) for kind in KINDS] == [1, 3, 3]
    with pytest.raises(MethodError, match="'block' was not traced"):
        usual.width("block")


@pytest.mark.filterwarnings("error")
def test_some_layers_only(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    model = make_gpt2(3, torch.float64)
    whole = locate(model, tiny_tokenizer, FACTS, samples=2, window=3)
    some = locate(model, tiny_tokenizer, FACTS, samples=2, window=3, layers=[1, 3])
    assert some.layers == (1, 3) and whole.layers is None
    assert "2 facts in layers 1, 3 (" in repr(some) and "layers" not in repr(whole)
    for kind in KINDS:
        for one, other in zip(some.facts, whole.facts, strict=True):
            assert torch.allclose(one.effect(kind)[:, [1, 3]], other.effect(kind)[:, [1, 3]])
            assert one.effect(kind)[:, [0, 2]].isnan().all()
        partly, average = some.average(kind), whole.average(kind)
        assert partly.n == average.n
        for found, wanted in zip(partly[:3], average[:3], strict=True):
            assert np.allclose(found[:, [1, 3]], wanted[:, [1, 3]], atol=1e-9, equal_nan=True)
            assert np.isnan(found[:, [0, 2]]).all()
        assert some.effects(kind)[[0, 2]].isna().all(axis=None)
    assert set(some.table()["layer"]) == {1, 3} and not some.table()["effect"].isna().any()
    alone = locate(model, tiny_tokenizer, TOWER, samples=2, kinds="mlp", layers=2)
    assert set(alone.table()["layer"]) == {2}
    for trace, layers in ((some, ["1", "3"]), (alone, ["2"])):
        drawn = np.ravel(trace.plot())
        assert [label.get_text() for label in drawn[-1].get_xticklabels()] == layers
    plt.close("all")


def test_the_bar_counts_restorations_by_what_they_cost(
    make_gpt2: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(contextlib.nullcontext[Any]):
        def __init__(self, what: str, total: int, unit: str) -> None:
            self.what, self.total, self.unit = what, total, unit
            self.steps: list[int] = []
            super().__init__(self)

        def update(self, count: int) -> None:
            self.steps.append(count)

    bars: list[Bar] = []
    monkeypatch.setattr(tracing, "progress", lambda *told: bars.append(Bar(*told)) or bars[-1])
    trace = locate(make_gpt2(), tiny_tokenizer, FACTS, samples=1, kinds=("mlp",), layers=[0, 3])
    (bar,) = bars
    tokens = [len(one.tokens) - one.subject[0] for one in trace.facts]
    assert (bar.what, bar.unit, bar.total) == ("tracing", "restoration", 2 * sum(tokens))
    assert sum(bar.steps) == bar.total and len(bar.steps) == sum(tokens)
    # the first token's runs are the longest: they cost more than two of many equal restorations
    assert bar.steps[0] > 2 > bar.steps[tokens[0] - 1]


def test_what_was_not_corrupted_has_no_effect(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    one = locate(make_gpt2(), tiny_tokenizer, TOWER, samples=2).facts[0]
    first, last = one.subject
    assert first > 0
    assert list(one.tokens[first : last + 1]) == ["old", "tower"]
    assert one.labels[first] == "old*"
    for kind in KINDS:
        assert not one.effect(kind)[:first].any()
    # the last state at the last token is all that the next word is read from
    everything = one.restored["state"][:, -1, -1]
    assert torch.allclose(everything, torch.tensor(one.clean, dtype=torch.float64), rtol=1e-4)
    assert float(one.effect("state")[:-1, -1].abs().max()) < 1e-6


@pytest.mark.equation("locate-sigma", "locate-corruption")
def test_noise(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    model = make_gpt2()
    ids = []
    for fact in FACTS:
        start, end = fact.subject_span
        encoded = tiny_tokenizer(fact.text, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ids += [i for i, (a, b) in pairs if a < end and b > start]
    entries = model.transformer.wte.weight.detach().double().numpy()[ids]
    sigma = math.sqrt(((entries - entries.mean()) ** 2).sum() / (entries.size - 1))
    assert subject_sigma(model, tiny_tokenizer, FACTS) == pytest.approx(sigma, rel=1e-9)
    trace = locate(model, tiny_tokenizer, FACTS, samples=200, noise=2.0, kinds=["mlp"])
    assert trace.sigma == pytest.approx(sigma, rel=1e-9)
    for one in trace.facts:
        count = one.subject[1] - one.subject[0] + 1
        assert one.noise.shape == (200, count, 24)
        # 9,600 draws and more: a standard deviation is known to 1 %
        assert float(one.noise.std()) == pytest.approx(2 * sigma, rel=0.05)
        assert float(one.noise.mean()) == pytest.approx(0, abs=0.1 * sigma)
    # by itself, in a list, and in another order: the same noise, and the same result
    alone = locate(
        model, tiny_tokenizer, MARKET, samples=200, noise=2.0, sigma=trace.sigma, kinds="mlp"
    )
    assert torch.equal(alone.facts[0].noise, trace.facts[1].noise)
    assert torch.allclose(alone.facts[0].effect("mlp"), trace.facts[1].effect("mlp"), atol=1e-6)
    other = locate(model, tiny_tokenizer, MARKET, samples=200, noise=2.0, seed=1, kinds=("mlp",))
    assert not torch.equal(other.facts[0].noise, alone.facts[0].noise)
    assert alone.facts[0].noise.shape == trace.facts[0].noise.shape
    assert not torch.equal(alone.facts[0].noise, trace.facts[0].noise)


def test_without_a_true_object_the_models_own_word_is_followed(
    make_gpt2: Any, tiny_tokenizer: Any
) -> None:
    model = make_gpt2()
    fact = ue.Fact(TOWER.prompt, TOWER.subject, TOWER.target_new)
    one = locate(model, tiny_tokenizer, fact, samples=1, kinds="attention").facts[0]
    with torch.no_grad():
        logits = model(**tiny_tokenizer(fact.text, return_tensors="pt")).logits[0, -1]
    assert one.clean == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)
    assert one.object == tiny_tokenizer.decode([int(logits.argmax())]).strip()


def test_the_model_is_left_as_it_was(make_gpt2: Any, make_gptj: Any, tiny_tokenizer: Any) -> None:
    for make in (make_gpt2, make_gptj):
        model = unusual(make())
        before = snapshot(model)
        locate(model, tiny_tokenizer, FACTS, samples=1, window=3)
        assert_unchanged(model, before)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_the_model_is_left_as_it_was_after_an_exception(
    make_gpt2: Any, tiny_tokenizer: Any, calls: int
) -> None:
    model = unusual(make_gpt2())
    seen: list[int] = []

    def fail(_module: nn.Module, _args: Any, _output: Any) -> None:
        seen.append(1)
        if len(seen) == calls:
            raise ZeroDivisionError

    model.transformer.h[-1].mlp.register_forward_hook(fail)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        locate(model, tiny_tokenizer, TOWER, samples=1)
    assert_unchanged(model, before)


def traced(places: int, effect: float, subject: tuple[int, int] = (1, 3)) -> TracedFact:
    """A fact whose effects are `effect` plus the token's index plus a tenth of the layer's."""
    corrupted = torch.tensor([0.1, 0.3], dtype=torch.float64)
    grid = torch.arange(places)[:, None] + 0.1 * torch.arange(2)[None] + effect
    return TracedFact(
        fact=TOWER,
        object="Rome",
        tokens=tuple(f"t{index}" for index in range(places)),
        subject=subject,
        clean=0.9,
        corrupted_samples=corrupted,
        restored={"mlp": corrupted[:, None, None] + grid.double()},
        noise=torch.zeros(2, 1, 1),
    )


def of_facts(*facts: TracedFact) -> Trace:
    return Trace(facts, ("mlp",), 1, 3.0, 2, 0, 0.1)


def test_places() -> None:
    assert traced(8, 0).places == (
        None,
        "first subject token",
        "middle subject tokens",
        "last subject token",
        "first token after",
        "further tokens",
        "further tokens",
        "last token",
    )
    assert traced(3, 0, (0, 0)).places == ("last subject token", "first token after", "last token")
    assert traced(2, 0, (0, 0)).places == ("last subject token", "last token")
    assert traced(3, 0, (0, 2)).places == (
        "first subject token",
        "middle subject tokens",
        "last token",
    )


@pytest.mark.equation("locate-average")
def test_averages_and_intervals_over_facts() -> None:
    # first fact: five tokens "further" or so, subject of three; second: a subject of one token
    long, short = traced(8, 0.0), traced(3, 10.0, (0, 0))
    steps = (0.0, 0.1, 0.5, 1.2, 2.0, 2.1, 5.0, 8.0)
    several = [traced(8, step) for step in steps]
    trace = of_facts(long, short)
    value, low, high, n = trace.average("mlp")
    assert n == (1, 1, 2, 2, 1, 2)
    rows = dict(zip(PLACES, value.tolist(), strict=True))
    assert rows["first subject token"] == pytest.approx([1, 1.1])
    assert rows["last subject token"] == pytest.approx([(3 + 10) / 2, (3 + 10) / 2 + 0.1])
    assert rows["first token after"] == pytest.approx([(4 + 11) / 2, (4 + 11) / 2 + 0.1])
    assert rows["further tokens"] == pytest.approx([5.5, 5.6])
    assert rows["last token"] == pytest.approx([(7 + 12) / 2, (7 + 12) / 2 + 0.1])
    assert np.isnan(low[0]).all() and np.isnan(high[4]).all()
    # two facts: a resample holds one of them twice in half of the cases
    assert [low[2, 0], high[2, 0]] == pytest.approx([3, 10])

    value, low, high, n = of_facts(*several).average("mlp")
    assert n == (8,) * 6
    assert value[2, 0] == pytest.approx(3 + np.mean(steps))
    drawn = np.random.default_rng(5).choice(steps, size=(100_000, 8)).mean(axis=1)
    # quantiles of 2,000 resamples scatter by about 0.05 around those of 100,000
    assert low[2, 0] - 3 == pytest.approx(np.quantile(drawn, 0.025), abs=0.2)
    assert high[2, 0] - 3 == pytest.approx(np.quantile(drawn, 0.975), abs=0.2)
    assert (low < value).all() and (value < high).all()
    nothing = of_facts(short, short).average("mlp")
    assert np.isnan(nothing.value[0]).all() and nothing.n[0] == 0


def test_tables(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    model = make_gpt2()
    one = locate(model, tiny_tokenizer, TOWER, samples=2)
    table = one.table()
    tokens = len(one.facts[0].tokens)
    assert list(table.columns) == ["kind", "position", "token", "place", "layer", "effect"]
    assert len(table) == len(KINDS) * tokens * LAYERS
    row = table.query("kind == 'mlp' and position == 2 and layer == 1").iloc[0]
    assert row["effect"] == float(one.facts[0].effect("mlp")[2, 1])
    assert row["token"] == one.facts[0].tokens[2]
    wide = one.effects("attention")
    assert wide.shape == (tokens, LAYERS)
    assert np.array_equal(wide.to_numpy(), one.facts[0].effect("attention").numpy())
    assert "clean" in repr(one) and TOWER.text in repr(one)

    both = locate(model, tiny_tokenizer, FACTS, samples=2, kinds=("state", "mlp"))
    table = both.table()
    assert list(table.columns) == ["kind", "place", "layer", "effect", "low", "high", "n"]
    assert set(table["kind"]) == {"state", "mlp"}
    row = table.query("kind == 'mlp' and place == 'last token' and layer == 0").iloc[0]
    average = both.average("mlp")
    assert (row["effect"], row["low"], row["high"]) == tuple(each[-1, 0] for each in average[:3])
    assert both.effects("mlp").loc["last token", 0] == row["effect"]
    assert "2 facts" in repr(both)
    with pytest.raises(MethodError, match="attention"):
        both.average("attention")
    with pytest.raises(MethodError, match="state, mlp"):
        both.facts[0].effect("attention")


def test_plots(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    trace = locate(make_gpt2(), tiny_tokenizer, TOWER, samples=1, window=3)
    axes = trace.plot()
    assert [ax.get_title() for ax in axes] == [
        "residual stream",
        "MLP, windows of 3",
        "attention, windows of 3",
    ]
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == list(trace.facts[0].labels)
    both = locate(make_gpt2(), tiny_tokenizer, FACTS, samples=1, kinds="mlp")
    _, given = plt.subplots()
    assert both.plot(given) is given
    assert "last token" in [label.get_text() for label in given.get_yticklabels()]
    plt.close("all")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise": 0}, "noise is 0"),
        ({"noise": math.nan}, "noise is nan"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": 2.0}, "samples is 2.0"),
        ({"window": 2}, "odd number"),
        ({"window": -1}, "window is -1"),
        ({"window": True}, "window is True"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"kinds": ()}, "choose one or more"),
        ({"kinds": "block"}, "'state', 'mlp', 'attention'"),
        ({"kinds": ("mlp", "mlp")}, "each once"),
        ({"windows": 3}, "windows is 3; give a dictionary"),
        ({"windows": {"block": 3}}, "windows is {'block': 3}; give a dictionary"),
        ({"windows": {"mlp": 4}}, r"windows\['mlp'\] is 4; give an odd number"),
        ({"windows": {"mlp": 0}}, r"windows\['mlp'\] is 0"),
    ],
)
def test_settings_out_of_range(
    make_gpt2: Any, tiny_tokenizer: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        locate(make_gpt2(), tiny_tokenizer, TOWER, **settings)


def test_what_cannot_be_traced(make_gpt2: Any, tiny_tokenizer: Any) -> None:
    model = make_gpt2()
    with pytest.raises(FactError, match="list is empty"):
        locate(model, tiny_tokenizer, [])
    with pytest.raises(FactError, match="list of Fact"):
        locate(model, tiny_tokenizer, ["The tower is in"])
    long = ue.Fact("{} is" + " in" * POSITIONS, "The tower", "Rome", "Oslo")
    with pytest.raises(TokenizationError, match="131 tokens, but the model has only 128"):
        locate(model, tiny_tokenizer, long)
    for layers in ([LAYERS], [2, 1], [], [-1], [1, 1]):
        with pytest.raises(ModelError, match=r"blocks 0\.\.3"):
            locate(model, tiny_tokenizer, TOWER, layers=layers)
    with pytest.raises(ModelError, match="a layer is 'all'"):
        locate(model, tiny_tokenizer, TOWER, layers="all")
    with pytest.raises(ModelError, match="not a transformers model"):
        locate(nn.Linear(2, 2), tiny_tokenizer, TOWER)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    before = snapshot(model)
    with pytest.raises(ModelError, match="NaN"):
        locate(model, tiny_tokenizer, TOWER)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("name", "layers"), [("smollm2", 30), ("atlas", 6)])
def test_the_committed_traces(name: str, layers: int) -> None:
    """Means within their intervals, and of the facts that are named beside them."""
    path = Path(__file__).resolve().parents[1] / "book" / "data" / "smollm2_trace.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["places"] == list(PLACES) and "rome (MIT)" in result["facts from"]
    trace = result[name]
    facts, counts = trace["facts"], trace["facts with the place"]
    assert len(facts) == counts["last token"] and list(counts) == list(PLACES)
    assert all(fact["prompt"].count(fact["subject"]) == 1 for fact in facts)
    for run in ("clean", "corrupted"):
        mean = sum(fact[run] for fact in facts) / len(facts)
        assert trace[run] == pytest.approx(mean, abs=2e-4)
    for kind in KINDS:
        value, low, high = (
            np.array(trace["effects"][kind][one]) for one in ("value", "low", "high")
        )
        assert value.shape == low.shape == high.shape == (len(PLACES), layers)
        assert (low <= value).all() and (value <= high).all()
    # the last state of the last token is all that the answer is read from
    everything = trace["effects"]["state"]["value"][-1][-1]
    assert everything == pytest.approx(trace["clean"] - trace["corrupted"], abs=3e-4)
