"""Tokenizers that add tokens of their own: at the end they mean nothing, at the start they belong.

The special token behind a text would stand between a prompt and what the model says next; the one
in front is read by the model like any other, but is no part of a subject, a target or a prefix.
"""

from __future__ import annotations

import pytest
import torch
from fixtures_refusals import EVERY, FACTS, ONE, TOWER
from fixtures_tiny import END, byte_level_tokenizer
from tokenizers import processors

import unified_edit as ue
from unified_edit.editing import Contexts, Editor
from unified_edit.errors import TokenizationError
from unified_edit.model import Encoder, anatomy, likelihoods


def adding(texts, template):
    tokenizer = byte_level_tokenizer(texts)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(END, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def ending(tiny_texts):
    """Every text ends in the end-of-text token."""
    tokenizer = adding(tiny_texts, f"$A {END}")
    assert tokenizer("The tower")["input_ids"][-1] == 0
    return tokenizer


@pytest.fixture(scope="module")
def beginning(tiny_texts):
    """Every text begins with it."""
    tokenizer = adding(tiny_texts, f"{END} $A")
    assert tokenizer("The tower")["input_ids"][0] == 0
    return tokenizer


# --- an end that is added ---


def test_what_is_asked_behind_an_added_end(tiny, tiny_tokenizer, ending) -> None:
    prompts = [fact.text for fact in FACTS]
    expected = ue.ask(tiny, tiny_tokenizer, prompts, k=3)
    assert ue.ask(tiny, ending, prompts, k=3).equals(expected)
    targets = ["Rome", "Madrid and Oslo"]
    expected = ue.compare(tiny, tiny_tokenizer, prompts, targets)
    assert ue.compare(tiny, ending, prompts, targets).equals(expected)


@EVERY
def test_an_edit_with_an_added_end(tiny, tiny_tokenizer, ending, tiny_statistics, method) -> None:
    plain, other = (
        ue.edit(tiny, tokenizer, FACTS, method, statistics=tiny_statistics, apply=False)
        for tokenizer in (tiny_tokenizer, ending)
    )
    assert other.provenance.prefixes == plain.provenance.prefixes
    assert all(torch.equal(other.delta(layer), plain.delta(layer)) for layer in plain.layers)
    assert other.outcomes == plain.outcomes


@pytest.mark.parametrize("target_true", ["Paris", None])
def test_tracing_with_an_added_end(tiny, tiny_tokenizer, ending, target_true) -> None:
    fact = ue.Fact("{} is in the city of", "The tower", "Rome", target_true)
    plain, other = (
        ue.locate(tiny, tokenizer, [fact], samples=2).facts[0]
        for tokenizer in (tiny_tokenizer, ending)
    )
    assert (other.object, other.tokens, other.clean) == (plain.object, plain.tokens, plain.clean)
    assert all(torch.equal(other.restored[kind], plain.restored[kind]) for kind in plain.restored)


def test_statistics_with_an_added_end(tiny, tiny_tokenizer, ending, tiny_texts) -> None:
    """Its key would be one of nearly every twelve."""
    plain, other = (
        ue.KeyStatistics.collect(
            tiny, tokenizer, [*tiny_texts, ""], [0, 1], max_tokens=9, shrinkage=1e-2
        )
        for tokenizer in (tiny_tokenizer, ending)
    )
    assert other.source == plain.source
    assert all(torch.equal(other.C0(layer), plain.C0(layer)) for layer in (0, 1))


# --- a start that is added ---


def test_a_start_that_is_added_is_read(tiny, beginning, tiny_tokenizer) -> None:
    """The probability is that of the model that reads the start too; the subject is where it is."""
    parts = anatomy(tiny)
    encoder = Encoder(beginning, parts)
    row = encoder.row(TOWER)
    plain = Encoder(tiny_tokenizer, parts).row(TOWER)
    assert row.ids == (0, *plain.ids)
    assert row.subject == plain.subject + 1
    assert row.target == plain.target
    (found,) = likelihoods(parts, [row])
    tiny.eval()
    with torch.no_grad():
        logits = tiny(torch.tensor([row.ids])).logits[0, -len(row.target) :]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(row.target)[:, None]).mean()
    assert found.logp == pytest.approx(float(wanted), abs=1e-5)


