"""Settings for models that the authors of a method did not have: published by others, or measured.

One shape may stand for several models. Llama-2-7B and Llama-3-8B share type, layers and hidden
size; their keys are 11,008 and 14,336 long, and stand behind in the table. Qwen2-7B and Qwen2.5-7B
have the same shape and the same settings. Read from (beside a row: the last change of its file)

- kmeng01/memit at 80426fd (2022-11-14): hparams/ROME;
- zjunlp/EasyEdit at 14cea82 (2026-07-14): hparams/ROME, MEMIT, EMMET. Its ROME has C0 = I;
- jianghoucheng/AlphaEdit at f5248d3 (2024-10-17): hparams/AlphaEdit, and MEMIT, its baseline;
- scalable-model-editing/knowledge-editing-regularization at 6e3ba9a (2025-05-23): hparams/ENCORE;
- jugechengzi/FE at 4de0dba (2026-05-01): configs/llms;
- ybdai7/EAMET at 1fe317f: of its files only the layers and the weight of C0 are known here, and no
  date; everything else is `settings.DEFAULTS`.

Others have others: layers 7-11 for MEMIT on Qwen2.5-7B (SasyaTitech/NAS at 5acab48, 2026-05-06, and
Euphoria040201/RLSEdit at 6688b89, 2026-07-13), 2-6 on Llama-3.2-3B and, for AlphaEdit, 4-8 on
phi-1.5 (RLSEdit), all with clamp 0.75 and rate 0.1; clamp 10 and 100 steps on Mistral-7B (FE).
Layers 4-8 were copied from model to model (zjunlp/EasyEdit, issue 472). So where figures matter,
and for any model that is not here, `unified_edit.suggest_layers` decides.
"""

from __future__ import annotations

from typing import Any

#: What EasyEdit says of values for all its models since Llama.
_EASY: dict[str, Any] = {"clamp": 4.0, "steps": 25, "weight_decay": 1e-3}
#: What AlphaEdit's repository says of values, for its baseline MEMIT too.
_SLOW: dict[str, Any] = {"learning_rate": 0.1, "steps": 25}

_FOUR_TO_EIGHT = (4, 5, 6, 7, 8)

#: Model type, layers, hidden size; and the length of a key (the width of the MLP) where that alone
#: tells models apart.
Shape = tuple[str, int, int] | tuple[str, int, int, int]

