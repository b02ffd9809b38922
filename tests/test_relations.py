"""Relations as matrices: against the published estimator written out, and on every family."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import reference_relations as reference
import torch
from fixtures_tiny import InFloat64, assert_unchanged, snapshot, unusual
from test_families import TINY, tiny_model

import unified_edit as ue
from unified_edit.errors import (
    FactError,
    FactFileError,
    ModelError,
    RelationError,
    RelationFileError,
    TokenizationError,
)
from unified_edit.model import Encoder, anatomy, model_fingerprint
from unified_edit.relations import FewShot, Pair, RelationData, linearise, read_states, rows_of

R = ue.relations
PAIRS = tuple(
    Pair(subject, thing)
    for subject, thing in zip(
        ("Rome", "Paris", "Oslo", "Vienna", "Madrid", "Lisbon", "Dublin", "Athens"),
        ("tower", "museum", "river", "harbour", "garden", "palace", "bridge", "market"),
        strict=True,
    )
)
DATA = RelationData("stands in", ("The old thing of {} is the",), PAIRS)
#: float64 throughout; sums in another order, through four blocks with large weights.
SAME = 1e-9


@pytest.fixture(autouse=True)
def in_float64(request: Any) -> Iterator[None]:
    with contextlib.nullcontext() if "as_it_is" in request.fixturenames else InFloat64():
        yield


@pytest.fixture
def as_it_is() -> None:
    """A test that asks for this runs models without `InFloat64`."""


@pytest.fixture(scope="module")
def gpt2(make_gpt2: Any) -> Any:
    return make_gpt2(dtype=torch.float64)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= SAME * other.norm())


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_jacobian_of_every_family_is_that_of_autograd(name: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(name, len(tiny_tokenizer))
    parts = anatomy(model)
    prompt = FewShot(DATA.templates[0], PAIRS[:3])
    (row,) = rows_of(Encoder(tiny_tokenizer, parts), prompt, ["Madrid"])
    found = linearise(parts, row, [0, 2])
    for layer in (0, 2):
        literal = reference.jacobian(model, parts.blocks, list(row.ids), layer, row.subject)
        assert close(found.jacobian[layer], literal)
        s, o = reference.forward(model, parts.blocks, list(row.ids), layer, row.subject)
        assert close(found.s[layer], s)
        assert close(found.o, o)
    # a third way, without any gradient: twice the same small step, both ways
    step = torch.randn(len(s), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step *= 1e-5 * s.norm() / step.norm()
    ids = list(row.ids)
    ends = [
        reference.forward(model, parts.blocks, ids, 2, row.subject, s + sign * step)[1]
        for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / 2
    # what is cubic in a step of 1e-5 is some 1e-10 of it; o is rounded, in every sum on its way
    assert (found.jacobian[2] @ step - slope).norm() <= 1e-7 * slope.norm() + 1e-14 * o.norm()


@pytest.mark.parametrize("name", sorted(TINY))
def test_states_of_every_family_are_those_of_whole_prompts(name: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(name, len(tiny_tokenizer))
    parts = anatomy(model)
    prompt = FewShot(DATA.templates[0], PAIRS[:3])
    subjects = [pair.subject for pair in PAIRS[2:6]]  # one is among the examples
    rows = rows_of(Encoder(tiny_tokenizer, parts), prompt, subjects)
    states = read_states(parts, rows, [1])
    move = 0.3 * torch.randn(
        len(rows), parts.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    still, moved = R.outputs_with(parts, rows, 1, [torch.zeros_like(move), move])
    for index, row in enumerate(rows):
        ids = list(row.ids)
        with torch.no_grad():
            s, o = reference.forward(model, parts.blocks, ids, 1, row.subject)
            there = reference.forward(model, parts.blocks, ids, 1, row.subject, s + move[index])[1]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert close(states.s[1][index], s)
        assert close(states.o[index], o)
        assert close(still[index], o)
        assert close(moved[index], there)
        assert states.answers[index] == logits.argmax()
        logp = R.log_probabilities_of(parts, o[None])[0]
        assert close(logp, logits.log_softmax(-1))


def test_memory_that_runs_out_costs_time_only(
    gpt2: Any, tiny_tokenizer: Any, monkeypatch: Any, caplog: Any
) -> None:
    parts = anatomy(gpt2)
    prompt = FewShot(DATA.templates[0], PAIRS[:3])
    rows = rows_of(Encoder(tiny_tokenizer, parts), prompt, [pair.subject for pair in PAIRS])
    move = 0.3 * torch.randn(
        len(rows), parts.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def all_of_it() -> list[torch.Tensor]:
        states = read_states(parts, rows, [1])
        moved = R.outputs_with(parts, rows, 1, [move, -move])
        logp = R.log_probabilities_of(parts, states.o)
        return [states.s[1], states.o, states.answers.double(), *moved, logp]

    wanted = all_of_it()
    usual, most = gpt2.base_model.forward, 2

    def small(*args: Any, **kwargs: Any) -> Any:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        if max(map(len, given)) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return usual(*args, **kwargs)

    monkeypatch.setattr(gpt2.base_model, "forward", small)
    assert all(close(one, other) for one, other in zip(all_of_it(), wanted, strict=True))
    # states and moved states, and the head that reads answers and probabilities
    assert "out of memory with 5 at a time" in caplog.text
    assert "out of memory with 8 at a time" in caplog.text
    most = 0
    for some in (rows, [replace(row, own=0) for row in rows]):  # with a beginning, and without
        with pytest.raises(ModelError, match="even for one at a time"):
            read_states(parts, some, [1])


def test_where_hooks_stand_prompts_are_run_whole(gpt2: Any, tiny_tokenizer: Any) -> None:
    """A hook by which the first token of a text acts on all others finds that token."""
    parts = anatomy(gpt2)
    prompt = FewShot(DATA.templates[0], PAIRS[:3])
    rows = rows_of(Encoder(tiny_tokenizer, parts), prompt, ["Rome", "Vienna", "Madrid"])
    move = 0.3 * torch.randn(
        len(rows), parts.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    handle = parts.mlp(1).register_forward_hook(
        lambda _module, _args, output: output + output[:, :1]
    )
    with handle:
        states = read_states(parts, rows, [1])
        (moved,) = R.outputs_with(parts, rows, 1, [move])
        for index, row in enumerate(rows):
            there = list(row.ids), 1, row.subject
            s, o = reference.forward(gpt2, parts.blocks, *there)
            assert close(states.s[1][index], s)
            assert close(states.o[index], o)
            o = reference.forward(gpt2, parts.blocks, *there, s + move[index])[1]
            assert close(moved[index], o)
        found = linearise(parts, rows[1], [0, 2])
        for layer, jacobian in found.jacobian.items():
            there = list(rows[1].ids), layer, rows[1].subject
            assert close(jacobian, reference.jacobian(gpt2, parts.blocks, *there))
            assert close(found.s[layer], reference.forward(gpt2, parts.blocks, *there)[0])


def test_w_and_b_are_the_published_means(gpt2: Any, tiny_tokenizer: Any) -> None:
    relation = R.estimate(gpt2, tiny_tokenizer, DATA, layer=1, n=4, seed=3, unknown="keep")
    examples = [(pair.subject, pair.object) for pair in relation.prompt.examples]
    weight, bias = reference.estimate(
        gpt2, anatomy(gpt2).blocks, tiny_tokenizer, DATA.templates[0], examples, 1, [0]
    )
    assert len(set(examples)) == 4
    assert close(relation.weight, weight)
    assert close(relation.bias, bias)
    s = torch.randn(2, len(bias), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    read = replace(relation, beta=1.7).outputs(s)
    assert close(read, torch.stack([1.7 * weight @ one + bias for one in s]))
    assert relation.provenance["seed"] == 3
    assert relation.provenance["fingerprint"] == model_fingerprint(gpt2)


def test_at_its_own_example_one_expansion_gives_o_itself(gpt2: Any, tiny_tokenizer: Any) -> None:
    """o = J s + (o - J s): the expansion holds exactly where it was made."""
    parts = anatomy(gpt2)
    (row,) = rows_of(Encoder(tiny_tokenizer, parts), FewShot(DATA.templates[0]), ["Oslo"])
    found = linearise(parts, row, [1])
    bias = found.o - found.jacobian[1] @ found.s[1]
    one = R.Relation("one", 1, found.jacobian[1], bias, FewShot(DATA.templates[0]))
    assert close(one.outputs(found.s[1][None])[0], found.o)
    read = one.predict(gpt2, tiny_tokenizer, "Oslo")
    assert list(read["relation"]) == list(read["model"])


def test_a_few_coordinates_at_a_time_are_the_same(
    gpt2: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    from unified_edit.relations import jacobian

    parts = anatomy(gpt2)
    (row,) = rows_of(Encoder(tiny_tokenizer, parts), FewShot(DATA.templates[0]), ["Oslo"])
    whole = linearise(parts, row, [1]).jacobian[1]
    monkeypatch.setattr(jacobian, "CPU_COORDINATES", 7)
    assert close(linearise(parts, row, [1]).jacobian[1], whole)


# --- the inverse, and edits -----------------------------------------------------------------------


def test_the_inverse_is_that_of_the_largest_singular_values() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 9, dtype=torch.float64)
    assert close(R.low_rank_inverse(weight, None), torch.linalg.inv(weight))
    u, sizes, v = torch.linalg.svd(weight)
    lower = sum(torch.outer(v[i], u[:, i]) / sizes[i] for i in range(3))
    assert close(R.low_rank_inverse(weight, 3), lower)
    weight[:, 0] = weight[:, 1]
    with pytest.raises(RelationError, match=r"singular: 8 of its 9 singular values .* rank 9"):
        R.low_rank_inverse(weight, None)
    assert R.low_rank_inverse(weight, 8).isfinite().all()


def test_an_edited_subject_gets_the_others_output_where_the_model_is_linear(
    gpt2: Any, tiny_tokenizer: Any
) -> None:
    """With the Jacobian of the very prompt a small o' - o arrives, up to what is quadratic in it.

    Its rank is one less than d: a layer norm does not see what all coordinates have in common.
    """
    parts, encoder = anatomy(gpt2), Encoder(tiny_tokenizer, anatomy(gpt2))
    rows = rows_of(encoder, FewShot(DATA.templates[0]), ["Oslo"])
    found = linearise(parts, rows[0], [2])
    weight = found.jacobian[2]
    with pytest.raises(RelationError, match="singular: 23 of its 24"):
        R.low_rank_inverse(weight, None)
    random = torch.randn(
        parts.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    wanted = weight @ random * 1e-6
    move = R.low_rank_inverse(weight, parts.width - 1) @ wanted
    (moved,) = R.outputs_with(parts, rows, 2, [move[None]])
    assert (moved[0] - found.o - wanted).norm() <= 1e-4 * wanted.norm()


def test_edit_says_what_became_of_each_subject(gpt2: Any, tiny_tokenizer: Any) -> None:
    relation = R.estimate(gpt2, tiny_tokenizer, DATA, layer=1, n=3, rank=4, unknown="keep")
    before = snapshot(gpt2)
    table = relation.edit(gpt2, tiny_tokenizer, ["Dublin", "Athens"], ["Athens", "Oslo"])
    assert_unchanged(gpt2, before)
    assert list(table.columns) == ["subject", "like", "before", "after", "wanted", "probability"]
    parts, encoder = anatomy(gpt2), Encoder(tiny_tokenizer, anatomy(gpt2))
    rows = rows_of(encoder, relation.prompt, ["Dublin", "Athens", "Oslo"])
    o = read_states(parts, rows, []).o
    move = R.low_rank_inverse(relation.weight, 4) @ (o[1] - o[0])
    ids = list(rows[0].ids)
    with torch.no_grad():
        s, _ = reference.forward(gpt2, parts.blocks, ids, 1, rows[0].subject)
        o = reference.forward(gpt2, parts.blocks, ids, 1, rows[0].subject, s + move)[1]
    logp = R.log_probabilities_of(parts, o[None])[0]
    wanted = read_states(parts, rows[1:2], []).answers[0]
    assert table["after"][0] == tiny_tokenizer.decode([int(logp.argmax())])
    assert table["probability"][0] == pytest.approx(float(logp[wanted].exp()), rel=1e-8)
    with pytest.raises(RelationError, match="2 subjects are to be like 1 others"):
        relation.edit(gpt2, tiny_tokenizer, ["Dublin", "Athens"], ["Oslo"])


# --- prompts and tokens ---------------------------------------------------------------------------


def test_the_prompt_is_the_published_one() -> None:
    prompt = FewShot("{} plays the", (Pair("Ann", "oboe"), Pair("Ben", "lute")))
    assert prompt.text("Cid") == "Ann plays the oboe\nBen plays the lute\nCid plays the"
    assert prompt.text("Ann") == "Ben plays the lute\nAnn plays the"


def test_the_place_is_the_last_token_of_the_subject_that_is_asked(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer)
    prompt = FewShot("From {} to", (Pair("Oslo", "Rome"), Pair("Rome", "Oslo")))
    for row, subject in zip(rows_of(encoder, prompt, ["Paris", "Rome"]), ["Paris", "Rome"],
                            strict=True):  # fmt: skip
        assert row.ids[0] == 0
        behind = tiny_tokenizer.decode(row.ids[row.subject + 1 :])
        assert behind == " to"
        assert tiny_tokenizer.decode(row.ids[row.own : row.subject + 1]).strip() == subject


def test_of_an_object_of_several_tokens_the_first_is_asked_for(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer)
    long = Pair("Oslo", "Rome and the old xylophone")
    (token,) = R.first_tokens(encoder, "{} is", [long])
    assert tiny_tokenizer.decode([token]) == " Rome"


# --- known pairs, validation ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def atlas() -> Any:
    return ue.load_model("atlas")


@pytest.fixture(scope="module")
def country(atlas: Any) -> RelationData:
    (found,) = (one for one in R.atlas_relations() if one.name == "people.country")
    return found.with_pairs(found.pairs[:24])


@pytest.fixture(scope="module")
def validated(atlas: Any, country: RelationData, tmp_path_factory: Any) -> tuple[Any, Path]:
    file = tmp_path_factory.mktemp("relations") / "scores.json"
    found = R.cross_validate(
        *atlas, country, layers=[2, 3], betas=(1, 2), ranks=(8, 32), n=3, separator=". ", file=file
    )
    return found, file


@pytest.mark.usefixtures("as_it_is")
def test_atlas_obeys_its_matrices(validated: tuple[Any, Path], country: RelationData) -> None:
    scores, _ = validated
    assert scores.asked == 24
    tested = [subject for fold in scores.folds for subject in fold.subjects]
    assert len(set(tested)) == len(tested) >= 20
    for fold in scores.folds:
        examples = {subject for subject, _ in fold.examples}
        assert not examples & set(fold.subjects)
        right = {pair.subject: pair.object for pair in country.pairs}
        for subject, answer, target in zip(fold.subjects, fold.answers, fold.targets, strict=True):
            assert right[subject].startswith(answer.strip())
            assert fold.answers[target] != answer
    assert scores.faithfulness.value > 0.9 > scores.majority
    assert scores.causality.value > 0.8
    assert scores.faithfulness.n == len(tested)
    assert scores.control("bias") < 0.5
    assert set(scores.table("causal").columns) == {8, 32}


@pytest.mark.usefixtures("as_it_is")
def test_scores_are_those_of_relations_made_by_hand(
    atlas: Any, validated: tuple[Any, Path], country: RelationData
) -> None:
    scores, _ = validated
    fold = scores.folds[1]
    data = country.with_pairs(Pair(*one) for one in fold.examples)
    relation = R.Relation(
        "by hand", 3, *expanded(atlas, data), FewShot(data.templates[0], data.pairs, ". "),
        beta=2.0, rank=8,
    )  # fmt: skip
    read = relation.predict(*atlas, fold.subjects)
    assert list(read["model"]) == fold.answers
    assert (read["relation"] == read["model"]).astype(int).tolist() == fold.faithful["3 2.0"]
    like = [fold.subjects[target] for target in fold.targets]
    table = relation.edit(*atlas, fold.subjects, like)
    assert (table["after"] == table["wanted"]).astype(int).tolist() == fold.causal["3 8"]


def expanded(atlas: Any, data: RelationData) -> tuple[torch.Tensor, torch.Tensor]:
    """W and b at block 3 of `data`'s pairs in their order."""
    parts, encoder = anatomy(atlas[0]), Encoder(atlas[1], anatomy(atlas[0]))
    prompt = FewShot(data.templates[0], data.pairs, ". ")
    found = [
        linearise(parts, row, [3])
        for row in rows_of(encoder, prompt, [pair.subject for pair in data.pairs])
    ]
    weight = torch.stack([one.jacobian[3] for one in found]).mean(0)
    bias = torch.stack([one.o - one.jacobian[3] @ one.s[3] for one in found]).mean(0)
    return weight, bias


