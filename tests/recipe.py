"""Facts, models and measures for holding keys, values and whole edits against `reference.py`.

Most is compared on tiny random models in float64, where little is lost and a forward takes a
millisecond; atlas, the embedded model, stands for real sizes and tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import unified_edit as ue

#: About things that atlas knows.
FACTS = (
    ue.Fact("{} has its capital in", "Japan", "Paris", "Tokyo"),  # subject at position 0
    ue.Fact("{} was born in", "Albert Einstein", "United States", "Germany"),  # two-token target
)
#: In words of the tiny tokenizer: subjects of one token, of two, and of three; the target of the
#: last one has three tokens, and nothing stands before its subject.
TINY_FACTS = (
    ue.Fact("I walked from the {} to the", "old river", "market", "bridge"),
    ue.Fact("The {} is in the city of", "old tower", "Rome", "Paris"),
    ue.Fact("{} was born in", "Lisbon", "Oslo and Rome", "Dublin"),
)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}

#: Of the tiny models' methods, by site: the targets' losses fall from about 8 to 6 there. With
#: these a fact stops early, others take all steps; one is held by the clamp, others are not.
TINY_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt2", "block"): {"clamp": 1.2, "stop_loss": 5.7},
    ("gpt2", "mlp"): {"clamp": 2.5, "stop_loss": 5.7},
    ("gptj", "block"): {"clamp": 0.58, "stop_loss": 6.1},
    ("gptj", "mlp"): {"clamp": 1.1, "stop_loss": 6.1},
}
#: Prefixes of two lengths, so that rows are padded.
TINY_CONTEXTS = ue.Contexts(starts=("The", "I walked from the old"), lengths=(6,))


def tiny_method(method: ue.Method, family: str, **changes: Any) -> ue.Method:
    """A method with few steps and contexts, and settings at which random models move."""
    fields = {"steps": 8, "weight_decay": 0.1, "layers": (1,), "contexts": TINY_CONTEXTS}
    return method.replace(**{**fields, **TINY_SETTINGS[family, method.site.name], **changes})


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def contexts(prefixes: tuple[str, ...]) -> list[str]:
    return [prefix + "{}" for prefix in prefixes]


def loop(method: ue.Method) -> dict[str, Any]:
    """The settings of a resolved method for `reference.value`."""
    return {
        "site": method.site.name, "steps": method.steps, "lr": method.learning_rate,
        "clamp": method.clamp, "weight_decay": method.weight_decay,
        "kl_weight": method.kl_weight, "stop_loss": method.stop_loss,
    }  # fmt: skip
