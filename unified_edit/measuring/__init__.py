"""Measuring: what a model says before and after, and where it keeps what it says."""

from unified_edit.measuring import figures, grid_figures
from unified_edit.measuring.asking import ask, compare
from unified_edit.measuring.batches import BatchReport, evaluate_batches
from unified_edit.measuring.evaluation import evaluate, evaluate_edits
from unified_edit.measuring.generation import Generation, complete, ngram_entropy
from unified_edit.measuring.grid import Cell, Grid, read_grid
from unified_edit.measuring.grid_figures import draw_sweep
from unified_edit.measuring.grid_runs import sweep
from unified_edit.measuring.grid_table import Sweep
from unified_edit.measuring.grid_workers import sweep_in_processes
from unified_edit.measuring.harness import harness_scores
from unified_edit.measuring.made_edits import evaluate_made
from unified_edit.measuring.questions import Question, Sheet
from unified_edit.measuring.record_sets import load_records
from unified_edit.measuring.references import reference_scores
from unified_edit.measuring.report import Report, to_table
from unified_edit.measuring.scores import Score, harmonic_mean, summarise
from unified_edit.measuring.suggesting import Suggestion, suggest_layers
from unified_edit.measuring.traced_runs import Prompt, read_prompt
from unified_edit.measuring.traces import END, FIRST, LAST, PLACES, Average, Trace, TracedFact
from unified_edit.measuring.tracing import locate, subject_sigma

__all__ = (
    "END FIRST LAST PLACES Average BatchReport Cell Generation Grid Prompt Question Report Score "
    "Sheet Suggestion Sweep Trace TracedFact ask compare complete draw_sweep evaluate "
    "evaluate_batches evaluate_edits evaluate_made figures grid_figures harmonic_mean "
    "harness_scores load_records locate ngram_entropy read_grid read_prompt reference_scores "
    "subject_sigma suggest_layers summarise sweep sweep_in_processes to_table"
).split()
