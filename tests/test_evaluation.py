"""Scores against hand-computed ones, probabilities against plain forwards, models left alone."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from scipy.stats import binom
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from unified_edit.editing import EMMET, ROME, Contexts, edit
from unified_edit.errors import (
    ContradictionError,
    EditError,
    FactError,
    MethodError,
    ModelError,
    SharedSubjectError,
    TokenizationError,
)
from unified_edit.facts import Fact, Probe, Record
from unified_edit.measuring import (
    Report,
    Score,
    ask,
    compare,
    evaluate,
    evaluate_edits,
    harmonic_mean,
    questions,
    summarise,
)
from unified_edit.measuring.questions import judge
from unified_edit.model import (
    Encoder,
    Likelihood,
    Row,
    anatomy,
    ledger_of,
    likelihoods,
    model_fingerprint,
)
from unified_edit.statistics import KeyStatistics

# --- models ----------------------------------------------------------------------------------

WORDS = "end ann bob cat lives sings in loves rome paris oslo san marino red old".split()


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="end"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="end", unk_token="end")


def bigram_model(probabilities: dict[str, dict[str, float]]) -> GPT2LMHeadModel:
    """A GPT-2 whose next word depends on the last word alone, with the probabilities given.

    What a row leaves over is shared by all other words. The blocks add nothing and positions
    are zero, so the final state is the layer norm of a one-hot vector: a e_i + b 1, made
    invertible by the norm's bias; the head undoes it.
    """
    size = len(WORDS)
    config = GPT2Config(
        vocab_size=size, n_positions=12, n_embd=size, n_layer=1, n_head=1, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config).double().eval()
    wanted = torch.full((size, size), 1.0 / size, dtype=torch.float64)
    for last, row in probabilities.items():
        rest = (1.0 - sum(row.values())) / (size - len(row))
        wanted[WORDS.index(last)] = rest
        for word, value in row.items():
            wanted[WORDS.index(last), WORDS.index(word)] = value
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.ln_f.bias.fill_(1.0)
        hidden = model.transformer(torch.arange(size)[:, None]).last_hidden_state[:, 0]
        model.lm_head.weight.copy_(torch.linalg.solve(hidden, wanted.log()).T)
    return model


CORPUS = [
    "The old lighthouse of Marivel stands in the town of Oster near the sea.",
    "Tomas Bellweather was born in Quillon and plays the violin every evening.",
    "Anna Krestova speaks Danish, and her brother lives in the city of Rome.",
    "The capital of Norvia is Paris; its people work in farming and in music.",
    "Because the river was wide, I and you went by boat to the market of Lund.",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def random_model(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_positions=96, n_embd=16, n_layer=3, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return random_model()


@pytest.fixture(scope="module")
def statistics(tokenizer: PreTrainedTokenizerFast) -> KeyStatistics:
    """C0 from shuffled words: any text will do, as long as it is not too little."""
    chance = random.Random(0)
    words = " ".join(CORPUS).split()
    texts = [" ".join(chance.sample(words, 20)) for _ in range(30)]
    return KeyStatistics.collect(random_model(), tokenizer, texts, [0, 1], shrinkage=1e-2)


#: Few, short contexts; a wide clamp, because a random model is hard to move.
QUICK = {
    "layers": (1,),
    "clamp": 4.0,
    "weight_decay": 0.0,
    "contexts": Contexts(lengths=(4,), starts=("The", "I")),
}
METHOD = EMMET.replace(**QUICK)

RECORDS = [
    Record(
        Fact("{} speaks", "Anna Krestova", "Danish", "French"),
        paraphrases=("People say that Anna Krestova speaks", "The old {} is talking in"),
        neighbours=("Her brother speaks", "In Lund they speak", "I speak"),
        probes={"other": (Probe("Anna Krestova lives in", "Rome", "Oster"),)},
        case_id=7,
        relation="language",
    ),
    Record(
        Fact("{} was born in", "Tomas Bellweather", "Oster", "Quillon"),
        neighbours=("The violin was made in",),
        probes={"other": (Probe("Tomas Bellweather plays the", "violin"),)},
    ),
    Record(Fact("The lighthouse of {} is near", "Marivel", "Rome"), paraphrases=("Marivel is at",)),
]


def same(a: float, b: float, tolerance: float = 1e-10) -> bool:
    return math.isclose(a, b, rel_tol=0, abs_tol=tolerance)


def flags(model: torch.nn.Module) -> list[bool]:
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


# --- scores from tables ----------------------------------------------------------------------


def answers(rows: list[tuple], when: str = "after") -> pd.DataFrame:
    """A table of (record, kind, success, magnitude) rows."""
    table = pd.DataFrame(rows, columns=["record", "kind", "success", "magnitude"])
    table["generated"] = table["success"].fillna(False).astype(bool)
    table["when"] = when
    return table.astype({"success": "boolean"})


HAND = [
    (0, "rewrite", True, 0.5),
    (0, "paraphrase", True, 0.4),
    (0, "paraphrase", False, -0.2),
    (0, "neighbour", True, 0.3),
    (1, "rewrite", True, 0.1),
    (1, "paraphrase", True, 0.6),
    (1, "neighbour", True, 0.2),
    (1, "neighbour", False, -0.4),
    (1, "neighbour", False, 0.0),
    (1, "neighbour", False, 0.0),
]


def test_scores_of_a_hand_computed_table() -> None:
    scores = summarise(answers(HAND))
    wanted = {
        "ES": 1.0,
        "PS": (1 / 2 + 1) / 2,  # by prompt it would be 2/3
        "NS": (1 + 1 / 4) / 2,  # by prompt it would be 2/5
        "S": 3 / (1 / 1 + 1 / 0.75 + 1 / 0.625),
        "EM": 0.3,
        "PM": (0.1 + 0.6) / 2,
        "NM": (0.3 - 0.05) / 2,
        "GS": 1.0,
    }
    assert list(scores) == list(wanted)
    for name, value in wanted.items():
        assert same(scores[name].value, value, 1e-15 * 8), name
        assert scores[name].n == 2


def test_a_score_of_zero_makes_s_zero() -> None:
    rows = [(r, k, k != "paraphrase", 0.0) for r in range(3) for k in
            ("rewrite", "paraphrase", "neighbour")]  # fmt: skip
    scores = summarise(answers(rows))
    assert scores["PS"].value == 0
    assert scores["S"] == Score(0.0, 0.0, 0.0, 3)


def test_a_score_without_prompts_is_absent_and_s_with_it() -> None:
    scores = summarise(answers([row for row in HAND if row[1] != "neighbour"]))
    assert list(scores) == ["ES", "PS", "EM", "PM", "GS"]
    only = summarise(answers([row for row in HAND if row[1] == "neighbour"]))
    assert list(only) == ["NS", "NM"]


def test_records_without_a_kind_do_not_count_for_it() -> None:
    rows = [*HAND, (2, "rewrite", None, math.nan), (3, "rewrite", False, -0.3)]
    rows += [(3, "capital", True, math.nan), (3, "capital", False, 0.1), (0, "capital", True, 0.2)]
    scores = summarise(answers(rows))
    assert (scores["ES"].n, scores["GS"].n, scores["PS"].n, scores["S"].n) == (3, 4, 2, 2)
    assert same(scores["ES"].value, 2 / 3) and same(scores["GS"].value, 2 / 4)
    assert same(scores["capital"].value, (1 / 2 + 1) / 2) and scores["capital"].n == 2
    assert list(scores)[-1] == "capital"


def test_portability_is_all_that_a_fact_leads_to() -> None:
    """Whatever its groups are called; by probability and by greedy decoding, side by side."""
    rows = [*HAND, (0, "portability", True, 0.1), (0, "portability: multi-hop", False, -0.1)]
    rows += [(1, "portability: multi-hop", True, 0.2), (1, "portability of goods", False, 0.0)]
    table = answers(rows)
    table.loc[table["kind"].str.startswith("portability"), "generated"] = [False] * 2 + [True] * 2
    scores = summarise(table)
    assert (scores["PO"].value, scores["PG"].value) == (0.75, 0.5)
    assert (scores["PO"].n, scores["PG"].n) == (2, 2)
    assert scores["portability"].value == 1.0 and scores["portability: multi-hop"].value == 0.5
    plain = summarise(answers(HAND))
    assert not {"PO", "PG"} & set(plain)
    assert all(scores[name] == plain[name] for name in plain)


def test_harmonic_mean() -> None:
    values = np.array([[1.0, 0.0, 0.5], [0.5, 1.0, 0.5], [0.25, 1.0, 0.5]])
    np.testing.assert_allclose(harmonic_mean(values), [3 / 7, 0.0, 0.5], rtol=1e-15)


def test_summarise_refuses_what_has_no_one_state() -> None:
    both = pd.concat([answers(HAND), answers(HAND, "before")])
    with pytest.raises(FactError, match="exactly one state"):
        summarise(both)
    with pytest.raises(FactError, match="exactly one state"):
        summarise(both.iloc[:0])
    with pytest.raises(MethodError, match="at least 100"):
        summarise(answers(HAND), bootstrap=99)


# --- intervals -------------------------------------------------------------------------------


def test_interval_of_a_share_is_the_binomial_one() -> None:
    """Resampling n records of which half succeed is a binomial draw: known quantiles."""
    n, resamples = 400, 10_000
    rows = [(i, "rewrite", i < n / 2, 0.0) for i in range(n)]
    score = summarise(answers(rows), bootstrap=resamples)["ES"]
    low, high = (float(binom.ppf(q, n, 0.5)) / n for q in (0.025, 0.975))
    # a quantile's sampling error is sqrt(q (1-q) / resamples) / density, the density at 1.96
    # deviations being 0.058 / 0.025: 0.0007; three of them and one step of 1/n are 0.0045. A
    # 90 % interval is narrower by 0.008 at each end, one of 99 % wider by 0.015.
    tolerance = 1 / n + 3 * 0.0007
    assert score.value == 0.5
    assert abs(score.low - low) <= tolerance and abs(score.high - high) <= tolerance


def test_records_are_resampled_not_prompts() -> None:
    """Copies of a prompt within its record change nothing, those of a record narrow it."""
    rows = [(i, "paraphrase", i % 2 == 0, 0.0) for i in range(20)]
    once = summarise(answers(rows))["PS"]
    prompts = summarise(answers(rows * 9))["PS"]
    records = summarise(answers([(i + 20 * j, *r) for j in range(9) for i, *r in rows]))["PS"]
    assert prompts == once
    # nine times the records: a third of the width; a quantile over 2000 resamples is uncertain
    # by about 3 % of it, and a share of 20 moves in steps of 0.05 (a ninth of the width)
    assert (records.high - records.low) / (once.high - once.low) == pytest.approx(1 / 3, rel=0.2)
    assert records.n == 180


def test_intervals_depend_on_the_seed_alone() -> None:
    rows = [(i, "rewrite", True, math.sin(i)) for i in range(30)]
    table = answers(rows)
    first = summarise(table, seed=1)
    assert summarise(table, seed=1) == first
    assert summarise(table, seed=2)["EM"] != first["EM"]
    assert first["EM"].low < first["EM"].value < first["EM"].high


def test_one_record_and_unanimous_records_have_no_width() -> None:
    single = summarise(answers([(0, "rewrite", False, -0.25)]))
    assert single["EM"] == Score(-0.25, -0.25, -0.25, 1)
    unanimous = summarise(answers([(i, "rewrite", True, 0.0) for i in range(50)]))
    assert unanimous["ES"] == Score(1.0, 1.0, 1.0, 50)


def test_s_is_computed_anew_in_each_resample() -> None:
    """ES and NS of two records exclude each other, so resamples of one record have S = 0."""
    rows = [(0, "rewrite", True, 0.0), (0, "neighbour", False, 0.0), (1, "rewrite", False, 0.0),
            (1, "neighbour", True, 0.0), (0, "paraphrase", True, 0.0),
            (1, "paraphrase", True, 0.0)]  # fmt: skip
    score = summarise(answers(rows))["S"]
    # each record twice has probability 1/4 and gives 0; one of each gives 3 / (2 + 2 + 1)
    assert (score.low, score.high) == (0.0, pytest.approx(0.6))
    assert score.value == pytest.approx(0.6)


def test_resamples_without_a_rare_score_are_left_out() -> None:
    rows = [(i, "rewrite", True, 0.1) for i in range(10)] + [(0, "rare", True, 0.0)]
    assert summarise(answers(rows))["rare"] == Score(1.0, 1.0, 1.0, 1)


# --- one prompt ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rewrite", "paraphrase", "other_relations"])
def test_the_new_object_must_win(kind: str) -> None:
    new, true = Likelihood(math.log(0.5), True), Likelihood(math.log(0.2), False)
    found = judge(kind, new, true)
    assert found["success"] is True and found["generated"] is True
    assert same(found["magnitude"], 0.3)
    found = judge(kind, true, new)
    assert found["success"] is False and found["generated"] is False
    assert same(found["magnitude"], -0.3)


def test_at_a_neighbour_the_true_object_must_win() -> None:
    new, true = Likelihood(math.log(0.5), True), Likelihood(math.log(0.2), False)
    found = judge("neighbour", new, true)
    assert found["success"] is False and found["generated"] is False
    assert same(found["magnitude"], -0.3)
    assert (found["logp_new"], found["logp_true"]) == (new.logp, true.logp)
    assert judge("neighbour", true, new)["success"] is True


@pytest.mark.parametrize("kind", ["rewrite", "paraphrase", "neighbour", "probes"])
def test_a_tie_is_a_failure(kind: str) -> None:
    even = Likelihood(-1.5, True)
    found = judge(kind, even, Likelihood(-1.5, False))
    assert found["success"] is False
    assert found["magnitude"] == 0


def test_without_a_rival_only_greedy_decoding_judges() -> None:
    for kind in ("rewrite", "paraphrase"):
        found = judge(kind, Likelihood(-0.1, True), None)
        assert found["success"] is pd.NA and found["generated"] is True
        assert math.isnan(found["magnitude"]) and math.isnan(found["logp_true"])
    assert judge("own_object", Likelihood(-0.1, True), None)["success"] is True
    assert judge("own_object", Likelihood(-0.1, False), None)["success"] is False


# --- a model whose probabilities are known -------------------------------------------------------

KNOWN = {
    "in": {"rome": 0.5, "paris": 0.3, "san": 0.1},
    "loves": {"rome": 0.2, "paris": 0.6, "san": 0.1},
    "san": {"marino": 0.9},
    "sings": {"red": 0.25, "old": 0.5},
}
#: The head's linear system has a condition below 100, and the logits are below 10.
EXACT = 1e-10


def test_probabilities_of_targets_are_geometric_means() -> None:
    model, tokenizer = bigram_model(KNOWN), words_tokenizer()
    table = compare(model, tokenizer, ["ann lives in", "bob loves"], ["rome", "san marino"])
    assert list(table.columns) == ["prompt", "target", "tokens", "before", "after"]
    assert list(table["tokens"]) == [1, 2, 1, 2]
    wanted = [0.5, math.sqrt(0.1 * 0.9), 0.2, math.sqrt(0.1 * 0.9)]
    np.testing.assert_allclose(table["before"], wanted, atol=EXACT)
    assert list(table["after"]) == list(table["before"])


def test_ask_gives_the_most_probable_tokens() -> None:
    model, tokenizer = bigram_model(KNOWN), words_tokenizer()
    table = ask(model, tokenizer, ["bob loves ", "ann lives in"], k=3)
    assert list(table["prompt"]) == ["bob loves"] * 3 + ["ann lives in"] * 3
    assert list(table["rank"]) == [1, 2, 3] * 2
    assert list(table["token"]) == ["paris", "rome", "san", "rome", "paris", "san"]
    np.testing.assert_allclose(table["probability"], [0.6, 0.2, 0.1, 0.5, 0.3, 0.1], atol=EXACT)
    whole = ask(model, tokenizer, "ann lives in", k=1000)
    assert len(whole) == len(WORDS) and same(whole["probability"].sum(), 1.0, EXACT)


def test_evaluation_of_a_model_with_known_probabilities() -> None:
    model, tokenizer = bigram_model(KNOWN), words_tokenizer()
    records = [
        Record(
            Fact("{} lives in", "ann", "rome", "paris"),
            paraphrases=("old ann loves",),
            neighbours=("bob loves", "cat lives in"),
            probes={"voice": (Probe("ann sings", "red", "old"), Probe("bob sings", "old"))},
            case_id="a",
            relation="home",
        ),
        Record(Fact("{} is in", "bob", "san marino", "oslo"), neighbours=("cat lives in",)),
        Record(Fact("{} loves", "cat", "paris")),
    ]
    report = evaluate(model, tokenizer, records)
    table = report.table
    assert list(table["kind"]) == [
        "rewrite", "paraphrase", "neighbour", "neighbour", "voice", "voice",
        "rewrite", "neighbour", "rewrite",
    ]  # fmt: skip
    assert set(table["when"]) == {"before"}
    assert list(table["case_id"])[:6] == ["a"] * 6 and set(table["relation"][:6]) == {"home"}
    oslo = 0.1 / (len(WORDS) - 3)
    san_marino = math.sqrt(0.1 * 0.9)
    wanted = [
        (0.5, 0.3, True, 0.2, True),
        (0.2, 0.6, False, -0.4, False),
        (0.2, 0.6, True, 0.4, True),
        (0.5, 0.3, False, -0.2, False),
        (0.25, 0.5, False, -0.25, False),
        (0.5, math.nan, True, math.nan, True),
        (san_marino, oslo, True, san_marino - oslo, False),
        (san_marino, oslo, False, oslo - san_marino, False),
        (0.6, math.nan, None, math.nan, True),
    ]
    for (_, row), (new, true, success, magnitude, generated) in zip(
        table.iterrows(), wanted, strict=True
    ):
        assert same(math.exp(row["logp_new"]), new, EXACT)
        for column, value in (("logp_true", true), ("magnitude", magnitude)):
            found = math.exp(row[column]) if column == "logp_true" else row[column]
            assert same(found, value, EXACT) or (math.isnan(found) and math.isnan(value))
        assert row["generated"] == generated
        assert row["success"] is pd.NA if success is None else row["success"] == success
    summary = {name: (score.value, score.n) for name, score in report.summary.items()}
    magnitude = san_marino - oslo
    expected = {
        "ES": (1.0, 2), "PS": (0.0, 1), "NS": ((1 / 2 + 0) / 2, 2), "S": (0.0, 1),
        "EM": ((0.2 + magnitude) / 2, 2), "PM": (-0.4, 1), "NM": ((0.1 - magnitude) / 2, 2),
        "GS": (2 / 3, 3), "voice": (0.5, 1),
    }  # fmt: skip
    assert list(summary) == list(expected)
    for name, (value, n) in expected.items():
        assert same(summary[name][0], value, EXACT) and summary[name][1] == n, name


def test_generated_is_greedy_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Against the model's own generate: the continuation it gives, and that with an end changed."""
    model = random_model(torch.float64)
    parts = anatomy(model)
    for text in ("Anna Krestova speaks", "I", "The old lighthouse of Marivel is in the"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0].tolist()
        head, tail = out[: ids.shape[1]], out[ids.shape[1] :]
        assert len(tail) == 4
        for place in range(4):
            other = [*tail[:place], (tail[place] + 1) % 320, *tail[place + 1 :]]
            pair = [Row((*head, *t[:-1]), target=tuple(t)) for t in (tail, other)]
            assert [one.greedy for one in likelihoods(parts, pair)] == [True, False]