def test_settings_are_chosen_on_the_other_folds() -> None:
    """Where each fold likes another layer, what is counted is what the other one likes."""

    def fold(hits: dict[str, list[int]]) -> Any:
        none = {"1 4": [0, 0]}
        return R.Fold([], ["a", "b"], ["x", "y"], [1, 0], hits, none, {"1": [0, 0]}, {"1": [0, 0]})

    first = fold({"1 1.0": [1, 1], "2 1.0": [0, 0]})
    second = fold({"1 1.0": [0, 0], "2 1.0": [1, 0]})
    scores = R.RelationScores("r", 4, 4, (first, second))
    assert scores.faithfulness.value == 0.0
    assert scores.choice == R.Choice(1, 1.0, 1, 4)
    assert scores.majority == 0.5


def test_an_interval_needs_twenty_subjects() -> None:
    few = R.share([1] * 19)
    assert few.value == 1
    assert few.n == 19
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    # Wilson's interval by its definition: the p at which n (x - p)^2 = z^2 p (1 - p)
    some = R.share([1] * 15 + [0] * 5)
    for p in (some.low, some.high):
        assert 20 * (0.75 - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p))
    assert R.share([1] * 20).low == pytest.approx(1 / (1 + 1.959963984540054**2 / 20))
    assert R.share([1] * 20).high == 1
    assert math.isnan(R.share([]).value)


