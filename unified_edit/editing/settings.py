"""Published settings: what the released code of each method uses on each model, with the source.

A method finds its settings by its `preset`, whatever it is called.
"""

from __future__ import annotations

from typing import Any

#: Used for a known or unknown model where `SETTINGS` says nothing else: the values shared by
#: the released settings of MEMIT and EMMET (hparams/*.json of kmeng01/memit and of
#: scalable-model-editing/unified-model-editing).
DEFAULTS: dict[str, Any] = {
    "steps": 20, "weight_decay": 0.5, "clamp": 0.75, "stop_loss": 0.05,
}  # fmt: skip

#: (model type, layers, hidden size) -> preset -> settings.
SETTINGS: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {
    # GPT-2 medium: kmeng01/rome, hparams/ROME/gpt2-medium.json
    ("gpt2", 24, 1024): {"ROME": {"layers": (8,), "clamp": 3.0}},
    # GPT-2 large: kmeng01/rome, hparams/ROME/gpt2-large.json
    ("gpt2", 36, 1280): {"ROME": {"layers": (12,), "clamp": 4.0}},
    ("gpt2", 48, 1600): {
        # kmeng01/rome, hparams/ROME/gpt2-xl.json
        "ROME": {"layers": (17,), "clamp": 4.0},
        # unified-model-editing, hparams/EMMET/gpt2-xl.json; w = 1000, alpha = 0.1
        "EMMET": {"layers": (17,)},
        "EMMET_RELEASED": {"layers": (17,), "ridge": 100.0},
        # kmeng01/memit, hparams/MEMIT/gpt2-xl.json
        "MEMIT": {"layers": (13, 14, 15, 16, 17), "ridge": 20_000.0},
    },
    ("gptj", 28, 4096): {
        # kmeng01/rome, hparams/ROME/EleutherAI_gpt-j-6B.json
        "ROME": {"layers": (5,), "clamp": 4.0},
        # unified-model-editing, hparams/EMMET/EleutherAI_gpt-j-6B.json; w = 1, alpha = 0.1
        "EMMET": {"layers": (5,), "steps": 25},
        "EMMET_RELEASED": {"layers": (5,), "ridge": 0.1, "steps": 25},
        # kmeng01/memit, hparams/MEMIT/EleutherAI_gpt-j-6B.json
        "MEMIT": {"layers": (3, 4, 5, 6, 7, 8), "ridge": 15_000.0, "steps": 25},
    },
    # atlas, the embedded model: chosen for this project on its own records (benchmarks/)
    ("gpt2", 6, 192): {
        "ROME": {"layers": (1,), "clamp": 4.0},
        "EMMET": {"layers": (1,), "clamp": 1.25, "stop_loss": 0.02},
        "EMMET_RELEASED": {"layers": (1,), "clamp": 1.25, "stop_loss": 0.02, "ridge": 0.1},
        "MEMIT": {"layers": (0, 1), "clamp": 1.25, "stop_loss": 0.02, "ridge": 1.0},
    },
}