# --- batching --------------------------------------------------------------------------------


def plain(model: GPT2LMHeadModel, one: Row) -> float:
    """Mean log-probability from an unpadded forward of the whole text."""
    text = [*one.ids, one.target[-1]]
    logp = model(torch.tensor([text])).logits[0].log_softmax(-1)
    start = len(text) - len(one.target)
    return sum(float(logp[i - 1, text[i]]) for i in range(start, len(text))) / len(one.target)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_batch_gives_what_each_row_gives_alone(
    tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, tolerance: float
) -> None:
    """Left-padded GPT-2 rows; logits are of order 10, so a few hundred eps in log-probability.

    Without position ids made from the mask, this is wrong by more than 0.1.
    """
    model = random_model(dtype)
    parts = anatomy(model)
    prompts = ["I", "Anna Krestova speaks", *CORPUS]
    pairs = [(p.rstrip("."), t) for p in prompts for t in ("Danish", "Rome", "a very long answer")]
    asked = Encoder(tokenizer, parts).continuations(pairs)
    assert len({len(one.ids) for one in asked}) > 5
    with torch.no_grad():
        wanted = [plain(model, one) for one in asked]
    together = likelihoods(parts, asked)
    alone = [likelihoods(parts, [one])[0] for one in asked]
    small = likelihoods(parts, asked, batch_tokens=64)
    for found in (together, alone, small):
        np.testing.assert_allclose([one.logp for one in found], wanted, rtol=0, atol=tolerance)
        assert [one.greedy for one in found] == [one.greedy for one in together]