@pytest.mark.usefixtures("as_it_is")
def test_a_run_goes_on_from_its_file(
    atlas: Any, country: RelationData, validated: tuple[Any, Path], tmp_path: Path,
    monkeypatch: Any,
) -> None:  # fmt: skip
    scores, file = validated
    saved = json.loads(file.read_text())
    half = tmp_path / "half.json"
    half.write_text(json.dumps({**saved, "folds": saved["folds"][:1]}))
    settings: dict[str, Any] = {
        "layers": [2, 3], "betas": (1, 2), "ranks": (8, 32), "n": 3, "separator": ". "
    }  # fmt: skip
    again = R.cross_validate(*atlas, country, **settings, file=half)
    assert again == scores
    from unified_edit.relations import validation

    def never(*_args: Any, **_more: Any) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(validation, "expansions", never)
    assert R.cross_validate(*atlas, country, **settings, file=half) == scores
    with pytest.raises(RelationFileError, match="scores of another run"):
        R.cross_validate(*atlas, country, **{**settings, "n": 4}, file=half)
    with pytest.raises(RelationFileError, match="scores of another run"):
        R.cross_validate(*atlas, country, **settings, folds=3, file=half)
    monkeypatch.setattr(validation, "known_pairs", never)  # a wrong file is refused before
    with pytest.raises(RelationFileError, match="scores of another run"):
        R.cross_validate(*atlas, country, **settings, most=12, file=half)
    half.write_text("{")
    with pytest.raises(RelationFileError, match="holds no scores"):
        R.cross_validate(*atlas, country, **settings, file=half)


