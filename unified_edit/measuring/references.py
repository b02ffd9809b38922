"""RS, the consistency of generated texts with reference texts (ROME, sec. 3.3; MEMIT, sec. 5).

RS is the cosine of two TF-IDF vectors: of what a model writes about a subject after an edit, and of
texts about things that have the new object. A text is a bag of its words (two letters or more, in
lower case); a word w counts

    f_w (1 + ln((1 + n) / (1 + n_w))),

f_w being how often it stands in the text, and n_w in how many of all n reference texts. Words of no
reference text count nothing. The released code (kmeng01/rome, experiments/py/eval_utils_*.py) does
the same with weights from a snapshot of Wikipedia; so numbers are to be compared with others made
with the same references only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from unified_edit.arguments import as_list
from unified_edit.errors import FactError
from unified_edit.measuring.report import TEXT, Report
from unified_edit.measuring.scores import AFTER, BEFORE, GENERATION, Score, score_of

_WORD = re.compile(r"\w\w+")


def reference_scores(report: Report, references: Mapping[str, Iterable[str]]) -> dict[str, Score]:
    """RS of a report whose texts were generated (`generate=True`): {"before": ..., "after": ...}.

    references: case_id -> texts about things that have the record's new object. A record's score is
    that of all its texts, joined, with all its references, joined. Records without references do
    not count; where none has any, the scores are NaN, with n = 0.

    Raises FactError for a report without texts, and for references that are none.
    """
    import numpy as np

    if TEXT not in report.table:
        raise FactError("the report has no generated texts; evaluate with generate=True")
    known = {str(case): as_list(texts) for case, texts in references.items()}
    for case, texts in known.items():
        wrong = next((one for one in texts if not isinstance(one, str) or not one.strip()), None)
        if wrong is not None:
            raise FactError(f"a reference text of case {case} is {wrong!r}; give texts with words")
    weights = word_weights(text for texts in known.values() for text in texts)
    table = report.table[report.table["kind"] == GENERATION]
    found: dict[str, Score] = {}
    for when in (BEFORE, AFTER):
        asked = table[table["when"] == when]
        if asked.empty:
            continue
        values = [
            cosine(" ".join(rows[TEXT]), " ".join(known[case]), weights)
            if known.get(case)
            else math.nan
            for (_, case), rows in asked.groupby(["record", "case_id"], sort=False)
        ]
        found[when] = score_of(np.array(values), report.bootstrap, report.seed)
    return found


def word_weights(texts: Iterable[str]) -> dict[str, float]:
    """1 + ln((1 + n) / (1 + n_w)) of each word of some texts."""
    count, each = 0, Counter[str]()
    for text in texts:
        count += 1
        each.update(set(_words(text)))
    return {word: 1 + math.log((1 + count) / (1 + number)) for word, number in each.items()}


def cosine(text: str, other: str, weights: Mapping[str, float]) -> float:
    """Of the weighted counts of two texts' words; 0 where one has none that weighs anything."""
    one, two = _vector(text, weights), _vector(other, weights)
    size = math.hypot(*one.values()) * math.hypot(*two.values())
    return (
        math.fsum(one[word] * two[word] for word in one.keys() & two.keys()) / size if size else 0.0
    )


def _vector(text: str, weights: Mapping[str, float]) -> dict[str, float]:
    return {
        word: number * weights[word]
        for word, number in Counter(_words(text)).items()
        if word in weights
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
