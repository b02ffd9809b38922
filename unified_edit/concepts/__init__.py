"""Concepts in text-to-image models: the same objective at their cross-attention."""

from unified_edit.concepts.concept_edits import ConceptEdit, active_edits
from unified_edit.concepts.concept_files import Round
from unified_edit.concepts.concept_methods import (
    DEBIAS,
    ERASE,
    ERASE_STYLE,
    METHODS,
    MODERATE,
    OBJECT_PHRASINGS,
    STYLE_PHRASINGS,
    Balance,
    ConceptMethod,
)
from unified_edit.concepts.cross_attention import cross_attention
from unified_edit.concepts.debiasing import debias
from unified_edit.concepts.encoding import concept_keys
from unified_edit.concepts.erasing import edit_concepts
from unified_edit.concepts.opening import load_pipeline
from unified_edit.concepts.solving import preserved_metric, solve_concepts

__all__ = (
    "DEBIAS ERASE ERASE_STYLE METHODS MODERATE OBJECT_PHRASINGS STYLE_PHRASINGS Balance "
    "ConceptEdit ConceptMethod Round active_edits concept_keys cross_attention debias "
    "edit_concepts load_pipeline preserved_metric solve_concepts"
).split()