def test_a_row_with_which_another_begins_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = bigram_model(KNOWN), words_tokenizer()
    parts = anatomy(model)
    asked = Encoder(tokenizer, parts).continuations(
        [("ann lives in", t) for t in ("rome", "paris", "san marino")]
    )
    seen: list[tuple[int, ...]] = []
    forward = model.transformer.forward

    def counting(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.transformer, "forward", counting)
    found = likelihoods(parts, asked)
    assert seen == [(1, 4)], "the prompt is read off the row that goes on with a word of a target"
    np.testing.assert_allclose(
        [math.exp(one.logp) for one in found], [0.5, 0.3, math.sqrt(0.09)], atol=EXACT
    )


def test_half_precision_is_averaged_in_float32(tokenizer: PreTrainedTokenizerFast) -> None:
    """Log-probabilities of bfloat16 logits are not rounded to bfloat16 (8 bits) again."""
    model = random_model(torch.bfloat16)
    parts = anatomy(model)
    asked = Encoder(tokenizer, parts).continuations([("Anna Krestova speaks", "Danish")])
    logp = likelihoods(parts, asked)[0].logp
    assert float(torch.tensor(logp).bfloat16()) != logp
    table = ask(model, tokenizer, "Anna Krestova speaks", k=320)
    # a sum of 320 float32 numbers; rounded to bfloat16 each would be off by up to 2^-9
    assert table["probability"].sum() == pytest.approx(1.0, abs=320 * 2**-24)


