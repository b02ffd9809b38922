"""RS, the consistency of generated texts with reference texts, against its formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from unified_edit.errors import FactError
from unified_edit.measuring import Report, reference_scores

LYON, OSLO = "Lyon lies on the Rhône. Silk of Lyon", "Oslo: a fjord, and the sea!"
REFERENCES = {"a": [LYON, "The Rhône is a river."], "b": (OSLO,)}


def rows(texts: dict[tuple[str, str], list[str]], kind: str = "generation") -> Report:
    """A report of (when, case) -> texts; the first case is record 0."""
    cases = list(dict.fromkeys(case for _, case in texts))
    made: list[dict[str, Any]] = [
        {"record": cases.index(case), "case_id": case, "relation": None, "when": when,
         "kind": kind, "prompt": "p", "logp_new": math.nan, "logp_true": math.nan,
         "success": pd.NA, "magnitude": 1.0, "generated": False, "text": text}
        for (when, case), each in texts.items()
        for text in each
    ]  # fmt: skip
    return Report(pd.DataFrame(made))


def literal(text: str, case: str) -> float:
    """TF-IDF vectors over all words, as dense arrays."""
    documents = [one for each in REFERENCES.values() for one in each]

    def words(one: str) -> list[str]:
        cleaned = "".join(c if c.isalnum() else " " for c in one.lower())
        return [word for word in cleaned.split() if len(word) > 1]

    vocabulary = sorted({word for one in documents for word in words(one)})
    idf = np.array([
        1 + np.log((1 + len(documents)) / (1 + sum(word in words(one) for one in documents)))
        for word in vocabulary
    ])  # fmt: skip
    one, two = (
        np.array([words(x).count(word) for word in vocabulary]) * idf
        for x in (text, " ".join(REFERENCES[case]))
    )
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))


def test_scores_are_cosines_of_weighted_words() -> None:
    before = {"a": ["Lyon is a town by the sea", "silk"], "b": ["The fjord, and more fjord"]}
    after = {"a": ["The river Rhône"], "b": ["Nothing of it"]}
    report = rows(
        {(when, case): texts for when, each in (("before", before), ("after", after))
         for case, texts in each.items()}
    )  # fmt: skip
    found = reference_scores(report, REFERENCES)
    assert list(found) == ["before", "after"]
    for when, each in (("before", before), ("after", after)):
        values = [literal(" ".join(texts), case) for case, texts in each.items() if case in "a"]
        b = 0.0 if when == "after" else literal(" ".join(each["b"]), "b")
        assert found[when].value == pytest.approx(np.mean([*values, b]), abs=1e-12)
        assert found[when].n == 2 and found[when].low <= found[when].value <= found[when].high


def test_a_text_is_like_itself_and_case_and_signs_do_not_count() -> None:
    report = rows({("before", "b"): ["oslo A FJORD and (the) sea"]})
    assert reference_scores(report, REFERENCES)["before"].value == pytest.approx(1.0)


def test_records_without_references_do_not_count() -> None:
    report = rows({("after", "a"): [LYON], ("after", "c"): ["anything"]})
    found = reference_scores(report, REFERENCES)["after"]
    assert found.n == 1 and found.value == pytest.approx(literal(LYON, "a"))
    none = reference_scores(report, {"a": []})["after"]
    assert none.n == 0 and math.isnan(none.value) and math.isnan(none.low)


def test_what_cannot_be_scored_is_refused() -> None:
    report = rows({("after", "a"): [LYON]})
    with pytest.raises(FactError, match="no generated texts; evaluate with generate=True"):
        reference_scores(Report(report.table.drop(columns="text")), REFERENCES)
    with pytest.raises(FactError, match="a reference text of case a is ' '"):
        reference_scores(report, {"a": ["Lyon", " "]})
    assert reference_scores(rows({("after", "a"): [LYON]}, kind="rewrite"), REFERENCES) == {}