#: Shape -> preset -> settings.
PUBLISHED: dict[Shape, dict[str, dict[str, Any]]] = {
    # GPT-NeoX-20B: kmeng01/memit, hparams/ROME/EleutherAI_gpt-neox-20b.json (2022-10-13)
    ("gpt_neox", 44, 6144): {"ROME": {"layers": (15,), "clamp": 4.0}},
    # Llama-2-7B, and Llama-1 and Vicuna of that shape
    ("llama", 32, 4096, 11008): {
        # EasyEdit, hparams/ROME/llama-7b.yaml (2e84880, 2024-12-01)
        "ROME": {"layers": (5,), **_EASY},
        # EasyEdit, hparams/EMMET/llama-7b.yaml (adffaa0, 2024-07-18); w = 100,000
        "EMMET": {"layers": (5,), **_EASY},
        "EMMET_RELEASED": {"layers": (5,), "ridge": 10_000.0, **_EASY},
        # EasyEdit, hparams/MEMIT/llama-7b.yaml (adffaa0, 2024-07-18)
        "MEMIT": {"layers": _FOUR_TO_EIGHT, "ridge": 15_000.0, **_EASY},
        # knowledge-editing-regularization, hparams/ENCORE/llama2-7b.json (df30617, 2025-05-20)
        "ENCORE": {
            "layers": _FOUR_TO_EIGHT,
            "ridge": 15_000.0,
            "steps": 25,
            "norm_weight": 10 / 15_000,
            "prob_cutoff": -3,
        },
    },
    # Llama-3-8B and 3.1-8B
    ("llama", 32, 4096, 14336): {
        # EasyEdit, hparams/ROME/llama3-8b.yaml (2e5791b, 2024-08-30)
        "ROME": {"layers": (5,), **_EASY},
        # AlphaEdit, hparams/MEMIT/Llama3-8B.json (d04ed2c, 2024-10-01)
        "MEMIT": {"layers": _FOUR_TO_EIGHT, "ridge": 15_000.0, **_SLOW},
        # AlphaEdit, hparams/AlphaEdit/Llama3-8B.json (110e051, 2024-10-15): L2 is 10, as in
        # EasyEdit's for 3.1; EasyEdit's for Llama-3-8B has 1
        "AlphaEdit": {"layers": _FOUR_TO_EIGHT, "ridge": 10.0, **_SLOW},
        # knowledge-editing-regularization, hparams/ENCORE/llama3-8b.json (df30617, 2025-05-20)
        "ENCORE": {
            "layers": _FOUR_TO_EIGHT,
            "ridge": 15_000.0,
            "steps": 25,
            "norm_weight": 20 / 15_000,
            "prob_cutoff": -2,
        },
    },
    # Llama-3.2-3B
    ("llama", 28, 3072): {
        # EasyEdit, hparams/ROME/llama3.2-3b.yaml (4621ad7, 2024-10-27)
        "ROME": {"layers": (5,), **_EASY},
        # EasyEdit, hparams/EMMET/llama3.2-3b.yaml (bc4a7f2, 2025-01-23); w = 100,000
        "EMMET": {"layers": (5,), **_EASY},
        "EMMET_RELEASED": {"layers": (5,), "ridge": 10_000.0, **_EASY},
        # EasyEdit, hparams/MEMIT/llama3.2-3b.yaml (7e35bb1, 2024-12-25)
        "MEMIT": {"layers": _FOUR_TO_EIGHT, "ridge": 15_000.0, **_EASY},
    },
    # Mistral-7B (v0.1 to v0.3)
    ("mistral", 32, 4096): {
        # EasyEdit, hparams/ROME/mistral-7b.yaml (8885dcf, 2024-02-18)
        "ROME": {"layers": (5,), **_EASY},
        # EasyEdit, hparams/MEMIT/mistral-7b.yaml (b56ce8a, 2024-01-19)
        "MEMIT": {"layers": _FOUR_TO_EIGHT, "ridge": 15_000.0, **_EASY},
    },
    # Qwen2-7B and Qwen2.5-7B, whose shapes and settings are the same
    ("qwen2", 28, 3584): {
        # EasyEdit, hparams/ROME/qwen2-7b.yaml (e4ce697, 2024-06-08), qwen2.5-7b.yaml (81fc30a,
        # 2025-07-10)
        "ROME": {"layers": (5,), **_EASY},
        # EasyEdit, hparams/MEMIT/qwen2-7b.yaml (b4c61b3, 2024-06-18), qwen2.5-7b.yaml (81fc30a,
        # 2025-07-10)
        "MEMIT": {"layers": _FOUR_TO_EIGHT, "ridge": 15_000.0, **_EASY},
        # EasyEdit at 14cea82, hparams/AlphaEdit/qwen2.5-7b.yaml
        "AlphaEdit": {"layers": _FOUR_TO_EIGHT, "ridge": 1.0, **_EASY},
    },
    # Qwen2.5-3B: FE, configs/llms/qwen2.5-3b.yaml (d4fe901, 2025-09-25)
    ("qwen2", 36, 2048): {
        "MEMIT": {"layers": _FOUR_TO_EIGHT, "ridge": 15_000.0, "steps": 25, "learning_rate": 0.01},
    },
    # Qwen2.5-14B: FE, configs/llms/qwen2.5-14b.yaml (2e25dbd, 2025-11-24)
    ("qwen2", 48, 5120): {
        "MEMIT": {"layers": (9, 10, 11, 12, 13), "ridge": 15_000.0, **_SLOW},
    },
    # phi-1.5, Gemma-7B (the first, without a norm behind the MLP) and Falcon-7B: EAMET at 1fe317f
    ("phi", 24, 2048): {"MEMIT": {"layers": (3, 4), "ridge": 2_000.0}},
    ("gemma", 28, 3072): {"MEMIT": {"layers": (3, 4), "ridge": 4_000.0}},
    ("falcon", 32, 4544): {"MEMIT": {"layers": (3, 4), "ridge": 5_000.0}},
}

#: Shape -> preset -> settings that were measured here, each with the command and the seed; on
#: records that no figure of the book is scored on.
MEASURED: dict[Shape, dict[str, dict[str, Any]]] = {
    # SmolLM2-135M: benchmarks/suggest_smollm2.py, seed 0, on records 150 to 249 of CounterFact,
    # into book/data/smollm2_sweep.json; then benchmarks/real_edits.py. On eight records layers 0, 3
    # and 4 are alike within two neighbours of 80, and the first clamp is enough; layer 0 is ahead
    # by a little on 24 others (S .872 against .841, singly). Layer 3 is taken of the three because
    # MEMIT's window ends there, so that all methods write at one place.
    ("llama", 30, 576): {
        "ROME": {"layers": (3,), "clamp": 4.0},
        "EMMET": {"layers": (3,)},
        "EMMET_RELEASED": {"layers": (3,), "ridge": 100.0},
        "MEMIT": {"layers": (1, 2, 3), "ridge": 100.0},
    },
    # Gemma 3 270M, behind whose MLPs a norm stands: benchmarks/gemma3.py, seed 0, on records 150 to
    # 169, into book/data/gemma3.json (layers 0 to 8 singly; layers 2 and 3 and the clamps are alike
    # within two neighbours). What its MLPs give is short: a rate of .5 would be too coarse a step.
    ("gemma3_text", 18, 640): {"EMMET": {"layers": (2,), "clamp": 1.0, "learning_rate": 0.05}},
}
