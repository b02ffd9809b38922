"""Scores of an evaluation: from a table of answers to ES, PS, NS and their intervals.

The scores are those of ROME (sec. 3.3) and MEMIT (sec. 5): with o* the new and oc
the true object and P as in `unified_edit.model.likelihoods`,

    ES, PS   share of rewrite prompts / paraphrases with P[o*] > P[oc]
    NS       share of neighbours with P[oc] > P[o*]
    EM, PM   mean of P[o*] - P[oc];    NM   mean of P[oc] - P[o*]
    S        harmonic mean of ES, PS and NS; 0 if one of them is 0
    GS       share of rewrite prompts after which greedy decoding gives o*
    PO, PG   portability: of the questions that the fact leads to (multi-hop among them), the share
             answered as the edit has it: more probable than the old answer where there is one, and
             by greedy decoding. The probes of all groups "portability" and "portability: ..."
    GE       mean n-gram entropy of generated text, in bits (`unified_edit.measuring.generation`);
             measured on request; RS, where there are reference texts, is in `references`

A tie is a failure. As in their released code (experiments/summarize.py) a score is the mean over
records of the mean over a record's prompts, so that every record counts the same. Scores are
fractions here, percentages there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unified_edit.arguments import whole_number
from unified_edit.errors import FactError, MethodError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

REWRITE, PARAPHRASE, NEIGHBOUR = KINDS = ("rewrite", "paraphrase", "neighbour")
#: The kind of a prompt behind which text was generated.
GENERATION = "generation"
#: All groups of probes that ask for what a fact leads to: "portability", "portability: ...".
PORTABILITY = "portability*"
BEFORE, AFTER = "before", "after"

#: Score -> (kind of prompt, column of the table that is averaged); S is made of the first three.
SCORES = {
    "ES": (REWRITE, "success"),
    "PS": (PARAPHRASE, "success"),
    "NS": (NEIGHBOUR, "success"),
    "EM": (REWRITE, "magnitude"),
    "PM": (PARAPHRASE, "magnitude"),
    "NM": (NEIGHBOUR, "magnitude"),
    "GS": (REWRITE, "generated"),
    "PO": (PORTABILITY, "success"),
    "PG": (PORTABILITY, "generated"),
    "GE": (GENERATION, "magnitude"),
}
_ORDER = ("ES", "PS", "NS", "S", "EM", "PM", "NM", "GS", "PO", "PG", "GE")
#: Names that a group of probes cannot have.
RESERVED = frozenset({*KINDS, GENERATION, PORTABILITY, *_ORDER})

#: Fewer resamples do not give a 2.5 % quantile.
LEAST_BOOTSTRAP = 100


@dataclass(frozen=True)
class Score:
    """One score with its 95 % bootstrap interval.

    n: records that enter (for S, the smallest number of its three scores). An interval without
    width at 0 or 1 says that all records agreed, not that the score is certain: with no failure
    in n records, up to about 3/n failures remain plausible.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{_short(self.value)} [{_short(self.low)}, {_short(self.high)}] (n = {self.n})"