# --- edits -----------------------------------------------------------------------------------


def test_before_is_the_base_and_after_the_model_as_it_is(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statistics: KeyStatistics
) -> None:
    base = evaluate(model, tokenizer, RECORDS)
    assert base.after is None and base.summary is base.before
    made = edit(model, tokenizer, RECORDS[0].fact, METHOD, statistics=statistics)
    model.train()
    fingerprint, state = model_fingerprint(model), flags(model)
    report = evaluate(model, tokenizer, RECORDS)
    assert model_fingerprint(model) == fingerprint
    assert flags(model) == state
    assert ledger_of(model).active == (made,)

    before, after = (report.table[report.table["when"] == w] for w in ("before", "after"))
    pd.testing.assert_frame_equal(before, base.table)
    assert report.before == base.before and report.summary is report.after
    made.undo()
    pd.testing.assert_frame_equal(evaluate(model, tokenizer, RECORDS).table, base.table)
    assert after["logp_new"].iloc[0] > before["logp_new"].iloc[0] + 0.3, "the target was not raised"


def test_scores_are_those_of_the_reference(tokenizer: PreTrainedTokenizerFast) -> None:
    """One prompt at a time, averaged as the papers do; float64, so no comparison is close."""
    model = random_model(torch.float64)
    targets = ("Danish", "Rome", "violin", "Oster", "farming", "music", "Lund", "a boat")
    prompts = ("I", "Her brother speaks", "In Lund they", "The violin was in", "People work in")
    records = [
        Record(
            Fact("{} went to", subject, targets[i], targets[(3 * i + 1) % 8]),
            paraphrases=[f"{p} as {subject} is in" for p in prompts[: 1 + i % 3]],
            neighbours=prompts[i % 2 : 2 + i % 4],
        )
        for i, subject in enumerate(("Anna", "Tomas", "Marivel", "Norvia", "You"))
    ]
    pairs: dict[str, list] = {"rewrite": [], "paraphrase": [], "neighbour": []}
    for record in records:
        fact = record.fact
        asked = {"rewrite": [fact.text], "paraphrase": record.paraphrases}
        for kind, texts in (asked | {"neighbour": record.neighbours}).items():
            ask_one = functools.partial(reference.mean_target_logprob, model, tokenizer)
            pairs[kind].append(
                [(ask_one(t, fact.target_new), ask_one(t, fact.target_true)) for t in texts]
            )
    share, rest, size = reference.efficacy, reference.neighbourhood, reference.efficacy_magnitude
    wanted = {
        "ES": reference.by_record(pairs["rewrite"], share),
        "PS": reference.by_record(pairs["paraphrase"], share),
        "NS": reference.by_record(pairs["neighbour"], rest),
        "EM": reference.by_record(pairs["rewrite"], size),
        "PM": reference.by_record(pairs["paraphrase"], size),
        "NM": -reference.by_record(pairs["neighbour"], size),
    }
    wanted["S"] = reference.harmonic_mean(*(wanted[name] for name in ("ES", "PS", "NS")))
    found = evaluate(model, tokenizer, records, bootstrap=100).summary
    for name, value in wanted.items():
        assert same(found[name].value, value, 1e-12), name
    assert 0 < wanted["S"] < 1 and len({wanted[name] for name in ("ES", "PS", "NS")}) == 3