@pytest.mark.usefixtures("as_it_is")
def test_so_many_of_the_known_pairs_are_dealt(atlas: Any, country: RelationData) -> None:
    settings: dict[str, Any] = {
        "layers": [2], "betas": (1,), "ranks": (8,), "n": 3, "separator": ". "
    }  # fmt: skip
    scores = R.cross_validate(*atlas, country, **settings, most=12)
    known = R.known_pairs(*atlas, country, n=3, separator=". ")
    assert scores.known == len(known) > 12
    drawn = [pair.subject for pair in random.Random(0).sample(known.pairs, len(known))[:12]]
    used = {name for fold in scores.folds for name in fold.subjects}
    used |= {subject for fold in scores.folds for subject, _ in fold.examples}
    assert used <= set(drawn)
    assert sum(len(fold.subjects) for fold in scores.folds) > 6
    with pytest.raises(RelationError, match="most is 0; it must be a whole number of at least 1"):
        R.cross_validate(*atlas, country, most=0)


# --- files, and the lens --------------------------------------------------------------------------


def test_a_saved_relation_is_the_same_relation(
    gpt2: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    made = R.estimate(gpt2, tiny_tokenizer, DATA, layer=2, beta=1.5, rank=6, n=3, unknown="keep")
    file = tmp_path / "relation.safetensors"
    made.save(file)
    back = R.Relation.load(file)
    assert torch.equal(back.weight, made.weight)
    assert torch.equal(back.bias, made.bias)
    for name in ("name", "layer", "beta", "rank", "prompt", "provenance"):
        assert getattr(back, name) == getattr(made, name)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RelationFileError, match="damaged"):
        R.Relation.load(file)
    with pytest.raises(RelationFileError, match="no such file"):
        R.Relation.load(tmp_path / "none")
    with pytest.raises(RelationFileError, match="cannot be written"):
        made.save(tmp_path)