def summarise(table: pd.DataFrame, *, bootstrap: int = 2000, seed: int = 0) -> dict[str, Score]:
    """Scores from the rows of one state of a `Report.table` (all of them, or some you chose).

    A score without a single prompt is absent, and S with it if it is one of the three. Intervals
    are 2.5 % and 97.5 % quantiles over `bootstrap` resamples of *records*, drawn with
    replacement from a generator seeded with `seed`: prompts of one record rise and fall
    together, so resampling prompts would make intervals too narrow. S is computed anew in each.

    Raises FactError for an empty table or one with several states, MethodError for a
    `bootstrap` below 100.
    """
    import numpy as np

    bootstrap = check_bootstrap(bootstrap)
    seed = whole_number(seed, "seed", MethodError, least=0)
    if table["when"].nunique() != 1:
        raise FactError(
            f"scores need the rows of exactly one state: got {sorted(set(table['when']))}. Choose "
            "one, for example report.table.query('when == \"after\"')"
        )
    sources = {**SCORES, **{group: (group, "success") for group in _groups(table)}}
    means = {name: _record_means(table, *source) for name, source in sources.items()}
    means = {name: values for name, values in means.items() if not np.isnan(values).all()}
    columns = np.stack(list(means.values()), axis=1)
    values = dict(zip(means, np.nanmean(columns, axis=0), strict=True))
    samples = dict(zip(means, _resampled(columns, bootstrap, seed).T, strict=True))
    counts = {name: int((~np.isnan(column)).sum()) for name, column in means.items()}
    three = [name for name in ("ES", "PS", "NS") if name in means]
    if len(three) == 3:
        values["S"] = harmonic_mean(np.stack([values[name] for name in three]))
        samples["S"] = harmonic_mean(np.stack([samples[name] for name in three]))
        counts["S"] = min(counts[name] for name in three)
    order = [name for name in _ORDER if name in values]
    order += [name for name in values if name not in _ORDER]
    # a resample may hold none of the few records that have a score; it says nothing about it
    low, high = np.nanquantile([samples[name] for name in order], [0.025, 0.975], axis=1)
    return {
        name: Score(float(values[name]), float(low[place]), float(high[place]), counts[name])
        for place, name in enumerate(order)
    }


def score_of(values: np.ndarray, bootstrap: int = 2000, seed: int = 0) -> Score:
    """The mean of one number a record, NaN where a record has none, and its interval."""
    import numpy as np

    count = int((~np.isnan(values)).sum())
    if not count:
        return Score(float("nan"), float("nan"), float("nan"), 0)
    samples = _resampled(values[:, None], bootstrap, seed)
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return Score(float(np.nanmean(values)), float(low), float(high), count)


def check_bootstrap(bootstrap: object) -> int:
    """The number of resamples; MethodError unless so many give an interval."""
    advice = "Fewer resamples give no 95 % interval"
    return whole_number(bootstrap, "bootstrap", MethodError, least=LEAST_BOOTSTRAP, advice=advice)


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Harmonic mean over the first axis of numbers >= 0: 0 where one is 0, NaN where one is.

    :eq:`judging-harmonic`.
    """
    import numpy as np

    with np.errstate(divide="ignore"):
        return len(values) / (1.0 / values).sum(axis=0)


def _groups(table: pd.DataFrame) -> list[str]:
    return [kind for kind in table["kind"].unique() if kind not in (*KINDS, GENERATION)]


def _record_means(table: pd.DataFrame, kind: str, column: str) -> np.ndarray:
    """For each record of the table the mean over its prompts of a kind; NaN if it has none."""
    import pandas as pd

    of_kind = table["kind"] == kind
    if kind == PORTABILITY:
        of_kind = table["kind"].str.fullmatch("portability(: .*)?")
    numbers = pd.Series(
        table[column].to_numpy(dtype=float, na_value=float("nan")), index=table["record"]
    ).where(of_kind.to_numpy())
    return numbers.groupby(level=0).mean().to_numpy()  # leaves NaN out


def _resampled(columns: np.ndarray, bootstrap: int, seed: int) -> np.ndarray:
    """Means (resamples x scores) of columns (records x scores), leaving NaN out."""
    import numpy as np

    generator = np.random.default_rng(seed)
    present = ~np.isnan(columns)
    filled = np.where(present, columns, 0.0)
    records = len(columns)
    means = np.empty((bootstrap, columns.shape[1]))
    with np.errstate(invalid="ignore"):
        for row in means:
            drawn = generator.integers(records, size=records)
            times = np.bincount(drawn, minlength=records).astype(float)
            row[:] = (times @ filled) / (times @ present)
    return means


def _short(value: float) -> str:
    return f"{value:.3g}"
