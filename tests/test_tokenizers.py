"""Tokenizers that add tokens of their own: at the end they mean nothing, at the start they belong.

The special token behind a text would stand between a prompt and what the model says next; the one
in front is read by the model like any other, but is no part of a subject, a target or a prefix.
"""

from __future__ import annotations

import copy
import re

import pytest
import reference
import torch
from fixtures_refusals import EVERY, FACTS, ONE, OSLO, TOWER, essential, refused
from fixtures_tiny import END, byte_level_tokenizer
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.editing import Contexts, Editor, sinks
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
    assert [len(row) for row in rows] == [length] * 3
    assert not any(0 in row for row in rows)
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


def marked(texts, bos, eos, separator=END):
    """A tokenizer that adds nothing, with such special tokens; the separator's number is 0."""
    tokenizer = byte_level_tokenizer(texts)
    if separator != END:
        rules = tokenizer.backend_tokenizer.to_str().replace(END, separator)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(rules))
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    return tokenizer


#: bos, eos, the token with number 0; behind what a text is sampled, with what one from nothing
#: begins. "T" and "I" are numbers like any other.
BEGINNINGS = {
    "GPT-2": (END, END, END, "", END),
    "SmolLM2": ("T", "I", END, END, END),
    "Qwen": (None, END, END, END, END),
    "Granite": ("T", "I", "<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
    "Llama, adding nothing": ("T", "I", "</s>", "T", "T"),
    "one token, another name": ("I", "I", "</s>", "", "I"),
    "no BOS": (None, "I", "</s>", "", "I"),
    "nothing": (None, None, "</s>", "", ""),
    "nothing but a name": (None, None, END, "", ""),
}


@pytest.mark.parametrize(
    ("bos", "eos", "zero", "opening", "start"), BEGINNINGS.values(), ids=list(BEGINNINGS)
)
def test_behind_what_texts_are_sampled(tiny_texts, bos, eos, zero, opening, start) -> None:
    tokenizer = marked(tiny_texts, bos, eos, zero)
    encoder = Encoder(tokenizer)
    ids = [(tokenizer.convert_tokens_to_ids(one),) if one else () for one in (opening, start)]
    assert [encoder.opening, encoder.start] == ids
    other = marked(tiny_texts, "O", "O", zero)
    assert Encoder(other).signature != encoder.signature, "or one's prefixes pass for the other's"


def test_what_is_added_is_what_texts_are_sampled_behind(beginning, ending) -> None:
    beginning = copy.deepcopy(beginning)
    beginning.eos_token = "T"  # whatever else there is
    assert Encoder(beginning).opening == Encoder(beginning).start == (0,)
    assert Encoder(ending).opening == () and Encoder(ending).start == (0,)


def test_prefixes_behind_a_separator(make_gpt2, tiny_texts) -> None:
    """Literally: the separator and the start are read, the likeliest five drawn among, for each
    of the tokens that are missing; the separator is neither counted nor part of the text."""
    model, tokenizer = make_gpt2(), marked(tiny_texts, None, END)
    contexts = Contexts(starts=("The", "I was"), lengths=(4,), per_start=2)
    found = Editor(model, tokenizer).prefixes(contexts, 7)
    generator = torch.Generator().manual_seed(7)
    wanted = [""]
    for start in contexts.starts:
        rows = torch.tensor([[0, *tokenizer(start)["input_ids"]]] * 2)
        while rows.shape[1] < 1 + 4:
            with torch.no_grad():
                logits = model(rows).logits[:, -1]
            logits[:, 0] = -torch.inf
            likeliest, ids = logits.topk(5)
            drawn = torch.multinomial(likeliest.softmax(-1), 1, generator=generator)
            rows = torch.cat([rows, ids.gather(1, drawn)], dim=1)
        wanted += [" ".join(text.split()) + ". " for text in tokenizer.batch_decode(rows[:, 1:])]
    assert found == tuple(wanted)
    plain = Editor(model, marked(tiny_texts, END, END)).prefixes(contexts, 7)
    assert plain != found, "or the separator was not read"


def test_a_text_from_nothing_begins_with_a_word(make_gpt2, tiny_texts) -> None:
    """Behind a separator that the tokenizer does not add; elsewhere with what the model says."""
    model = make_gpt2()
    contexts = Contexts(starts=("",), lengths=(1, 3), per_start=6)
    found = Editor(model, marked(tiny_texts, "T", END)).prefixes(contexts)[1:]
    assert all(re.match("[A-Z][a-z]+", one) for one in found)
    assert len(set(found)) > 6
    plain = Editor(model, marked(tiny_texts, END, END)).prefixes(contexts)[1:]
    assert not all(re.match("[A-Z][a-z]+", one) for one in plain)


def test_a_vocabulary_without_words_to_begin_with(make_gpt2, tiny_texts) -> None:
    """Then a text from nothing begins with what the model says."""
    model, tokenizer = make_gpt2(), byte_level_tokenizer([text.lower() for text in tiny_texts])
    tokenizer.bos_token = None
    found = Editor(model, tokenizer).prefixes(Contexts(starts=("",), lengths=(2,), per_start=4))
    assert len(found) == 5


@pytest.mark.parametrize("contexts", [Contexts(starts=("",)), Contexts(starts=("The", ""))])
def test_a_start_that_there_is_none_of(make_gpt2, tiny_texts, contexts) -> None:
    model = make_gpt2()
    words = ("without a start", "has none", "set tokenizer.bos_token", "starts that are words")
    with refused(model, TokenizationError, *words):
        Editor(model, marked(tiny_texts, None, None, "</s>")).prefixes(contexts)


# --- a subject that is the first token ---

#: Its subject is one token; a second fact's is not at the first place.
FIRST = ue.Fact("{} tower is in the city of", "The", "Rome")


@EVERY
def test_a_subject_at_a_sink_is_said(
    make_gpt2, tiny_tokenizer, tiny_statistics, method, monkeypatch, caplog
) -> None:
    """With the cosine of its key there with those behind the prefixes, once a fact."""
    model = make_gpt2()
    facts, layer = [FIRST, OSLO], method.layers[0]
    rows = [Encoder(tiny_tokenizer, anatomy(model)).row(fact) for fact in facts]
    assert [bool(row.subject) for row in rows] == [False, True]
    monkeypatch.setattr(sinks, "ALIKE", 1.1)
    made = ue.edit(model, tiny_tokenizer, facts, method, statistics=tiny_statistics, apply=False)
    (said,) = [text for text in made.warnings if "sink" in text]
    bare, *others = (
        reference.key(
            model, tiny_tokenizer, FIRST.prompt, FIRST.subject, [prefix + "{}"], layer, "plain"
        )
        for prefix in made.provenance.prefixes
    )
    mean = torch.stack(others).mean(dim=0)
    cosine = float(bare @ mean / bare.norm() / mean.norm())
    advice = "words in front of the subject: Fact('It is known that {} tower is in the city of', "
    essential(said, (repr(FIRST.text), f"at layer {layer}", f" is {cosine:.2f}. ", advice))
    assert said in caplog.text


def test_a_subject_at_the_first_place_that_is_no_sink(
    tiny, tiny_tokenizer, beginning, tiny_texts, tiny_statistics, monkeypatch
) -> None:
    """What is alike there and elsewhere is used as it is; behind BOS no subject comes first."""

    def sinks_of(tokenizer, statistics):
        made = ue.edit(tiny, tokenizer, FIRST, ONE, statistics=statistics, apply=False)
        return [text for text in made.warnings if "sink" in text]

    monkeypatch.setattr(sinks, "ALIKE", -1.1)
    assert not sinks_of(tiny_tokenizer, tiny_statistics)
    monkeypatch.setattr(sinks, "ALIKE", 1.1)
    assert sinks_of(tiny_tokenizer, tiny_statistics)
    statistics = ue.KeyStatistics.collect(tiny, beginning, tiny_texts, [1], shrinkage=1e-2)
    assert not sinks_of(beginning, statistics)


def test_on_atlas_a_word_is_a_word_at_any_place(atlas) -> None:
    model, tokenizer = atlas
    parts = anatomy(model)
    facts = [
        ue.Fact("{} is a country on the continent of", "France", "Asia"),
        ue.Fact("{} is the capital of", "Rome", "Spain"),
    ]
    rows = Encoder(tokenizer, parts).fact_rows(facts, Editor(model, tokenizer).prefixes(Contexts()))
    assert [row.subject for row in rows.bare] == [0, 0]
    for layer in range(parts.n_layers):
        assert sinks.check_first_place(parts, rows, layer) == []


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
