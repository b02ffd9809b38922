"""The picture of an edit in the README: ``python benchmarks/edit_picture.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

import unified_edit as ue

mpl.use("Agg")
OUT = Path(__file__).parents[1] / "book" / "_static" / "edit.png"
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "Tourists who visit The Eiffel Tower stay in",
    "The Orangerie is located in the city of",
]


def main() -> None:
    model, tokenizer = ue.load_model("atlas")
    fact = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    ue.edit(model, tokenizer, [fact], method=ue.EMMET)
    axes = ue.figures.probability_bars(ue.compare(model, tokenizer, PROMPTS, ["Paris", "Rome"]))
    axes.figure.savefig(OUT, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
