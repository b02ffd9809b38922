"""Text that a model writes by itself, against decoding by hand; its entropy against the formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures_tiny import own_seed
from test_evaluation import CORPUS, METHOD, RECORDS, flags, model, statistics, tokenizer  # noqa: F401
from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.errors import FactError, MethodError
from unified_edit.facts import Fact, Record
from unified_edit.measuring import Generation, Report, evaluate, evaluate_edits, ngram_entropy
from unified_edit.measuring.generation import TopK, words
from unified_edit.model import model_fingerprint
from unified_edit.statistics import KeyStatistics

Opened = tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]
PROMPTS = ["Anna Krestova speaks", "I", "The old lighthouse of Marivel is in the", "Because"]
TALKERS = [
    Record(
        Fact("{} speaks", subject, "Danish", "French"),
        generation_prompts=(f"{subject} lives in", "The voice of the", f"{subject} lives in"),
    )
    for subject in ("Anna Krestova", "Tomas", "Marivel")
]


@pytest.fixture
def opened(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Opened:  # noqa: F811
    return model, tokenizer


def greedy(opened: Opened, prompt: str, tokens: int, end: int = 0) -> str:
    """One forward of the whole text for each token."""
    model, tokenizer = opened  # noqa: F811
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + tokens:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


# --- complete --------------------------------------------------------------------------------


def test_complete_is_greedy_decoding(opened: Opened) -> None:
    with torch.no_grad():
        wanted = [greedy(opened, prompt, 12) for prompt in PROMPTS]
    state, chance = flags(opened[0]), torch.get_rng_state()
    # what a model comes with must not count
    opened[0].generation_config = own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0, min_new_tokens=9, eos_token_id=0
    )
    found = ue.complete(*opened, PROMPTS, 12)
    assert list(found.columns) == ["prompt", "text"] and list(found["prompt"]) == PROMPTS
    assert list(found["text"]) == wanted
    assert [ue.complete(*opened, prompt, 12)["text"][0] for prompt in PROMPTS] == wanted
    assert opened[0].generation_config is own and flags(opened[0]) == state
    assert torch.equal(torch.get_rng_state(), chance)


def test_complete_ends_where_the_model_ends(opened: Opened) -> None:
    """Whatever token it would say third is made the one that ends a text."""
    model, tokenizer = opened  # noqa: F811
    whole = tokenizer(greedy(opened, PROMPTS[0], 6, end=-1))["input_ids"]
    ids = tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[-6:]
    third = next(place for place in range(1, 6) if said[place] not in said[:place])
    model.generation_config.eos_token_id = [said[third], 319]
    both = ue.complete(model, tokenizer, [PROMPTS[0], PROMPTS[1]], 6)["text"]
    assert both[0] == tokenizer.decode(said[:third]) and len(whole) >= third
    assert both[1] == greedy(opened, PROMPTS[1], 6, end=said[third])


def test_complete_asks_the_model_as_it_is(opened: Opened, statistics: KeyStatistics) -> None:  # noqa: F811
    base = ue.complete(*opened, PROMPTS)
    fingerprint = model_fingerprint(opened[0])
    made = ue.edit(*opened, RECORDS[0].fact, METHOD, statistics=statistics)
    edited = ue.complete(*opened, PROMPTS)
    with torch.no_grad():
        assert list(edited["text"]) == [greedy(opened, prompt, 20) for prompt in PROMPTS]
    assert list(edited["text"]) != list(base["text"])
    made.undo()
    assert model_fingerprint(opened[0]) == fingerprint


@pytest.mark.parametrize(
    ("kind", "text", "prompts", "tokens"),
    [
        (FactError, "prompts is empty", [], 20),
        (FactError, r"prompts\[1\] is empty", ["I", " "], 20),
        (MethodError, "Ask for at least one", "I", 0),
        (MethodError, r"more than the model has positions \(96\)", ["I", "Anna went " * 12], 20),
    ],
)
def test_complete_refuses(
    kind: type[Exception], text: str, prompts: Any, tokens: int, opened: Opened
) -> None:
    with pytest.raises(kind, match=text):
        ue.complete(*opened, prompts, tokens)


# --- entropy ---------------------------------------------------------------------------------


def released(found: list[str]) -> float:
    """`compute_n_gram_entropy` of the released code (kmeng01/rome), whose words come from NLTK."""
    entropy_list = []
    for n in (2, 3):
        fdist: dict[tuple[str, ...], int] = {}
        for i in range(len(found) - n + 1):
            gram = tuple(found[i : i + n])
            fdist[gram] = fdist.get(gram, 0) + 1
        freqs = np.array([freq for _, freq in fdist.items()])
        freqs = freqs / freqs.sum()
        entropy_list.append(np.sum(-freqs * np.log(freqs) / np.log(2)))
    entropy_list = np.array(entropy_list) * np.array([2 / 3, 4 / 3])
    return float(np.mean(entropy_list))


@pytest.mark.parametrize("text", [*CORPUS, " ".join(CORPUS * 2), "a b a b a b c", "Rome " * 40])
def test_entropy_is_that_of_the_released_code(text: str) -> None:
    # a sum of at most a few hundred terms below 1
    assert ngram_entropy(text) == pytest.approx(released(words(text)), abs=1e-12)


def test_entropy_of_texts_by_hand() -> None:
    # bigrams ab ba ab bc: 1/2 1/4 1/4, so 1.5 bits; trigrams aba bab abc: log2 3
    assert ngram_entropy("a b a b c") == pytest.approx((2 / 3 * 1.5 + 4 / 3 * np.log2(3)) / 2)
    assert ngram_entropy("no no no no") == ngram_entropy("two words") == ngram_entropy("") == 0.0


def test_words_are_those_of_nltk() -> None:
    """Written down from its NLTKWordTokenizer (3.10.4), sentence by sentence."""
    assert words("The U.S. don't pay $3,000.50 for Anna's well-known car (it's red)...") == [
        "The", "U.S.", "do", "n't", "pay", "$", "3,000.50", "for", "Anna", "'s", "well-known",
        "car", "(", "it", "'s", "red", ")", "...",
    ]  # fmt: skip
    assert words("He left. At 10:30, I saw him") == [
        "He", "left", ".", "At", "10:30", ",", "I", "saw", "him"
    ]  # fmt: skip


# --- sampling --------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_likeliest() -> None:
    """Shares of 20,000 draws: a standard deviation is at most .5 / sqrt(20,000) = .0035."""
    with own_seed(0):
        scores = torch.randn(1, 50).expand(20_000, 50) * 2
    draw = TopK(4, [str(number) for number in range(20_000)])
    chosen = draw(torch.zeros(20_000, 1), scores)
    assert ((chosen == 0).sum(-1) == 1).all() and torch.isneginf(chosen).sum() == 20_000 * 49
    shares = (chosen == 0).double().mean(0)
    top = scores[0].topk(4)
    assert set(shares.nonzero().flatten().tolist()) == set(top.indices.tolist())
    wanted = top.values.double().softmax(-1)
    assert (shares[top.indices] - wanted).abs().max() < 4 * 0.0035
    again = draw(torch.zeros(20_000, 1), scores)
    assert (again.argmax(-1) != chosen.argmax(-1)).any(), "each place has its own numbers"


def texts(report: Report, when: str = "before") -> list[str]:
    table = report.table[report.table["when"] == when]
    return list(table.loc[table["kind"] == "generation", "text"])


def test_fluency_is_measured_on_request(opened: Opened) -> None:
    plain, chance = evaluate(*opened, TALKERS), torch.get_rng_state()
    assert "GE" not in plain.before and "text" not in plain.table
    how = Generation(length=30, seed=3)
    report = evaluate(*opened, TALKERS, generate=how)
    assert torch.equal(torch.get_rng_state(), chance)
    asked = report.table["kind"] == "generation"
    pd.testing.assert_frame_equal(
        report.table[~asked].drop(columns="text").reset_index(drop=True), plain.table
    )
    found = report.table[asked]
    assert list(found["prompt"]) == [p for one in TALKERS for p in one.generation_prompts]
    for prompt, text, entropy in zip(
        found["prompt"], found["text"], found["magnitude"], strict=True
    ):
        assert text.startswith(prompt) and entropy == ngram_entropy(text)
    score = report.before["GE"]
    assert score.value == pytest.approx(found.groupby("record")["magnitude"].mean().mean())
    assert score.n == 3 and score.low <= score.value <= score.high and score.low < score.high
    assert {name for name in report.before if name != "GE"} == set(plain.before)
    # a prompt that stands there twice is gone on with twice
    assert len(set(texts(report))) == 9
    # a record alone is gone on with in the same way; with another seed it is not
    assert texts(evaluate(*opened, TALKERS[0], generate=how)) == texts(report)[:3]
    assert texts(evaluate(*opened, TALKERS, generate=Generation(30, seed=4))) != texts(report)


def test_fluency_with_the_likeliest_token_is_greedy_decoding(opened: Opened) -> None:
    report = evaluate(*opened, TALKERS[0], generate=Generation(length=20, top_k=1))
    prompt = TALKERS[0].generation_prompts[0]
    length = 20 - len(opened[1](prompt)["input_ids"])
    with torch.no_grad():
        wanted = prompt + greedy(opened, prompt, length, end=-1)
    assert texts(report)[0] == wanted.replace("<|endoftext|>", "").replace("\n\n", " ")


def test_texts_as_long_as_the_model_can_read_do_not_mind_their_company(opened: Opened) -> None:
    how = Generation(length=10_000, top_k=1)
    talker = replace(TALKERS[0], generation_prompts=TALKERS[0].generation_prompts[:2])
    lengths = [len(opened[1](prompt)["input_ids"]) for prompt in talker.generation_prompts]
    assert lengths[0] != lengths[1]
    alone = [
        text
        for prompt in talker.generation_prompts
        for text in texts(
            evaluate(*opened, replace(talker, generation_prompts=(prompt,)), generate=how)
        )
    ]
    assert texts(evaluate(*opened, talker, generate=how)) == alone


def test_fluency_before_and_after_edits_and_in_a_file(
    opened: Opened, statistics: KeyStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path / "cache"))
    path, how = tmp_path / "rows.jsonl", Generation(length=20)
    arguments: dict[str, Any] = {"statistics": statistics, "generate": how, "to": path}
    report = evaluate_edits(*opened, TALKERS, METHOD, **arguments)
    assert report.after is not None
    assert texts(report) == texts(evaluate(*opened, TALKERS, generate=how))
    assert texts(report, "after") != texts(report)
    assert report.after["GE"].value != report.before["GE"].value
    pd.testing.assert_frame_equal(Report.read(path).table, report.table)
    with pytest.raises(ue.errors.ReportFileError, match="generate"):
        evaluate_edits(*opened, TALKERS, METHOD, statistics=statistics, to=path)


def test_bad_settings_are_refused(opened: Opened) -> None:
    for wrong in (1, "yes", 100):
        with pytest.raises(MethodError, match="give True, False or a Generation"):
            evaluate(*opened, TALKERS, generate=wrong)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="Generation: top_k is 0"):
        Generation(top_k=0)
