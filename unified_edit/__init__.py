"""Model editing from one objective: ROME, EMMET and MEMIT on GPT-2, Llama and their relatives.

>>> import unified_edit as ue                                              # doctest: +SKIP
>>> model, tokenizer = ue.load_model("atlas")                              # doctest: +SKIP
>>> fact = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome")  # doctest: +SKIP
>>> edit = ue.edit(model, tokenizer, [fact], method=ue.EMMET)              # doctest: +SKIP
>>> edit.undo()                                                            # doctest: +SKIP

Nothing is imported before it is asked for: `import unified_edit` costs milliseconds, and what one
does not use (figures, exercises) costs nothing at all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_edit import concepts, errors, objective, relations
    from unified_edit.editing import (
        ALPHAEDIT,
        EMMET,
        EMMET_RELEASED,
        ENCORE,
        MEMIT,
        MEMIT_REPLAY,
        METHODS,
        P_ROME,
        PMET,
        R_ROME,
        ROME,
        ROME_RELEASED,
        Contexts,
        Edit,
        Editor,
        HookLayers,
        Method,
        Preserve,
        edit,
        fine_tune,
        load_model,
        null_space,
        optimise_values,
    )
    from unified_edit.errors import UnifiedEditError
    from unified_edit.facts import Fact, Probe, Record, read_facts, read_records
    from unified_edit.measuring import (
        Grid,
        ask,
        compare,
        complete,
        evaluate,
        evaluate_batches,
        evaluate_edits,
        evaluate_made,
        figures,
        harness_scores,
        load_records,
        locate,
        suggest_layers,
        sweep,
    )
    from unified_edit.objective import Budget
    from unified_edit.running import RunState, run
    from unified_edit.statistics import KeyStatistics
    from unified_edit.teaching import exercises, sliders

    __version__: str

#: Floor of the house -> the public names that come from it.
_FLOORS = {
    "editing": (
        "ALPHAEDIT EMMET EMMET_RELEASED ENCORE MEMIT MEMIT_REPLAY METHODS PMET P_ROME ROME "
        "ROME_RELEASED R_ROME Contexts Edit Editor HookLayers Method Preserve edit fine_tune "
        "load_model null_space optimise_values"
    ),
    "errors": "UnifiedEditError",
    "facts": "Fact Probe Record read_facts read_records",
    "measuring": (
        "Grid ask compare complete evaluate evaluate_batches evaluate_edits evaluate_made "
        "harness_scores load_records locate suggest_layers sweep"
    ),
    "objective": "Budget",
    "running": "RunState run",
    "statistics": "KeyStatistics",
}
_FLOOR_OF = {name: floor for floor, names in _FLOORS.items() for name in names.split()}
#: Public module -> its place in the house.
_MODULES = {
    "concepts": "concepts",
    "errors": "errors",
    "exercises": "teaching.exercises",
    "figures": "measuring.figures",
    "objective": "objective",
    "relations": "relations",
    "sliders": "teaching.sliders",
}

__all__ = sorted([*_FLOOR_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import what a public name stands for when it is first asked for."""
    if name in _MODULES:
        value = import_module(f"unified_edit.{_MODULES[name]}")
    elif name in _FLOOR_OF:
        value = getattr(import_module(f"unified_edit.{_FLOOR_OF[name]}"), name)
    elif name == "__version__":
        value = import_module("importlib.metadata").version("unified_edit")
    else:
        raise AttributeError(f"module 'unified_edit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
