"""Model editing from one objective: ROME, EMMET and MEMIT on GPT-2 and GPT-J.

>>> import unified_edit as ue                                              # doctest: +SKIP
>>> model, tokenizer = ue.load_model("atlas")                              # doctest: +SKIP
>>> fact = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome")  # doctest: +SKIP
>>> edit = ue.edit(model, tokenizer, [fact], method=ue.EMMET)              # doctest: +SKIP
>>> edit.undo()                                                            # doctest: +SKIP
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from unified_edit import errors, figures, objective
from unified_edit.editor import Editor, edit, optimise_values
from unified_edit.edits import Edit
from unified_edit.errors import UnifiedEditError
from unified_edit.evaluation import ask, compare, evaluate, evaluate_edits
from unified_edit.facts import Fact, Probe, Record
from unified_edit.key_statistics import KeyStatistics
from unified_edit.methods import EMMET, EMMET_RELEASED, MEMIT, METHODS, ROME, Contexts, Method
from unified_edit.models import load_model
from unified_edit.readers import load_records, read_facts, read_records
from unified_edit.tracing import locate

if TYPE_CHECKING:
    from unified_edit import exercises

__version__ = version("unified_edit")

__all__ = [
    "EMMET",
    "EMMET_RELEASED",
    "MEMIT",
    "METHODS",
    "ROME",
    "Contexts",
    "Edit",
    "Editor",
    "Fact",
    "KeyStatistics",
    "Method",
    "Probe",
    "Record",
    "UnifiedEditError",
    "ask",
    "compare",
    "edit",
    "errors",
    "evaluate",
    "evaluate_edits",
    "exercises",
    "figures",
    "load_model",
    "load_records",
    "locate",
    "objective",
    "optimise_values",
    "read_facts",
    "read_records",
]


def __getattr__(name: str) -> Any:
    """Import what is seldom needed when it is first asked for."""
    if name == "exercises":
        return import_module("unified_edit.exercises")
    raise AttributeError(f"module 'unified_edit' has no attribute {name!r}")
