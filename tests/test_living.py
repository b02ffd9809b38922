"""The living page against the library: tokens, logits, k*, v*, Delta, files, links.

The page's engine runs in Node from its sources; `test_pages.py` has it in a browser. Fifty facts
instead of five: UNIFIED_EDIT_LIVING_FACTS=50.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT

import unified_edit as ue
from unified_edit.model import anatomy
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import statistics_for
from unified_edit.teaching import living

LIVE = ROOT / "book" / "live"
SOURCES = LIVE / "src"
BUNDLE = ROOT / "book" / "_static" / "living" / "living.js"
COUNT = int(os.environ.get("UNIFIED_EDIT_LIVING_FACTS", "5"))
NODE = shutil.which("node")
LAM = 1000.0
RUBBISH = ["", "#edits=", "#edits=%%%", "#edits=e30", "#edits=W10", "#what-to-try"]
needs_node = pytest.mark.skipif(NODE is None, reason="Node is not installed")


def kernel() -> str:
    """The kernel as the built script has it, in base64."""
    found = re.findall(r"\"(AGFzbQ[A-Za-z0-9+/=]+)\"", BUNDLE.read_text("utf-8"))
    assert len(found) == 1, "the script has no kernel, or several"
    return str(found[0])


@pytest.fixture(scope="module")
def packed(_atlas, tmp_path_factory) -> Path:
    ue.Editor(*_atlas).reset()
    path = tmp_path_factory.mktemp("living") / "atlas.bin"
    path.write_bytes(living.packed(*_atlas))
    return path


@pytest.fixture(scope="module")
def facts() -> list[ue.Fact]:
    chosen = random.Random(0).sample(ue.load_records("atlas"), max(COUNT, 3))
    return [one.fact for one in chosen]


def engine(packed: Path, sources: Path, facts: list[ue.Fact], folder: Path, **more: Any) -> Any:
    """What the engine makes of some facts; CalledProcessError where it breaks down."""
    assert NODE is not None
    cases = {
        "texts": [], "logits": [fact.text for fact in facts], "hashes": [], "rubbish": RUBBISH,
        "lam": LAM, "kernel": None,
        "facts": [
            {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target_new}
            for fact in facts
        ],
        **more,
    }  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    told = subprocess.run(
        [NODE, LIVE / "test" / "agree.mjs", sources, packed, folder / "cases.json",
         folder / "page.safetensors"],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    return json.loads(told.stdout)


@pytest.fixture(scope="module")
def found(packed, facts, knowledge, tmp_path_factory) -> Any:
    if NODE is None:
        pytest.skip("Node is not installed")
    texts = [text for text, _, _ in knowledge.prompts()]
    texts += ["Zürich, 1905: \"naïve\" 🙂 don't we'll", "  two  blanks ", "a\nb", "C₀ 12345"]
    return engine(
        packed, SOURCES, facts, tmp_path_factory.mktemp("found"), texts=texts,
        hashes=["", "abc", "ä" * 61, "x" * 1000], kernel=kernel(),
    ) | {"texts": texts}  # fmt: skip


def off(mine: Any, theirs: Any) -> float:
    """Relative distance of two vectors."""
    a, b = (torch.as_tensor(one, dtype=torch.float64).flatten() for one in (mine, theirs))
    return float((a - b).norm() / b.norm())


def disagreements(found: Any, facts: list[ue.Fact], model: Any, tokenizer: Any) -> list[str]:
    """Where the engine and the library say something different, beyond what rounding explains."""
    encoder = Encoder(tokenizer, anatomy(model))
    wrong = []
    for fact, one, mine in zip(facts, found["edits"], found["logits"], strict=True):
        ids = encoder.encode([fact.text])[0].ids
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        mine = torch.tensor(mine, dtype=torch.float64)
        reach = float(theirs.max() - theirs.min())
        if float((mine - theirs).abs().max()) > 1e-4 * reach:
            wrong.append(f"logits of {fact.text}")
        first, second = theirs.topk(2).values
        if first - second > 1e-4 * reach and mine.argmax() != theirs.argmax():
            wrong.append(f"the likeliest word of {fact.text}")
        edit = ue.edit(model, tokenizer, fact, apply=False)
        values = ue.optimise_values(model, tokenizer, fact)
        [(name, update)], keys = edit.updates.items(), edit.keys
        if off(one["key"], keys[name]) > 1e-5:
            wrong.append(f"k* of {fact.text}")
        if off(one["delta"], values.delta) > 1e-4:
            wrong.append(f"v* of {fact.text}")
        made = torch.tensor(one["left"])[:, None].double() @ torch.tensor([one["right"]]).double()
        if off(made, update.delta) > 1e-3:
            wrong.append(f"Delta of {fact.text}")
        if len(one["losses"]) != len(values.losses[0]):
            wrong.append(f"the steps of {fact.text}")
    return wrong


@needs_node
def test_every_text_of_atlas_has_the_same_tokens(found, atlas) -> None:
    model, tokenizer = atlas
    encoded = Encoder(tokenizer, anatomy(model)).encode(found["texts"])
    for text, mine, theirs in zip(found["texts"], found["tokens"], encoded, strict=True):
        assert mine["ids"] == list(theirs.ids), text
        if text.isascii() and text == " ".join(text.split()):  # others count characters otherwise
            assert [tuple(span) for span in mine["spans"]] == list(theirs.spans), text


@needs_node
def test_the_page_is_the_same_mathematics(found, facts, atlas) -> None:
    assert found["kernel"] == "WebAssembly"
    assert disagreements(found, facts, *atlas) == []


@needs_node
def test_plain_javascript_gives_the_same(packed, facts, atlas, tmp_path) -> None:
    found = engine(packed, SOURCES, facts[:1], tmp_path)
    assert found["kernel"] == "JavaScript"
    assert disagreements(found, facts[:1], *atlas) == []


@needs_node
def test_softened_rare_and_seen_through_the_lens(found, facts, atlas) -> None:
    model, tokenizer = atlas
    [layer] = ue.EMMET.resolve(anatomy(model)).layers
    metric = statistics_for(model, tokenizer, [layer]).metric(layer)
    for fact, one in zip(facts[:2], found["edits"], strict=False):
        soft = ue.edit(model, tokenizer, fact, ue.EMMET.replace(ridge=LAM))
        [update] = soft.updates.values()
        [key] = soft.keys.values()
        assert off([x * one["left"][0] for x in one["soft"].values()], update.delta[0]) < 1e-3
        rarity = float(metric.whiten(key).square().sum())
        assert one["rarity"] == pytest.approx(rarity, rel=1e-3)
        soft.undo()
        edit = ue.edit(model, tokenizer, fact)
        assert one["after"] == pytest.approx(edit.outcomes[0].after, abs=1e-3)
        assert one["lens"][-1] == pytest.approx(edit.outcomes[0].after, abs=1e-3)
        assert one["cost"] == pytest.approx(
            next(iter(edit.diagnosis.values())).preservation_error, rel=1e-3
        )
        edit.undo()


@needs_node
def test_undone_in_any_order_to_the_last_bit(found) -> None:
    assert found["before"] == found["after"] == found["mixed"]


@needs_node
def test_the_library_reads_the_file_and_writes_the_same_bits(
    found, packed, facts, atlas, tmp_path
) -> None:
    model, tokenizer = atlas
    engine(packed, SOURCES, facts[:1], tmp_path, kernel=kernel())
    edit = ue.Edit.load(tmp_path / "page.safetensors")
    assert edit.facts[0].target_new == facts[0].target_new
    assert edit.provenance.origin == "the living page of the book"
    edit.apply(model)  # compares the hash of the weight that comes of it with the page's own
    row = Encoder(tokenizer, anatomy(model)).continuations([(facts[0].text, facts[0].target_new)])
    [said] = likelihoods(anatomy(model), row)
    assert said.probability == pytest.approx(found["edits"][0]["after"], abs=1e-3)
    edit.undo()


@needs_node
def test_links_carry_edits_and_rubbish_is_called_so(found, facts) -> None:
    for fact, one in zip(facts, found["edits"], strict=True):
        [back] = one["address"]
        assert back["fact"]["subject"] == fact.subject
        assert back["lam"] == 2
        assert off(list(back["delta"].values()), one["delta"]) < 1e-7
    messages = dict(zip(RUBBISH, found["rubbish"], strict=True))
    assert messages[""] is messages["#what-to-try"] is None
    for hash_ in RUBBISH[1:5]:
        assert "does not hold edits" in messages[hash_]


@needs_node
def test_the_lines_of_python_repeat_it(found, facts, atlas) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(found["python"], "page", "exec"), {})
    numbers = [float(line) for line in told.getvalue().splitlines()]
    assert len(numbers) == len(facts)
    assert numbers[0] == pytest.approx(found["edits"][0]["after"], abs=1e-3)


@needs_node
def test_hashes(found) -> None:
    texts = ("", "abc", "ä" * 61, "x" * 1000)
    assert found["hashes"] == [hashlib.sha256(text.encode()).hexdigest() for text in texts]


#: Mistakes, each of which the comparison must notice: module, what it says, what it says instead.
FAULTS = {
    "sign": ("values.js", "delta[i] -= (recipe.rate", "delta[i] += (recipe.rate"),
    "transpose": ("model.js", "this.multiply(out, G, n, map.to, map.W, map.from);",
                  "this.multiply(out, G, n, map.to, map.T, map.from);"),
    "subject off by one": ("rows.js", "if (a < end && b > start) last = i;",
                           "if (a < end && b > start) last = i - 1;"),
    "stale keys": ("model.js", "if (s < row.past) continue;", "continue;"),
    "whitened once": ("solve.js", "return { row: unwhitened(L, a), rarity };",
                      "return { row: a, rarity };"),
    "weights of the contexts": ("values.js", "(r ? 0.5 / others : 0.5)", "1 / starts.length"),
    "a shorter clamp": ("values.js", "limit = recipe.clamp *", "limit = 0.2 * recipe.clamp *"),
    "norm without mean": ("numbers.js", "- mean - kept.hat", "- kept.hat"),
}  # fmt: skip


@needs_node
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, packed, facts, atlas, tmp_path) -> None:
    module, text, instead = FAULTS[fault]
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    whole = (sources / module).read_text("utf-8")
    assert whole.count(text) == 1, "the text of the fault is not there once"
    (sources / module).write_text(whole.replace(text, instead), encoding="utf-8")
    try:
        found = engine(packed, sources, facts[:1], tmp_path, kernel=kernel())
    except subprocess.CalledProcessError:
        return  # it broke down, which is noticed as well
    assert disagreements(found, facts[:1], *atlas)


# --- the script -----------------------------------------------------------------------------------


def test_the_script_names_the_sources_it_was_made_from() -> None:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir(), key=lambda one: one.name):
        digest.update(path.name.encode() + path.read_bytes())
    first = BUNDLE.read_text("utf-8").split("\n", 1)[0]
    assert digest.hexdigest() in first, "npm run build, in book/live"
    assert BUNDLE.stat().st_size < 150_000


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_script_is_what_its_sources_make(tmp_path) -> None:
    book = tmp_path / "book"
    shutil.copytree(LIVE, book / "live", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(BUNDLE.parent, book / "_static" / "living")
    for command in (["npm", "ci", "--no-audit", "--no-fund"], ["npm", "run", "check"],
                    ["node", "build.mjs", "--check"]):  # fmt: skip
        done = subprocess.run(command, cwd=book / "live", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_pieces_are_scripts_of_half_a_megabyte(packed) -> None:
    data = packed.read_bytes()
    scripts = list(living.scripts(data))
    assert max(map(len, scripts)) <= 512 * 1024 + 64
    pieces = [re.fullmatch(r'livingPiece\((\d+),(\d+),"([^"]*)"\)\n', one) for one in scripts]
    assert [int(one[1]) for one in pieces if one] == list(range(len(scripts)))
    assert {int(one[2]) for one in pieces if one} == {len(scripts)}
    assert b"".join(base64.b64decode(one[3]) for one in pieces if one) == data


def test_an_edited_model_is_not_packed(atlas) -> None:
    model, tokenizer = atlas
    edit = ue.edit(model, tokenizer, ue.Fact("{} is in", "The Louvre", "Rome"))
    with pytest.raises(ValueError, match="edited"):
        living.packed(model, tokenizer)
    edit.undo()


def test_a_baked_example_shows_what_the_library_did(atlas) -> None:
    model, tokenizer = atlas
    edit = ue.edit(model, tokenizer, ue.Fact("{} is in", "The Louvre", "Rome"))
    shown = living.example(model, tokenizer, edit, [("The <b> is", "a")])
    html = shown._repr_html_()
    assert 'data-living="edit"' in html
    assert f"→ {edit.outcomes[0].after:.2f}" in html
    assert "<b>" not in html
    edit.undo()
