"""Settings that methods have for models: what their own released code uses, with the source.

A method finds its settings by its `preset`, whatever it is called, and a model by its shape. What
others published for other models, and what was measured here, is in `more_settings`. Layers are
counted from 0, as by everybody. A setting belongs to a repository and to a date; these are read
from

- kmeng01/rome at 0874014 (2022-10-14): hparams/ROME, unchanged since 2022-08-05;
- kmeng01/memit at 80426fd (2022-11-14): hparams/MEMIT, unchanged since the first one, 2022-10-13;
- scalable-model-editing/unified-model-editing, branch main at 23d72b5 (2024-11-26): hparams/EMMET;
- jianghoucheng/AlphaEdit at f5248d3 (2024-10-17): hparams/AlphaEdit, whose L2 is the ridge;
- scalable-model-editing/knowledge-editing-regularization at 6e3ba9a (2025-05-23): hparams/ENCORE,
  whose update_norm_lambda is norm_weight times the ridge.

EMMET's have changed with time. w multiplies C0, emmet_lambda is added to the Gram matrix, and the
two are MEMIT with lam = w * emmet_lambda, :eq:`bridge-released`:

    2024-03-21  c182001  no emmet_lambda: the equality
    2024-04-20  cf1907f  emmet_lambda 0.1, for a single fact too; w = 1
    2024-05-02  ac0cb39  one layer for EMMET and for MEMIT (lam = 1): 17 in GPT-2 XL, 5 in GPT-J
    2024-08-24  2f7c65c  GPT-2 XL: w = 1000; a single fact is not damped
    2024-12-08  dabbb96  outside of main; GPT-J: w = 10,000

zjunlp/EasyEdit has w = 10,000 for GPT-2 XL and 100,000 for GPT-J since 40654e3 (2024-07-19), and
damps a single fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_edit.editing.more_settings import MEASURED, PUBLISHED

#: Used for a known or unknown model where `SETTINGS` says nothing else: the values shared by
#: MEMIT's and EMMET's released settings for GPT-2 XL (`stop_loss` is a constant of their code).
DEFAULTS: dict[str, Any] = {
    "steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75, "stop_loss": 0.05,
}  # fmt: skip

#: (model type, layers, hidden size) -> preset -> settings.
SETTINGS: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {
    # GPT-2 medium: kmeng01/rome, hparams/ROME/gpt2-medium.json (2022-07-30)
    ("gpt2", 24, 1024): {"ROME": {"layers": (8,), "clamp": 3.0}},
    # GPT-2 large: kmeng01/rome, hparams/ROME/gpt2-large.json (2022-07-30)
    ("gpt2", 36, 1280): {"ROME": {"layers": (12,), "clamp": 4.0}},
    ("gpt2", 48, 1600): {
        # kmeng01/rome, hparams/ROME/gpt2-xl.json (2022-08-05)
        "ROME": {"layers": (17,), "clamp": 4.0},
        # unified-model-editing, hparams/EMMET/gpt2-xl.json (2024-08-24); w = 1000
        "EMMET": {"layers": (17,)},
        "EMMET_RELEASED": {"layers": (17,), "ridge": 100.0},
        # kmeng01/memit, hparams/MEMIT/gpt2-xl.json (2022-10-13)
        "MEMIT": {"layers": (13, 14, 15, 16, 17), "ridge": 20_000.0},
        # AlphaEdit, hparams/AlphaEdit/gpt2-xl.json (110e051, 2024-10-15)
        "AlphaEdit": {"layers": (13, 14, 15, 16, 17), "ridge": 10.0},
        # knowledge-editing-regularization, hparams/ENCORE/gpt2-xl.json (df30617, 2025-05-20)
        "ENCORE": {
            "layers": (13, 14, 15, 16, 17),
            "ridge": 20_000.0,
            "norm_weight": 10 / 20_000,
            "prob_cutoff": -4,
        },
    },
    ("gptj", 28, 4096): {
        # kmeng01/rome, hparams/ROME/EleutherAI_gpt-j-6B.json (2022-07-30)
        "ROME": {"layers": (5,), "clamp": 4.0},
        # unified-model-editing, hparams/EMMET/EleutherAI_gpt-j-6B.json (2024-05-02); w = 1
        "EMMET": {"layers": (5,), "steps": 25},
        "EMMET_RELEASED": {"layers": (5,), "ridge": 0.1, "steps": 25},
        # kmeng01/memit, hparams/MEMIT/EleutherAI_gpt-j-6B.json (2022-10-13)
        "MEMIT": {"layers": (3, 4, 5, 6, 7, 8), "ridge": 15_000.0, "steps": 25},
        # AlphaEdit, hparams/AlphaEdit/EleutherAI_gpt-j-6B.json (110e051, 2024-10-15)
        "AlphaEdit": {"layers": (3, 4, 5, 6, 7, 8), "ridge": 10.0, "steps": 25},
    },
    # atlas, the embedded model: chosen for this project on its own records (benchmarks/); those of
    # AlphaEdit and ENCORE are MEMIT's with the numbers of their papers, and not searched for
    ("gpt2", 6, 192): {
        "ROME": {"layers": (1,), "clamp": 4.0},
        "EMMET": {"layers": (1,), "clamp": 1.25, "stop_loss": 0.02},
        "EMMET_RELEASED": {"layers": (1,), "clamp": 1.25, "stop_loss": 0.02, "ridge": 0.1},
        "MEMIT": {"layers": (0, 1), "clamp": 1.25, "stop_loss": 0.02, "ridge": 1.0},
        "AlphaEdit": {"layers": (0, 1), "clamp": 1.25, "stop_loss": 0.02, "ridge": 1.0},
        "ENCORE": {
            "layers": (0, 1),
            "clamp": 1.25,
            "stop_loss": 0.02,
            "ridge": 1.0,
            "norm_weight": 5e-4,
            "prob_cutoff": -2,
        },
    },
}


def settings_of(kind: str, layers: int, width: int, key: int) -> Mapping[str, Mapping[str, Any]]:
    """Preset -> settings of a model of this shape, `key` being d_k; empty if nothing is known.

    What was measured here comes before what the authors of a method released, and that before what
    others published.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for one in ((kind, layers, width), (kind, layers, width, key)):
        found |= {**PUBLISHED.get(one, {}), **SETTINGS.get(one[:3], {}), **MEASURED.get(one, {})}
    return found
