"""Edits of concepts in pipelines of the real classes, from a prompt to its picture."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_pictures import needed
from reference_methods import uce_debias_targets, uce_weight
from torch import Tensor

import unified_edit as ue
from unified_edit.concepts import (
    DEBIAS,
    ERASE,
    ERASE_STYLE,
    MODERATE,
    Balance,
    ConceptEdit,
    active_edits,
    concept_keys,
    cross_attention,
    debias,
    edit_concepts,
    load_pipeline,
)
from unified_edit.errors import EditError, EditFileError, ModelChangedError, ModelError
from unified_edit.teaching.tiny_pictures import tiny_pipeline

needed("diffusers")


def weights(pipeline: Any) -> dict[str, Tensor]:
    """Copies of the matrices that read text."""
    matrices = cross_attention(pipeline.unet).items()
    return {name: weight.parameter.detach().clone() for name, weight in matrices}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- keys -----------------------------------------------------------------------------------------


def test_the_key_is_what_stands_at_the_last_token(sd: Any) -> None:
    for text, last in {"van gogh": 2, "a painting by monet": 4, "": 0}.items():
        ids = torch.tensor([sd.tokenizer(text)["input_ids"]])
        assert ids.shape[1] == last + 2  # the begin and the end
        with torch.no_grad():
            whole = sd.text_encoder(ids)[0][0]
        # alone and in a row of 77 the same sums are taken, in another order perhaps
        torch.testing.assert_close(
            concept_keys(sd, text)[:, 0], whole[last].double(), rtol=0, atol=1e-5
        )


def test_two_encoders_stand_above_each_other(clip_tokenizer: Any, pictures: Any) -> None:
    key = concept_keys(pictures, ["cat", "van gogh"])
    if not hasattr(pictures, "text_encoder_2"):
        assert key.shape == (32, 2)
        return
    assert key.shape == (32 + 64, 2)
    ids = torch.tensor([clip_tokenizer("van gogh")["input_ids"]])
    for encoder, rows in (
        (pictures.text_encoder, slice(0, 32)),
        (pictures.text_encoder_2, slice(32, 96)),
    ):
        with torch.no_grad():
            state = encoder(ids, output_hidden_states=True).hidden_states[-2][0, 2]
        torch.testing.assert_close(key[rows, 1], state.double(), rtol=0, atol=1e-5)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ERASE, ERASE_STYLE, MODERATE], ids=lambda method: method.name)
def test_weights_are_the_published_ones(pictures: Any, method: Any) -> None:
    """Every matrix that reads text, and no other parameter; in float32 up to its rounding."""
    before = {name: tensor.clone() for name, tensor in pictures.unet.state_dict().items()}
    edit = edit_concepts(pictures, ["van gogh", "cat"], method=method, preserve=["monet", "a dog"])
    read_text = ("attn2.to_k.weight", "attn2.to_v.weight")
    assert sorted(edit.names) == sorted(name for name in before if name.endswith(read_text))
    c1, c2, p1, p2, g = concept_keys(
        pictures, ["van gogh", "cat", "monet", "a dog", method.guide]
    ).unbind(1)
    for name, now in pictures.unet.state_dict().items():
        w_old = before[name]
        if name not in edit.names:
            assert torch.equal(now, w_old), name
            continue
        v_star = w_old.double() @ g
        published = uce_weight(w_old, [(c1, v_star), (c2, v_star)], [p1, p2])
        torch.testing.assert_close(now, published.float(), rtol=3e-7, atol=1e-8)
        torch.testing.assert_close(
            edit.delta(name), published - w_old.double(), rtol=1e-9, atol=1e-12
        )


def test_every_concept_has_its_guide_and_phrasings(sd: Any) -> None:
    before = weights(sd)
    method = ERASE.replace(phrasings=("{}", "painting by {}"), lam=0.2, edit_weight=3.0)
    edit = edit_concepts(sd, ["picasso", "monet"], guide=["art", "dog"], method=method)
    assert edit.texts == ("picasso", "painting by picasso", "monet", "painting by monet")
    towards = ("art", "painting by art", "dog", "painting by dog")
    C, G = concept_keys(sd, edit.texts), concept_keys(sd, towards)
    for name, w_old in before.items():
        columns = [(C[:, i], w_old.double() @ G[:, i]) for i in range(4)]
        published = uce_weight(w_old, columns, [], 0.2, 3.0)
        torch.testing.assert_close(weights(sd)[name], published.float(), rtol=3e-7, atol=1e-8)


def test_products_move_to_the_guide_and_stay_where_preserved(pictures: Any) -> None:
    """What is missed and what moves are at most what lam leaves: the keys are 5 long and longer."""
    before = weights(pictures)
    c, g, p = concept_keys(pictures, ["van gogh", "art", "monet"]).unbind(1)
    edit = edit_concepts(pictures, "van gogh", method=ERASE_STYLE, preserve="monet")
    missed, moved = float(edit.table.missed[0]), float(edit.kept.moved[0])
    assert missed < 0.05 and moved < 0.05
    for name, now in weights(pictures).items():
        old = before[name].double()
        residual = (now.double() @ c - old @ g).norm() / (old @ (c - g)).norm()
        # one column: W0 D c is parallel to W0 (g - c) in all matrices alike, up to float32
        assert float(residual) == pytest.approx(missed, rel=1e-3)
        assert float(((now - before[name]).double() @ p).norm()) < 0.1 * float((old @ p).norm())


def test_pictures_change_where_they_are_to(
    clip_tokenizer: Any, draw: Callable[..., Tensor]
) -> None:
    """All that is read of a preserved prompt is held to one part in 1e6: so is its picture.

    From float32 keys to a picture of two steps that grows by less than 10; the picture of the
    erased concept moves a thousand times as far.
    """
    pipeline = tiny_pipeline(clip_tokenizer, width=128)
    prompts = ("van gogh", "a painting by van gogh", "monet")
    before = {prompt: draw(pipeline, prompt) for prompt in prompts}
    method = ERASE_STYLE.replace(preserve_at="all", preserve_weight=1e6)
    edit = edit_concepts(pipeline, "van gogh", method=method, preserve="monet")
    moved = {
        prompt: float((draw(pipeline, prompt) - before[prompt]).abs().max()) for prompt in prompts
    }
    assert float(edit.kept.moved[0]) < 1e-6
    assert moved["monet"] < 1e-5
    assert min(moved["van gogh"], moved["a painting by van gogh"]) > 1e-3


def test_one_key_of_77_does_not_hold_a_picture(
    clip_tokenizer: Any, draw: Callable[..., Tensor]
) -> None:
    """As released: the last token of a preserved concept is held, whatever else is read moves."""
    pipeline = tiny_pipeline(clip_tokenizer, width=128)
    before = draw(pipeline, "monet")
    method = ERASE_STYLE.replace(preserve_weight=1e6)
    edit = edit_concepts(pipeline, "van gogh", method=method, preserve="monet")
    assert float(edit.kept.moved[0]) < 1e-6
    assert float((draw(pipeline, "monet") - before).abs().max()) > 1e-4


def test_half_precision(sd: Any) -> None:
    before = weights(sd.to(torch.bfloat16))
    edit = edit_concepts(sd, "van gogh", guide="art", preserve="monet")
    assert not same(before, weights(sd))
    assert all(weight.dtype == torch.bfloat16 for weight in weights(sd).values())
    edit.undo()
    assert same(before, weights(sd))


# --- one after the other --------------------------------------------------------------------------


def test_a_later_edit_reckons_with_those_in_force(sd: Any) -> None:
    before = weights(sd)
    first = edit_concepts(sd, "van gogh", guide="art")
    between = {name: old.double() + first.delta(name) for name, old in before.items()}
    second = edit_concepts(sd, "cat", guide="van gogh", preserve="picasso")
    c, g, p = concept_keys(sd, ["cat", "van gogh", "picasso"]).unbind(1)
    for name, w_old in between.items():
        published = uce_weight(w_old, [(c, w_old @ g)], [p])
        torch.testing.assert_close(second.delta(name), published - w_old, rtol=1e-9, atol=1e-12)
    assert active_edits(sd) == (first, second)
    assert first.provenance.state in second.provenance.state != first.provenance.state


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
def test_edits_come_out_in_any_order(sd: Any, order: tuple[int, ...]) -> None:
    before = weights(sd)
    edits = [edit_concepts(sd, name, guide="art") for name in ("van gogh", "monet", "cat")]
    for place in order[:2]:
        edits[place].undo()
    left = weights(sd)
    edits[order[2]].undo()
    assert same(before, weights(sd)) and active_edits(sd) == ()
    edits[order[2]].apply()  # as if the others had never been
    assert same(left, weights(sd)) and not same(before, left)
    with edits[order[2]].undone():
        assert same(before, weights(sd))
    with edits[order[0]].applied():
        assert len(active_edits(sd)) == 2
    assert same(left, weights(sd))


def test_it_is_not_applied_or_undone_twice(sd: Any) -> None:
    edit = edit_concepts(sd, "cat")
    with pytest.raises(EditError, match="already applied"):
        edit.apply()
    with pytest.raises(EditError, match="already applied"):
        edit.apply(sd)
    assert edit.undo() is edit and not edit.is_applied
    with pytest.raises(EditError, match="not applied, so it cannot be undone"):
        edit.undo()
    assert "not applied" in repr(edit) and "'cat'" in repr(edit)


def test_what_others_change_is_not_overwritten(sd: Any) -> None:
    edit = edit_concepts(sd, "cat")
    with torch.no_grad():
        next(iter(cross_attention(sd.unet).values())).parameter.add_(1.0)
    now = weights(sd)
    for act in (edit.undo, lambda: edit_concepts(sd, "dog")):
        with pytest.raises(ModelChangedError, match="something else changed it"):
            act()
    assert same(now, weights(sd))


def test_the_pipeline_may_go(clip_tokenizer: Any) -> None:
    edit = edit_concepts(tiny_pipeline(clip_tokenizer), "cat")
    assert not edit.is_applied
    with pytest.raises(EditError, match=r"edit.apply\(pipeline\)"):
        edit.undo()


# --- files ----------------------------------------------------------------------------------------


def test_a_file_gives_the_same_weights(
    pictures: Any, clip_tokenizer: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = weights(pictures)
    edit = edit_concepts(pictures, ["van gogh", "cat"], method=ERASE_STYLE, preserve=["monet"])
    edit.save(tmp_path / "art.safetensors")
    now = weights(pictures)
    edit.undo()
    again = ConceptEdit.load(tmp_path / "art.safetensors")
    assert again.id == edit.id and not again.is_applied
    assert (again.concepts, again.preserved, again.towards) == (
        ("van gogh", "cat"), ("monet",), ("art", "art"),
    )  # fmt: skip
    assert again.method == ERASE_STYLE and again.provenance == edit.provenance
    assert again.apply(pictures) is again and same(now, weights(pictures))
    again.undo()
    assert same(before, weights(pictures))
    # one map, not a matrix for each that it changes
    assert (tmp_path / "art.safetensors").stat().st_size < 30_000


def test_many_concepts_are_kept_as_one_matrix(sd: Any, tmp_path: Path) -> None:
    names = [f"{one} {other}" for one in ("red", "male", "a") for other in ("dog", "cat", "art")]
    method = ERASE.replace(phrasings=("{}", "image of {}", "painting of {}"))
    edit = edit_concepts(sd, names, method=method)
    assert len(edit.texts) == 27 and edit.text_map.is_dense
    now = weights(sd)
    edit.undo().save(tmp_path / "many.safetensors")
    ConceptEdit.load(tmp_path / "many.safetensors").apply(sd)
    assert same(now, weights(sd))


def test_a_product_is_made_once_where_it_is_used(sd: Any, monkeypatch: Any) -> None:
    """W0 D of each matrix: of an edit that is made alone, then put in, then looked for."""
    unet_ledger = importlib.import_module("unified_edit.concepts.unet_ledger")
    usual, made = unet_ledger.matmul, list[tuple[int, ...]]()

    def noting(left: Tensor, right: Tensor) -> Tensor:
        product: Tensor = usual(left, right)
        made.append(tuple(product.shape))
        return product

    monkeypatch.setattr(unet_ledger, "matmul", noting)
    names = [f"{one} {other}" for one in ("red", "male", "a") for other in ("dog", "cat", "art")]
    method = ERASE.replace(phrasings=("{}", "image of {}", "painting of {}"))
    edit = edit_concepts(sd, names, method=method)
    assert edit.text_map.is_dense and len(made) == 3 * len(edit.names)


def test_it_is_refused_elsewhere(sd: Any, clip_tokenizer: Any, tmp_path: Path) -> None:
    edit = edit_concepts(sd, "cat", preserve="dog")
    edit.save(tmp_path / "cat.safetensors")
    other = tiny_pipeline(clip_tokenizer, seed=1)
    half = tiny_pipeline(clip_tokenizer).to(torch.bfloat16)
    foreign = tiny_pipeline(clip_tokenizer)
    foreign.text_encoder = other.text_encoder
    for pipeline, what in ((other, "unet"), (half, "unet"), (foreign, "text encoder")):
        found = weights(pipeline)
        with pytest.raises(EditFileError, match=f"the {what} differs"):
            ConceptEdit.load(tmp_path / "cat.safetensors").apply(pipeline)
        assert same(found, weights(pipeline)) and active_edits(pipeline) == ()
    ConceptEdit.load(tmp_path / "cat.safetensors").apply(tiny_pipeline(clip_tokenizer))


def test_files_that_are_none(sd: Any, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    edit_concepts(sd, "cat").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(EditFileError, match="damaged"):
        ConceptEdit.load(path)
    path.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(EditFileError, match="checksum"):
        ConceptEdit.load(path)
    with pytest.raises(EditFileError, match="no such file"):
        ConceptEdit.load(tmp_path / "dog.safetensors")
    path.write_bytes(whole)
    with pytest.raises(EditFileError, match="concept_edit"):
        ue.Edit.load(path)


# --- debiasing ------------------------------------------------------------------------------------


def shown(*rounds: str) -> Callable[..., list[str]]:
    """A classifier that has seen, round for round, so many "m" and "f"."""
    coming = iter(rounds)
    return lambda images, kinds: [{"m": kinds[0], "f": kinds[1]}[one] for one in next(coming)]


QUICK = DEBIAS.replace(balance=Balance(images=4, steps=1, guidance_scale=1.0, rounds=5, step=0.5))


def test_debiasing_adds_what_is_missing(sd: Any) -> None:
    """Targets add up over the rounds, and each edit starts from the same W0."""
    before = weights(sd)
    edit = debias(
        sd,
        "doctor",
        ["male", "female"],
        shown("mmmm", "mmmf", "mmff"),
        method=QUICK,
        preserve="cat",
    )
    assert [one.shares for one in edit.rounds] == [
        ((1.0, 0.0),), ((0.75, 0.25),), ((0.5, 0.5),),
    ]  # fmt: skip
    scales = [0.5 * torch.tensor([-0.5, 0.5]), 0.5 * torch.tensor([-0.25, 0.25])]
    assert [one.weights[0] for one in edit.rounds] == [(0, 0), (-0.25, 0.25), (-0.375, 0.375)]
    c, male, female, p = concept_keys(sd, ["doctor", "male", "female", "cat"]).unbind(1)
    for name, w_old in before.items():
        v_star = uce_debias_targets(w_old, c, [male, female], scales)
        published = uce_weight(w_old, [(c, v_star)], [p])
        torch.testing.assert_close(weights(sd)[name], published.float(), rtol=3e-7, atol=1e-8)
    assert active_edits(sd) == (edit,)
    assert edit.towards == ("-0.375 'male' +0.375 'female'",)
    edit.undo()
    assert same(before, weights(sd))


def in_two_rounds(
    pipeline: Any, concepts: list[str], pictures: tuple[str, ...], tolerance: float
) -> ConceptEdit:
    """Two concepts debiased to equal shares, by four pictures of each in each of two rounds."""
    balance = Balance(images=4, steps=1, guidance_scale=1.0, rounds=2, tolerance=tolerance)
    return debias(
        pipeline, concepts, ["male", "female"], shown(*pictures), shares=[0.5, 0.5],
        method=QUICK.replace(balance=balance),
    )  # fmt: skip


def test_debiasing_several_concepts_in_other_shares(sd: Any, tmp_path: Path) -> None:
    """A concept that is right is left alone in that round, whatever the others need."""
    pictures = ("mmmm", "mfff", "mmmf", "mmff")
    edit = in_two_rounds(sd, ["doctor", "a doctor"], pictures, tolerance=0.3)
    assert edit.rounds[1].weights == ((-0.5, 0.5), (0.0, 0.0))
    assert edit.rounds[1].shares == ((0.75, 0.25), (0.5, 0.5))
    edit.save(tmp_path / "doctor.safetensors")
    assert ConceptEdit.load(tmp_path / "doctor.safetensors").rounds == edit.rounds


def test_a_concept_that_was_right_misses_nothing(sd: Any) -> None:
    pictures = ("mmmm", "mmff", "mmmf", "mmff")
    edit = in_two_rounds(sd, ["doctor", "cat"], pictures, tolerance=0.1)
    assert edit.table.asked[1] == 0
    assert edit.table.missed[1] < 0.1  # what the other one moves it by, in units of keys


def test_rounds_that_run_out_are_told(sd: Any, caplog: pytest.LogCaptureFixture) -> None:
    edit = debias(sd, "doctor", ["male", "female"], shown(*["mmmm"] * 5), method=QUICK)
    assert len(edit.rounds) == 5 and edit.is_applied
    assert "after 5 rounds the shares still differ by up to 0.50" in caplog.text


def test_debiasing_that_fails_leaves_no_trace(sd: Any) -> None:
    before, other = weights(sd), edit_concepts(sd, "cat")
    held = weights(sd)

    def failing(images: list[Any], kinds: tuple[str, ...]) -> list[str]:
        if len(active_edits(sd)) == 2:
            raise RuntimeError("no camera")
        return ["male"] * len(images)

    def ask(classify: Any) -> None:
        debias(sd, "doctor", ["male", "female"], classify, method=QUICK)

    with pytest.raises(RuntimeError, match="no camera"):
        ask(failing)
    with pytest.raises(EditError, match="must name one of"):
        ask(shown("mmmm", "mm"))
    with pytest.raises(EditError, match="must name one of"):
        ask(lambda images, kinds: ["a dog"] * len(images))
    with pytest.raises(EditError, match="wanted shares already"):
        ask(shown("mmff"))
    assert same(held, weights(sd)) and active_edits(sd) == (other,)
    other.undo()
    assert same(before, weights(sd))


# --- loading --------------------------------------------------------------------------------------


def test_pipelines_from_a_folder(sd: Any, tmp_path: Path) -> None:
    sd.save_pretrained(tmp_path / "sd")
    pipeline = load_pipeline(tmp_path / "sd", dtype="bfloat16")
    assert all(weight.dtype == torch.bfloat16 for weight in weights(pipeline).values())
    edit = edit_concepts(load_pipeline(str(tmp_path / "sd")), "cat")
    assert edit.provenance.model == str(tmp_path / "sd")
    assert edit.apply(sd).is_applied  # the same weights
    for weight in (tmp_path / "sd" / "unet").glob("*.safetensors"):
        weight.rename(weight.with_suffix(".bin"))
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_pipeline(tmp_path / "sd")


def test_pipelines_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="could not be loaded as a pipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(ModelError, match="give a folder or a Hub name"):
        load_pipeline("")
    with pytest.raises(ModelError, match="is not a type of weights"):
        load_pipeline(tmp_path, dtype="int8")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"pip install 'unified_edit\[diffusion\]'"):
        load_pipeline(tmp_path)


def test_diffusers_is_imported_by_those_who_load() -> None:
    code = "import sys, unified_edit as ue; ue.concepts.ERASE; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert importlib.import_module("unified_edit.concepts") is ue.concepts