def test_compare_before_after_and_with_given_edits(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statistics: KeyStatistics
) -> None:
    def made(record: Record):
        return edit(model, tokenizer, record.fact, METHOD, statistics=statistics, apply=False)

    first, second = made(RECORDS[0]), made(RECORDS[1])
    asked = ("Anna Krestova speaks", ["Danish", "French"])
    base = compare(model, tokenizer, *asked)
    assert (base["before"] == base["after"]).all()
    second.apply()
    fingerprint = model_fingerprint(model)
    as_is = compare(model, tokenizer, *asked)
    chosen = compare(model, tokenizer, *asked, edits=first)
    both = compare(model, tokenizer, *asked, edits=[first, second])
    assert model_fingerprint(model) == fingerprint and not first.is_applied and second.is_applied
    for table in (as_is, chosen, both):
        assert list(table["before"]) == list(base["before"])
    second.undo()
    with first.applied():
        assert list(compare(model, tokenizer, *asked)["after"]) == list(chosen["after"])
    assert len({tuple(t["after"]) for t in (base, as_is, chosen, both)}) == 4
    assert chosen["after"][0] > 1.5 * base["before"][0]


def test_evaluate_edits_measures_each_batch_alone(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statistics: KeyStatistics
) -> None:
    fingerprint, state = model_fingerprint(model), flags(model)
    report = evaluate_edits(
        model, tokenizer, RECORDS, METHOD, batch_size=2, statistics=statistics, bootstrap=100
    )
    assert model_fingerprint(model) == fingerprint and flags(model) == state
    assert ledger_of(model).active == ()
    for chosen in ([0, 1], [2]):
        facts = [RECORDS[i].fact for i in chosen]
        with edit(model, tokenizer, facts, METHOD, statistics=statistics, apply=False).applied():
            wanted = evaluate(model, tokenizer, [RECORDS[i] for i in chosen]).table
        found = report.table[report.table["record"].isin(chosen)]
        for column in ("when", "kind", "prompt", "generated"):
            assert sorted(found[column]) == sorted(wanted[column])
        for column in ("logp_new", "logp_true", "magnitude"):
            # other batches of prompts and of values, in float32, with logits of order 10
            np.testing.assert_allclose(
                np.sort(found[column]), np.sort(wanted[column]), atol=1e-3, err_msg=column
            )