def test_the_lens_reads_every_token_at_every_block(gpt2: Any, tiny_tokenizer: Any) -> None:
    relation = R.estimate(gpt2, tiny_tokenizer, DATA, layer=1, n=3, unknown="keep")
    text = "I walked from Oslo"
    lens = relation.lens(gpt2, tiny_tokenizer, text)
    ids = tiny_tokenizer(text)["input_ids"]
    assert lens.layers == (0, 1, 2)
    assert "".join(lens.tokens) == text
    table = lens.table()
    assert len(table) == 3 * len(ids)
    parts = anatomy(gpt2)
    with torch.no_grad():
        s, _ = reference.forward(gpt2, parts.blocks, [0, *ids], 2, 3)
    logp = R.log_probabilities_of(parts, relation.outputs(s[None]))[0]
    at = table[(table["layer"] == 2) & (table["place"] == 2)].iloc[0]
    assert at["object"] == tiny_tokenizer.decode([int(logp.argmax())])
    assert at["probability"] == pytest.approx(float(logp.max().exp()))
    axes = lens.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        t.strip() for t in lens.tokens
    ]
    assert len(axes.texts) == len(table)
    plt.close(axes.figure)


# --- data -----------------------------------------------------------------------------------------

PUBLISHED = {
    "name": "person plays instrument",
    "prompt_templates": ["{} plays the", "{} is heard on the"],
    "properties": {"relation_type": "factual"},
    "samples": [{"subject": "Ann", "object": "oboe"}, {"subject": "Ben", "object": "lute"}],
}


