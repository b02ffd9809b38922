"""Methods of other papers, as data: what each changes in ROME or MEMIT, and where that was read.

Their released settings stand in `settings` and `more_settings`. What runs is this library's one
loop: agreement with their formulas and codes is in `tests/test_presets.py`.
"""

from __future__ import annotations

from unified_edit.editing.methods import EMMET, EMMET_RELEASED, MEMIT, ROME

#: ROME as its code was released (kmeng01/rome 0874014, 2022-10-14, rome/compute_u.py and
#: compute_v.py): the row is that of k*, the mean over contexts, but the update is divided by, and
#: held at, the key of the bare prompt. Where the two differ much it explodes ("disabling edits").
ROME_RELEASED = ROME.replace(name="ROME_RELEASED", divisor_mean="bare")
#: r-ROME (arXiv 2403.07175) as released (scalable-model-editing/rebuilding-rome 4095d04,
#: 2024-04-18, `enable_random_prefix_keys`): k* everywhere. Its residual is target_init + delta -
#: mean of W k, so that W' k* is v* to the letter, where `ROME` adds to W k* what was optimised.
R_ROME = ROME.replace(name="r-ROME", output_mean="plain")
#: p-ROME, from the same code (`enable_prompt_keys`): the bare prompt's key everywhere. Values are
#: still found in all contexts.
P_ROME = ROME.replace(name="p-ROME", key_mean="bare")
#: MEMIT with the shares of PMET (arXiv 2308.08742; xpq-tech/PMET 80643f2): sqrt(layers left) for
#: their number. Values are MEMIT's: PMET optimises attention's output beside them, and drops it.
PMET = MEMIT.replace(name="PMET", distribution="pmet")
#: MEMIT by forward replay (arXiv 2605.00358; jugechengzi/FE 4de0dba, 2026-05-01, FE-memit_main.py):
#: values at the first edited layer, a target for each layer, and no shares.
MEMIT_REPLAY = MEMIT.replace(name="FE-MEMIT", distribution="replay")
#: AlphaEdit (arXiv 2410.02355, eq. 14; jianghoucheng/AlphaEdit f5248d3, 2024-10-17,
#: AlphaEdit_main.py): MEMIT's loop in the null space of C0, the ridge being its L2. With
#: history="soft" it is the sequential form. Its code adds to the history the keys behind a batch.
ALPHAEDIT = MEMIT.replace(name="AlphaEdit", preset="AlphaEdit", preservation="null_space")
#: ENCORE (arXiv 2502.01636; scalable-model-editing/knowledge-editing-regularization 6e3ba9a,
#: 2025-05-23, encore): MEMIT that stops once the target is the likeliest, with a penalty on
#: ||Delta||; its history is history="soft".
ENCORE = MEMIT.replace(name="ENCORE", preset="ENCORE", norm_weight=None, prob_cutoff=None)

# LyapLock (arXiv 2505.15702) is none of these: its lam rises from batch to batch, so that it is
# MEMIT in an ``Editor(..., history="soft", budget=Budget())``.

#: By name, for the command line.
METHODS = {
    method.name: method
    for method in (
        ROME, EMMET, MEMIT, EMMET_RELEASED,
        ROME_RELEASED, R_ROME, P_ROME, PMET, MEMIT_REPLAY, ALPHAEDIT, ENCORE,
    )
}  # fmt: skip
