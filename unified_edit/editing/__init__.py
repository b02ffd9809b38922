"""Editing: methods, keys, values, and what is written into a model with them."""

from unified_edit.editing.anchors import norm_anchor_of
from unified_edit.editing.choices import Choice
from unified_edit.editing.consecutive import Undone
from unified_edit.editing.editor import Editor
from unified_edit.editing.edits import Edit
from unified_edit.editing.fine_tuning import fine_tune
from unified_edit.editing.hook_layers import HookLayers
from unified_edit.editing.hook_measures import Opened
from unified_edit.editing.hook_writing import HookBatch
from unified_edit.editing.hooks_beside import HookSettings
from unified_edit.editing.kept import Kept
from unified_edit.editing.keys import (
    KEY_MEANS,
    SITES,
    compute_keys,
    context_weights,
    read_values,
)
from unified_edit.editing.methods import (
    EMMET,
    EMMET_RELEASED,
    MEMIT,
    ROME,
    Method,
)
from unified_edit.editing.more_settings import MEASURED, PUBLISHED
from unified_edit.editing.named import Preserve
from unified_edit.editing.one_call import edit, optimise_values
from unified_edit.editing.opening import load_model
from unified_edit.editing.plans import Plan
from unified_edit.editing.prefixes import Contexts, sample_prefixes
from unified_edit.editing.preservations import PRESERVATIONS, null_space
from unified_edit.editing.presets import (
    ALPHAEDIT,
    ENCORE,
    MEMIT_REPLAY,
    METHODS,
    P_ROME,
    PMET,
    R_ROME,
    ROME_RELEASED,
)
from unified_edit.editing.provenance import Outcome, Provenance, Spent, Touched
from unified_edit.editing.settings import DEFAULTS, SETTINGS
from unified_edit.editing.spreading import SPREADS, Spread, shares
from unified_edit.editing.tuning import FineTuning
from unified_edit.editing.values import Values, compute_values
from unified_edit.editing.values_cache import values_for

__all__ = (
    "ALPHAEDIT DEFAULTS EMMET EMMET_RELEASED ENCORE KEY_MEANS MEASURED MEMIT MEMIT_REPLAY METHODS "
    "PMET PRESERVATIONS PUBLISHED P_ROME ROME ROME_RELEASED R_ROME SETTINGS SITES SPREADS Choice "
    "Contexts Edit Editor FineTuning HookBatch HookLayers HookSettings Kept Method Opened Outcome "
    "Plan Preserve Provenance Spent Spread Touched Undone Values compute_keys compute_values "
    "context_weights edit fine_tune load_model norm_anchor_of null_space optimise_values "
    "read_values sample_prefixes shares values_for"
).split()