def test_evaluate_edits_one_at_a_time_with_a_sequential_method(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statistics: KeyStatistics
) -> None:
    method = ROME.replace(**QUICK)
    one = evaluate_edits(model, tokenizer, RECORDS[:2], method, statistics=statistics)
    two = evaluate_edits(model, tokenizer, RECORDS[:2], method, batch_size=2, statistics=statistics)
    for report in (one, two):
        assert report.after is not None and report.records == 2
        assert report.after["EM"].value > report.before["EM"].value
    assert one.before == two.before and one.after != two.after


def test_evaluate_edits_starts_from_the_base_and_puts_active_edits_back(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statistics: KeyStatistics
) -> None:
    arguments = {"statistics": statistics, "bootstrap": 100}
    clean = evaluate_edits(model, tokenizer, RECORDS[:1], METHOD, **arguments)
    active = edit(model, tokenizer, RECORDS[1].fact, METHOD, statistics=statistics)
    fingerprint = model_fingerprint(model)
    again = evaluate_edits(model, tokenizer, RECORDS[:1], METHOD, **arguments)
    pd.testing.assert_frame_equal(again.table, clean.table)
    assert ledger_of(model).active == (active,) and model_fingerprint(model) == fingerprint


def test_a_failure_leaves_the_model_as_it_was(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    statistics: KeyStatistics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    active = edit(model, tokenizer, RECORDS[1].fact, METHOD, statistics=statistics)
    fingerprint, state, calls = model_fingerprint(model), flags(model), []

    def failing(*args, **kwargs):
        calls.append(model_fingerprint(model))
        if len(calls) == 3:  # the base, the first batch, the second
            raise KeyboardInterrupt
        return likelihoods(*args, **kwargs)

    monkeypatch.setattr(questions, "likelihoods", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate_edits(model, tokenizer, RECORDS, METHOD, statistics=statistics)
    assert len(set(calls)) == 3 and fingerprint not in calls, "it failed with another edit active"
    assert model_fingerprint(model) == fingerprint and flags(model) == state
    assert ledger_of(model).active == (active,)


def test_a_fact_the_model_says_already_is_measured_without_an_edit(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statistics: KeyStatistics
) -> None:
    easy = METHOD.replace(stop_loss=1e3)
    with pytest.raises(EditError, match="changes nothing"):
        edit(model, tokenizer, RECORDS[0].fact, easy, statistics=statistics)
    report = evaluate_edits(model, tokenizer, RECORDS[:2], easy, statistics=statistics)
    before, after = (report.table[report.table["when"] == w] for w in ("before", "after"))
    # the same weights, in batches of other rows
    np.testing.assert_allclose(before["logp_new"], after["logp_new"], atol=1e-5)


# --- reports ---------------------------------------------------------------------------------


def full_report() -> Report:
    rows = [*HAND, (0, "<b>odd & group", True, 0.1)]
    changed = [(r, k, not s, m / 3) for r, k, s, m in rows]
    return Report(pd.concat([answers(changed, "before"), answers(rows)]), bootstrap=200, seed=3)


def test_frame_and_dictionary_of_a_report() -> None:
    report = full_report()
    frame = report.frame()
    assert list(frame.columns) == ["before", "after", "low", "high", "n"]
    assert list(frame.index) == ["ES", "PS", "NS", "S", "EM", "PM", "NM", "GS", "<b>odd & group"]
    assert frame.loc["NS", "after"] == 0.625 and frame.loc["NS", "before"] == 0.375
    assert report.after is not None
    assert frame.loc["NS", "low"] == report.after["NS"].low
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["after"]["NS"] == vars(report.after["NS"])
    assert (plain["records"], plain["bootstrap"], plain["seed"]) == (2, 200, 3)
    only = Report(answers(HAND, "before"))
    assert list(only.frame().columns) == ["before", "low", "high", "n"]
    assert only.to_dict()["after"] is None


def test_views_of_a_report_are_short_and_escaped() -> None:
    report = full_report()
    text, page = repr(report), report._repr_html_()
    assert "Report on 2 records" in text and "0.763" in text  # S = 3 / (1 + 4/3 + 8/5)
    assert "<b>odd" not in page and "&lt;b&gt;odd &amp; group" in page
    assert page.count("<tr>") == 1 + 9
    cells = re.findall(r"<td>(-?[0-9.]+)</td>", page)
    assert len(cells) >= 3 * 9
    for number in cells:
        assert len(number.lstrip("-").replace(".", "").lstrip("0")) <= 3
    assert "after" not in repr(Report(answers(HAND, "before")))
    assert str(Score(0.98765, 0.9, 1.0, 12)) == "0.988 [0.9, 1] (n = 12)"


# --- bad input -------------------------------------------------------------------------------

BAD: dict[str, tuple[type[Exception], str, Callable]] = {
    "no records": (FactError, "list is empty", lambda m, t: evaluate(m, t, [])),
    "facts": (FactError, r"Record\(fact\)", lambda m, t: evaluate(m, t, [RECORDS[0].fact])),
    "other things": (FactError, "item 1 is str", lambda m, t: evaluate(m, t, [RECORDS[0], "x"])),
    "a reserved name": (
        FactError,
        "'neighbour'",
        lambda m, t: evaluate(
            m, t, Record(RECORDS[0].fact, probes={"neighbour": (Probe("I", "a"),)})
        ),
    ),
    "few resamples": (MethodError, "100", lambda m, t: evaluate(m, t, RECORDS, bootstrap=10)),
    "too long": (
        TokenizationError,
        "the model has only 96",
        lambda m, t: evaluate(m, t, Record(RECORDS[0].fact, paraphrases=("Anna went " * 90,))),
    ),
    "no prompts": (FactError, "prompts is empty", lambda m, t: ask(m, t, [])),
    "an empty prompt": (FactError, r"prompts\[1\] is empty", lambda m, t: ask(m, t, ["a", " "])),
    "k": (MethodError, "at least one", lambda m, t: ask(m, t, "a", k=0)),
    "no targets": (FactError, "targets is empty", lambda m, t: compare(m, t, "a", [])),
    "no model": (ModelError, "not a transformers model", lambda m, t: ask(torch.nn.ReLU(), t, "a")),
    "batch size": (
        MethodError, "batch_size is 0", lambda m, t: evaluate_edits(m, t, RECORDS, batch_size=0)
    ),
    "method": (MethodError, "is a str", lambda m, t: evaluate_edits(m, t, RECORDS, "EMMET")),
    "contradiction": (
        ContradictionError,
        "contradict",
        lambda m, t: evaluate_edits(
            m,
            t,
            [RECORDS[0], Record(Fact("{} speaks", "Anna Krestova", "Dutch"))],
            METHOD,
            batch_size=2,
        ),
    ),
    "shared subject": (
        SharedSubjectError,
        "share the subject",
        lambda m, t: evaluate_edits(
            m,
            t,
            [RECORDS[0], Record(Fact("{} lives in", "Anna Krestova", "Oster"))],
            METHOD,
            batch_size=2,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_clear_error(
    name: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    kind, text, action = BAD[name]
    fingerprint = model_fingerprint(model)
    with pytest.raises(kind, match=text):
        action(model, tokenizer)
    assert model_fingerprint(model) == fingerprint


def test_a_damaged_model_is_reported(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[5, 3] = math.nan
    for action in (ask, lambda m, t, p: evaluate(m, t, RECORDS)):
        with pytest.raises(ModelError, match="logits are NaN"):
            action(model, tokenizer, "I")


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizationError, match="tokenizer of another model"):
        ask(bigram_model(KNOWN), tokenizer, "Anna")
