"""The objective and its solutions: tensors in, tensors out; no model is known here."""

from unified_edit.objective.exact_product import matmul
from unified_edit.objective.feasibility import CONDITION_LIMIT, Feasibility, feasible
from unified_edit.objective.held import Held
from unified_edit.objective.metric import Metric, MetricProtocol
from unified_edit.objective.solver import EQUALITY_TOLERANCE, Diagnosis, Update, solve

__all__ = (
    "CONDITION_LIMIT EQUALITY_TOLERANCE Diagnosis Feasibility Held Metric MetricProtocol Update "
    "feasible matmul solve"
).split()