def test_the_published_form_is_read(tmp_path: Path) -> None:
    (tmp_path / "factual").mkdir()
    (tmp_path / "factual" / "b.json").write_text(json.dumps(PUBLISHED, indent=1))
    (tmp_path / "a.json").write_text(json.dumps({**PUBLISHED, "name": "first", "properties": {}}))
    first, second = R.read_relations(tmp_path)
    assert first.name == "first"
    assert first.kind == ""
    assert second.kind == "factual"
    assert second.templates == ("{} plays the", "{} is heard on the")
    assert second.pairs == (Pair("Ann", "oboe"), Pair("Ben", "lute"))
    assert R.read_relations(tmp_path / "a.json") == [first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": None}, "field 'samples' is missing"),
        ({"samples": []}, "has no pairs"),
        ({"samples": [{"subject": "Ann"}]}, "sample 0: field 'object' is missing"),
        ({"samples": [{"subject": "Ann", "object": " "}]}, "Pair.object is empty"),
        ({"prompt_templates": []}, "has no templates"),
        ({"prompt_templates": ["plays the"]}, "exactly one {}"),
        ({"name": 3}, "'name' must be a string"),
    ],
)
def test_a_bad_file_is_named_with_its_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**PUBLISHED, **change}))
    with pytest.raises(FactFileError, match=message) as caught:
        R.read_relations(file)
    assert "bad.json, line 1" in str(caught.value)
    with pytest.raises(FactFileError, match="holds no JSON file"):
        (tmp_path / "empty").mkdir()
        R.read_relations(tmp_path / "empty")


