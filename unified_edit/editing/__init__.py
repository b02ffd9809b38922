"""Editing: methods, keys, values, and what is written into a model with them."""

from unified_edit.editing.choices import Choice
from unified_edit.editing.editor import Editor, edit, optimise_values
from unified_edit.editing.edits import Edit
from unified_edit.editing.fine_tuning import fine_tune
from unified_edit.editing.hook_layers import HookLayers
from unified_edit.editing.hook_measures import Opened
from unified_edit.editing.hook_writing import HookBatch
from unified_edit.editing.hooks_beside import HookSettings
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
    METHODS,
    PRESERVATIONS,
    ROME,
    Method,
)
from unified_edit.editing.more_settings import MEASURED, PUBLISHED
from unified_edit.editing.opening import load_model
from unified_edit.editing.plans import Plan
from unified_edit.editing.prefixes import Contexts, sample_prefixes
from unified_edit.editing.provenance import Outcome, Provenance, Touched
from unified_edit.editing.settings import DEFAULTS, SETTINGS
from unified_edit.editing.spreading import SPREADS, shares
from unified_edit.editing.tuning import FineTuning
from unified_edit.editing.values import Values, compute_values
from unified_edit.editing.values_cache import values_for

__all__ = (
    "DEFAULTS EMMET EMMET_RELEASED KEY_MEANS MEASURED MEMIT METHODS PRESERVATIONS PUBLISHED ROME "
    "SETTINGS SITES SPREADS Choice Contexts Edit Editor FineTuning HookBatch HookLayers Method "
    "HookSettings Opened Outcome Plan Provenance Touched Values compute_keys compute_values "
    "context_weights edit fine_tune load_model optimise_values read_values sample_prefixes shares "
    "values_for"
).split()