def test_an_edit_with_an_added_start(tiny, beginning, tiny_texts) -> None:
    """The equality is held where the model reads the fact: behind the start."""
    statistics = ue.KeyStatistics.collect(tiny, beginning, tiny_texts, [1], shrinkage=1e-2)
    made = ue.edit(tiny, beginning, FACTS, ONE, statistics=statistics)
    assert made.is_applied
    assert made.diagnosis[1].memorization_error <= 1e-8


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("start", ["The", ""], ids=["a start", "no start"])
@pytest.mark.parametrize("added", [False, True], ids=["plain", "adding"])
def test_prefixes_are_of_full_length(
    make_gpt2, tiny_tokenizer, beginning, added, start, length, monkeypatch
) -> None:
    """An added start is not counted among the tokens of a prefix, and stands in none."""
    model = make_gpt2()
    tokenizer = beginning if added else tiny_tokenizer
    rows = []
    monkeypatch.setattr(
        type(tokenizer),
        "batch_decode",
        lambda self, ids, **more: rows.extend(list(map(int, row)) for row in ids) or ["x"] * 3,
    )
    contexts = Contexts(starts=(start,), lengths=(length,), per_start=3)
    Editor(model, tokenizer).prefixes(contexts)
    monkeypatch.undo()
    # what a text from nothing begins with is the end-of-text token for a plain tokenizer too
    begun = 1 if added or not start else 0
    assert [len(row) for row in rows] == [begun + length] * 3
    assert all(0 not in row[begun:] for row in rows)
    prefixes = Editor(model, tokenizer).prefixes(contexts, 1)
    assert not any(END in prefix for prefix in prefixes)
    assert all(prefix.startswith(start) and prefix.endswith(". ") for prefix in prefixes[1:])


def test_no_token_that_was_added_is_sampled(make_gpt2, tiny_texts) -> None:
    """However probable the model finds it: a prefix is made of words."""
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.add_tokens(["@special@"])
    model = make_gpt2(vocab_size=len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        head = torch.zeros_like(model.lm_head.weight)
        head[[0, len(tokenizer) - 1]] = 50 * model.transformer.ln_f.bias
        model.lm_head.weight.add_(head)
    likeliest = ue.ask(model, tokenizer, "The tower", k=2)
    assert set(likeliest.token) == {END, "@special@"}, "or the test says nothing"
    contexts = Contexts(starts=("The", "I"), lengths=(8,), per_start=4)
    prefixes = Editor(model, tokenizer).prefixes(contexts)
    assert len(prefixes) == 9
    assert not any(END in prefix or "@special@" in prefix for prefix in prefixes)


def test_what_a_text_from_nothing_begins_with(tiny_texts, beginning, ending) -> None:
    """What the tokenizer adds, or BOS, or EOS: in this order."""
    tokenizer = byte_level_tokenizer(tiny_texts)
    assert Encoder(beginning).start == (0,)
    assert Encoder(ending).start == (0,)
    tokenizer.bos_token = "T"
    assert Encoder(tokenizer).start == (tokenizer.convert_tokens_to_ids("T"),)
    tokenizer.bos_token = None
    assert Encoder(tokenizer).start == (0,)


def test_a_text_of_nothing_but_what_is_added(tiny, ending, beginning) -> None:
    for tokenizer in (ending, beginning):
        with pytest.raises(TokenizationError, match="has no tokens"):
            Encoder(tokenizer, anatomy(tiny)).prompts([""])


def test_the_tokenizer_is_left_as_it_is(tiny, tiny_texts, tiny_statistics) -> None:
    """One without a padding token is not given one."""
    tokenizer = byte_level_tokenizer(tiny_texts)
    assert tokenizer.pad_token is None
    before = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map)
    ue.edit(tiny, tokenizer, FACTS, ONE, statistics=tiny_statistics)
    ue.locate(tiny, tokenizer, [TOWER], samples=1)
    assert (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map)) == before
    assert tokenizer.pad_token is None