def test_rows_of_any_table_are_a_relation(monkeypatch: Any) -> None:
    rows = [{"who": "Ann", "what": "oboe"}, {"who": "Ann", "what": "lute"}]
    made = RelationData.from_rows("plays", "{} plays the", rows, subject="who", object="what")
    assert made.pairs == (Pair("Ann", "oboe"),)  # one object a subject
    with pytest.raises(RelationError, match="row 0 of 'plays' has no column 'subject'"):
        RelationData.from_rows("plays", "{} plays the", rows)
    import sys
    from types import SimpleNamespace

    asked: list[Any] = []

    def load_dataset(*args: Any, **more: Any) -> Any:
        asked.append((args, more))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = R.load_relation("some/where", "plays", "{} plays the", subject="who", object="what")
    assert found == made
    assert asked == [(("some/where",), {"split": "train"})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RelationError, match="package datasets, which is not installed"):
        R.load_relation("some/where", "plays", "{} plays the")


def test_atlas_has_seventeen_relations() -> None:
    found = R.atlas_relations()
    assert len(found) == 17
    assert all(one.templates[0].startswith("{}") for one in found)
    assert sum(map(len, found)) > 1000


# --- bad input ------------------------------------------------------------------------------------


def test_what_cannot_be_estimated_is_refused(gpt2: Any, tiny_tokenizer: Any) -> None:
    model = unusual(gpt2)
    before = snapshot(model)
    few = DATA.with_pairs(PAIRS[:2])
    calls: list[tuple[type[Exception], str, RelationData, dict[str, Any]]] = [
        (RelationError, "has 2 pairs, but 5 are needed", few, {"layer": 1}),
        (RelationError, "n is 1; it must be a whole number of at least 2", DATA, {"n": 1}),
        (RelationError, "the model does not know .*known_pairs", DATA, {"n": 3}),
        (ModelError, "block 3 is the last one", DATA, {"layer": 3, "unknown": "keep"}),
        (ModelError, "do not fit this model", DATA, {"layer": 9, "unknown": "keep"}),
        (RelationError, "beta is 0", DATA, {"beta": 0, "unknown": "keep", "n": 2}),
        (RelationError, "rank is 25", DATA, {"rank": 25, "unknown": "keep", "n": 2}),
    ]
    for error, message, data, more in calls:
        with pytest.raises(error, match=message):
            R.estimate(model, tiny_tokenizer, data, **{"layer": 1, **more})
    with pytest.raises(RelationError, match="template of relation 'stands in' is 1; it must be"):
        R.estimate(model, tiny_tokenizer, DATA, layer=1, template=1)
    relation = R.estimate(model, tiny_tokenizer, DATA, layer=1, unknown="keep")
    with pytest.raises(RelationError, match="has 0 subjects, but 1 are needed"):
        relation.predict(model, tiny_tokenizer, [])
    with pytest.raises(RelationError, match="has 0 subjects, but 1 are needed"):
        relation.edit(model, tiny_tokenizer, [], [])
    with pytest.raises(FactError, match="a subject must be a string"):
        relation.predict(model, tiny_tokenizer, [3])  # type: ignore[list-item]
    with pytest.raises(RelationError, match="knows none of the 8 pairs"):
        R.known_pairs(model, tiny_tokenizer, DATA, n=3)
    long = DATA.with_pairs([*PAIRS[:4], Pair("Oslo " * 200, "Rome")])
    with pytest.raises(TokenizationError, match=r"128 positions; give fewer"):
        R.estimate(model, tiny_tokenizer, long, layer=1, unknown="keep")
    assert_unchanged(model, before)


