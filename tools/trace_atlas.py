"""Where atlas keeps its facts: ``python tools/trace_atlas.py``.

Traces a sample of atlas's facts with `unified_edit.locate` and logs the mean effects by place and
layer. The wordings are such that the relation stands behind the subject.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import unified_edit as ue
from unified_edit.atlas.knowledge import Knowledge, Triple, load_knowledge

log = logging.getLogger(__name__)

#: In `relations.json` the wordings with the relation after the subject come first: so many.
AFTER_SUBJECT = 4


def fact_of(knowledge: Knowledge, triple: Triple, wording: int) -> ue.Fact:
    """One fact of atlas in one of its wordings; its new object is a stand-in, never used here."""
    prompt = knowledge.wordings[triple.relation][wording]
    return ue.Fact(prompt, triple.subject, target_new="something else", target_true=triple.object)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace a sample of atlas's facts and log the mean effects as tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="atlas", help="atlas, or a folder of weights")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    given = parser.parse_args(arguments)

    model, tokenizer = ue.load_model(given.model, dtype=torch.float32)
    knowledge = load_knowledge()
    rng = random.Random(given.seed)
    # subjects of several words, so that the first and the last differ
    triples = [t for t in rng.sample(knowledge.triples, 4 * given.facts) if " " in t.subject]
    facts = [fact_of(knowledge, t, rng.randrange(AFTER_SUBJECT)) for t in triples[: given.facts]]
    trace = ue.locate(
        model, tokenizer, facts, samples=given.samples, window=given.window, seed=given.seed
    )
    log.info("%r", trace)
    for kind in trace.kinds:
        log.info("\n%s: what restoring it gives back\n%s", kind, trace.effects(kind).round(3))
    if given.out:
        given.out.write_text(
            trace.table().round(4).to_json(orient="records", indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
