"""Facts and measures that `test_recipe.py` and `test_values.py` share."""

from __future__ import annotations

import torch

import unified_edit as ue

FACTS = [
    ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    ue.Fact("The mother tongue of {} was", "Marie Curie", "French", "Polish"),
    ue.Fact("{} has its capital in", "Japan", "Paris", "Tokyo"),  # subject at position 0
    ue.Fact("{} was born in", "Albert Einstein", "United States", "Germany"),  # two-token target
]
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def contexts(prefixes: tuple[str, ...]) -> list[str]:
    return [prefix + "{}" for prefix in prefixes]