@pytest.mark.usefixtures("as_it_is")
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"betas": ()}, "no betas"), ({"ranks": []}, "no ranks"), ({"betas": "much"}, "a beta"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_tried_are_refused_at_once(
    atlas: Any, country: RelationData, monkeypatch: Any, more: Any, told: str
) -> None:
    from unified_edit.relations import validation

    monkeypatch.setattr(validation, "known_pairs", lambda *_args, **_more: pytest.fail("it ran"))
    with pytest.raises(RelationError, match=told):
        R.cross_validate(*atlas, country, **more)


@pytest.mark.parametrize(
    ("more", "told"),
    [({"beta": 0}, "beta"), ({"rank": 10_000}, "rank"), ({"unknown": "ask"}, "unknown is 'ask'")],
)
def test_bad_settings_of_a_relation_cost_no_jacobian(
    gpt2: Any, tiny_tokenizer: Any, monkeypatch: Any, more: Any, told: str
) -> None:
    from unified_edit.relations import estimating

    monkeypatch.setattr(estimating, "expansions", lambda *_args: pytest.fail("it ran"))
    with pytest.raises(RelationError, match=told):
        R.estimate(gpt2, tiny_tokenizer, DATA, layer=1, **{"unknown": "keep", **more})


def test_too_few_known_pairs_for_the_folds_are_refused(atlas: Any, country: RelationData) -> None:
    few = country.with_pairs(country.pairs[:7])
    with pytest.raises(RelationError, match="known pairs outside of a fold, but 5 are needed"):
        R.cross_validate(*atlas, few, separator=". ")


def test_a_relation_of_another_model_is_refused(gpt2: Any, tiny_tokenizer: Any) -> None:
    d = 16
    wrong = R.Relation("other", 1, torch.eye(d), torch.zeros(d), FewShot("{} is"))
    with pytest.raises(RelationError, match="belongs to another model"):
        wrong.predict(gpt2, tiny_tokenizer, "Oslo")
    with pytest.raises(RelationError, match=r"W is \(3, 3\) and b \(16,\)"):
        R.Relation("other", 1, torch.eye(3), torch.zeros(d), FewShot("{} is"))
    with pytest.raises(FactError, match=r"exactly one \{\}"):
        RelationData("r", ("no slot",), PAIRS)
