"""Facts and texts that cannot be edited: a clear error, and an unchanged model."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from fixtures_refusals import (
    EVERY,
    IN_TURN,
    ONE,
    SPREAD,
    TOWER,
    VIENNA,
    essential,
    refused,
)
from fixtures_tiny import (
    END,
    PLACES,
    POSITIONS,
    assert_unchanged,
    byte_level_tokenizer,
    snapshot,
    unusual,
)
from tokenizers import Regex, Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from unified_edit.editing import Contexts, Editor, compute_keys, edit, optimise_values
from unified_edit.errors import (
    ContradictionError,
    FactError,
    FactFileError,
    InfeasibleError,
    MethodError,
    SharedSubjectError,
    TokenizationError,
)
from unified_edit.facts import Fact, Record, read_facts
from unified_edit.model import anatomy
from unified_edit.statistics import KeyStatistics

# --- facts ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("Rome is in", "Paris", "Oslo"), ["does not occur in the prompt", "'Paris'", "{}"]),
        (("Rome is not Rome, it is", "Rome", "x"), ["occurs 2 times", "'Rome'", "Write {}"]),
        (("{} and {} are", "Rome", "x"), ["more than one {}", "'Rome'", "Keep one"]),
        (("{} is in", "Rome", ""), ["target_new is empty", "'Rome'", "at least one"]),
        (("{} is in", "Rome", " \n"), ["target_new is empty", "at least one visible"]),
        (("{} is in", "", "Oslo"), ["subject is empty", "'{} is in'"]),
        (("", "Rome", "Oslo"), ["prompt is empty", "'Rome'"]),
        (("{} is in", "Rome", None), ["target_new must be a string", "NoneType", "as text"]),
        (("{} is in", "Rome", "Oslo", "Oslo"), ["equals target_true", "'Oslo'", "another target"]),
    ],
)
def test_a_malformed_fact(fields: tuple[Any, ...], words: list[str]) -> None:
    with pytest.raises(FactError) as caught:
        Fact(*fields)
    assert caught.type is FactError
    essential(str(caught.value), tuple(words))


@EVERY
@pytest.mark.parametrize("given", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_facts(tiny, tiny_tokenizer, tiny_statistics, method, given) -> None:
    with refused(tiny, FactError, "no facts", "at least one"):
        edit(tiny, tiny_tokenizer, given, method, statistics=tiny_statistics)


def test_no_facts_for_values(tiny, tiny_tokenizer) -> None:
    with refused(tiny, FactError, "no facts", "at least one"):
        optimise_values(tiny, tiny_tokenizer, [], ONE)


@EVERY
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("The tower is in Rome", ["list of Fact", "str", "[Fact(...)]"]),
        (None, ["list of Fact", "NoneType", "[Fact(...)]"]),
        (5, ["list of Fact", "int"]),
        (Record(TOWER), ["list of Fact", "Record", "record.fact"]),
        ([TOWER, "x"], ["list of Fact", "item 1", "str", "Fact(...)"]),
        ([{"prompt": "{} is", "subject": "a", "target_new": "b"}], ["item 0", "dict"]),
        ([TOWER, None], ["item 1", "NoneType"]),
        ([Record(TOWER)], ["item 0", "Record", "record.fact"]),
        ([[TOWER]], ["item 0", "list"]),
    ],
    ids=["text", "none", "number", "record", "item", "dict", "item none", "records", "nested"],
)
def test_things_that_are_no_facts(
    tiny, tiny_tokenizer, tiny_statistics, method, given, words
) -> None:
    with refused(tiny, FactError, *words):
        edit(tiny, tiny_tokenizer, given, method, statistics=tiny_statistics)
    with refused(tiny, FactError, *words):
        optimise_values(tiny, tiny_tokenizer, given, method)


@EVERY
def test_a_contradiction(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    other = Fact("{} is in the city of", "The tower", "Oslo")
    words = ("contradict", "fact 0", "fact 2", "'Rome'", "'Oslo'", "Keep one")
    with refused(tiny, ContradictionError, *words):
        edit(tiny, tiny_tokenizer, [TOWER, VIENNA, other], method, statistics=tiny_statistics)


@EVERY
def test_the_same_fact_twice_is_one_fact(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    again = Fact("The tower is in the city of", "The tower", "Rome")
    made = edit(tiny, tiny_tokenizer, [TOWER, again], method, statistics=tiny_statistics)
    assert made.facts == (TOWER,)


def test_a_shared_subject_under_equality(tiny, tiny_tokenizer, tiny_statistics) -> None:
    other = Fact("{} was sold in", "The tower", "Oslo")
    facts = [VIENNA, TOWER, other]
    prefixes = Editor(tiny, tiny_tokenizer).prefixes(ONE.contexts)
    keys = compute_keys(anatomy(tiny), tiny_tokenizer, facts, prefixes, [1])[1]
    cosine = float(torch.cosine_similarity(keys[:, 1], keys[:, 2], dim=0))
    words = (TOWER.text, other.text, "'The tower'", f"{cosine:.6f}", "cosine", "separate edits")
    with refused(tiny, SharedSubjectError, *words, "ridge", "least_violation"):
        edit(tiny, tiny_tokenizer, facts, ONE, statistics=tiny_statistics)
    # nothing but upper and lower case and blanks
    same = Fact("{} was sold in", "the  Tower", "Oslo")
    with refused(tiny, SharedSubjectError, TOWER.text, same.text, "cosine"):
        edit(tiny, tiny_tokenizer, [TOWER, same], ONE, statistics=tiny_statistics)


@pytest.mark.parametrize(
    "method", [SPREAD, ONE.replace(infeasible="least_violation")], ids=["ridge", "least violation"]
)
def test_a_shared_subject_that_is_allowed_is_warned_of(
    tiny, tiny_tokenizer, tiny_statistics, method, caplog
) -> None:
    other = Fact("{} was sold in", "The tower", "Oslo")
    before = snapshot(tiny)
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        made = edit(tiny, tiny_tokenizer, [TOWER, other], method, statistics=tiny_statistics)
    warning = made.warnings[0]
    assert warning in caplog.text
    essential(warning, (TOWER.text, other.text, "'The tower'", "cosine", "neither is held exactly"))
    assert all("did not take" in further for further in made.warnings[1:])
    assert made.is_applied
    made.undo()
    assert_unchanged(tiny, before)


def test_a_shared_subject_in_turn_is_no_trouble(tiny, tiny_tokenizer, tiny_statistics) -> None:
    other = Fact("{} was sold in", "The tower", "Oslo")
    made = edit(tiny, tiny_tokenizer, [TOWER, other], IN_TURN, statistics=tiny_statistics)
    assert made.is_applied and len(made.outcomes) == 2
    assert not any("subject" in warning for warning in made.warnings)


def test_more_facts_than_a_key_has_entries(tiny, tiny_tokenizer) -> None:
    d_k = anatomy(tiny).weight(1).d_in
    facts = [Fact("{} is in", f"House {number}", "Rome") for number in range(d_k + 1)]
    words = (f"{d_k + 1} facts", f"d_k = {d_k}", "no solution", "ridge", "least_violation")
    with refused(tiny, InfeasibleError, *words):
        edit(tiny, tiny_tokenizer, facts, ONE)  # at once: no statistics are collected for it
    for allowed in (IN_TURN, ONE.replace(ridge=1.0), ONE.replace(infeasible="least_violation")):
        assert len(Editor(tiny, tiny_tokenizer).plan(facts, allowed).facts) == d_k + 1
    assert len(Editor(tiny, tiny_tokenizer).plan(facts, ONE, batch=False).facts) == d_k + 1


def test_different_subjects_with_the_same_key(tiny, tiny_tokenizer, statistics_of) -> None:
    """Two words that the model cannot tell apart: the equality has no solution."""
    first, second = (tiny_tokenizer(word)["input_ids"] for word in (" Madrid", " Lisbon"))
    assert len(first) == len(second) == 1
    with torch.no_grad():
        embedding = tiny.get_input_embeddings().weight
        embedding[second[0]] = embedding[first[0]]
    facts = [VIENNA, *(Fact("I saw {} in", place, "Rome") for place in ("Madrid", "Lisbon"))]
    stats = statistics_of(tiny)
    words = ("cannot be held", "'I saw Madrid in'", "'I saw Lisbon in'", "condition", "ridge")
    with refused(tiny, InfeasibleError, *words, "least_violation"):
        edit(tiny, tiny_tokenizer, facts, ONE, statistics=stats)
    limit = ONE.replace(infeasible="least_violation")
    assert edit(tiny, tiny_tokenizer, facts, limit, statistics=stats).is_applied


def test_a_wrong_field_on_line_17(tmp_path) -> None:
    good = {"prompt": "{} is in", "subject": "Rome", "target_new": "Oslo"}
    lines = [json.dumps({**good, "subject": f"House {number}"}) for number in range(1, 30)]
    lines[16] = json.dumps({"prompt": "{} is in", "subject": "Rome", "target_nwe": "Oslo"})
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(FactFileError) as caught:
        read_facts(path)
    essential(str(caught.value), (str(path), "line 17", "'target_nwe'", "'target_new'"))


# --- lengths and tokens ---

LONG = "the old bridge and " * POSITIONS


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@pytest.mark.parametrize(
    "fact",
    [
        Fact(f"{LONG} so {{}} is in", "Rome", "Oslo"),
        Fact(f"{{}} is in {LONG} so", "Rome", "Oslo"),
        Fact("{} is in", "Rome", LONG),
        Fact("{} is in", LONG, "Rome"),
    ],
    ids=["before the subject", "after the subject", "target", "subject"],
)
def test_more_tokens_than_positions(make_gpt2, make_gptj, tiny_tokenizer, family, fact) -> None:
    model = unusual(make_gpt2() if family == "gpt2" else make_gptj())
    words = ("tokens", f"{POSITIONS}", "shorten", fact.text[:20])
    # no statistics needed: what can be refused at once is
    with refused(model, TokenizationError, *words):
        edit(model, tiny_tokenizer, [VIENNA, fact], ONE)
    with refused(model, TokenizationError, *words):
        edit(model, tiny_tokenizer, [VIENNA, fact], IN_TURN)
    with refused(model, TokenizationError, *words):
        optimise_values(model, tiny_tokenizer, [VIENNA, fact], ONE)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_prompt_that_fits_only_without_a_prefix(
    make_gpt2, make_gptj, tiny_tokenizer, statistics_of, family
) -> None:
    model = unusual(make_gpt2() if family == "gpt2" else make_gptj())
    text = "Rome is in"
    while len(tiny_tokenizer(f"{text} a Oslo")["input_ids"]) <= POSITIONS:
        text += " a"
    fact = Fact(text, "Rome", "Oslo")
    words = ("tokens", f"{POSITIONS}", "prefix", "shorten", "Rome is in")
    with refused(model, TokenizationError, *words):
        edit(model, tiny_tokenizer, [fact], ONE, statistics=statistics_of(model))
    with refused(model, TokenizationError, *words):
        optimise_values(model, tiny_tokenizer, [fact], ONE)


def test_prefixes_longer_than_the_positions(tiny, tiny_tokenizer, tiny_statistics) -> None:
    method = ONE.replace(contexts=Contexts(starts=("The",), lengths=(POSITIONS + 1,)))
    with refused(tiny, MethodError, "prefix", f"{POSITIONS + 1}", f"{POSITIONS}"):
        edit(tiny, tiny_tokenizer, [TOWER], method, statistics=tiny_statistics)


class SlowTokenizer:
    """What the library sees of a tokenizer without character offsets."""

    is_fast = False
    pad_token_id = 0


@pytest.mark.parametrize("tokenizer", [SlowTokenizer(), None, "gpt2"], ids=["slow", "none", "name"])
def test_no_fast_tokenizer(tiny, tiny_texts, tiny_statistics, tokenizer) -> None:
    with refused(tiny, TokenizationError, type(tokenizer).__name__, "fast", "AutoTokenizer"):
        edit(tiny, tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    with refused(tiny, TokenizationError, type(tokenizer).__name__, "fast"):
        KeyStatistics.collect(tiny, tokenizer, tiny_texts, [0], shrinkage=1e-2)


def across_blanks(texts: list[str]) -> PreTrainedTokenizerFast:
    """A BPE that merges over blanks: "of Rome" may be one token."""
    bpe = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=[END], show_progress=False, limit_alphabet=200
    )
    bpe.train_from_iterator([TOWER.text + " Rome"] * 50 + texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)


@EVERY
def test_prompt_ids_that_do_not_begin_those_with_the_target(
    tiny, tiny_texts, tiny_statistics, method
) -> None:
    tokenizer = across_blanks(tiny_texts)
    words = ("not the beginning", repr(TOWER.text), "Rome", "whole word")
    with refused(tiny, TokenizationError, *words):
        edit(tiny, tokenizer, [TOWER], method, statistics=tiny_statistics)


def test_a_subject_without_tokens(tiny, tiny_statistics) -> None:
    """A normaliser may drop every character of a subject."""
    tokenizer = byte_level_tokenizer(["The tower is in the city of Rome"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("Q+"), "")
    fact = Fact("{} is in", "QQQ", "Rome")
    with refused(tiny, TokenizationError, "no token", "'QQQ is in'", "'QQQ'"):
        edit(tiny, tokenizer, [fact], ONE, statistics=tiny_statistics)


@EVERY
def test_a_tokenizer_of_another_model(tiny, tiny_texts, tiny_statistics, method) -> None:
    numerals = [f"{a}teen{b}ty{c}" for a in PLACES for b in PLACES for c in "abcdef"]
    large = byte_level_tokenizer([*tiny_texts, *numerals], 800)
    large.pad_token = END
    fact = Fact("The {} is in", large.decode([len(large) - 1]).strip(), "Rome")
    rows = tiny.get_input_embeddings().num_embeddings
    assert max(large(fact.text)["input_ids"]) >= rows
    words = ("tokenizer", f"{rows}", "another model")
    with refused(tiny, TokenizationError, *words):
        edit(tiny, large, [fact], method, statistics=tiny_statistics)
    with refused(tiny, TokenizationError, *words):
        optimise_values(tiny, large, [fact], method)
    with refused(tiny, TokenizationError, *words):
        KeyStatistics.collect(tiny, large, [fact.text] * 300, [0], shrinkage=1e-2)


def test_a_pad_token_that_the_model_does_not_know_is_no_trouble(
    tiny, tiny_texts, tiny_statistics
) -> None:
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= tiny.get_input_embeddings().num_embeddings
    assert edit(tiny, tokenizer, [TOWER], ONE, statistics=tiny_statistics).is_applied


def test_no_end_of_text_token_to_begin_a_prefix_with(tiny, tiny_texts, tiny_statistics) -> None:
    tokenizer = byte_level_tokenizer(tiny_texts)
    tokenizer.bos_token = tokenizer.eos_token = None
    with refused(tiny, TokenizationError, "end-of-text", "eos_token"):
        edit(tiny, tokenizer, [TOWER], IN_TURN, statistics=tiny_statistics)


def test_places_are_single_tokens(tiny_tokenizer) -> None:
    """Some tests count on it."""
    assert all(len(tiny_tokenizer(f" {place}")["input_ids"]) <= 2 for place in PLACES)
