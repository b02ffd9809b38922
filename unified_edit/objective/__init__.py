"""The objective and its solutions: tensors in, tensors out; no model is known here."""

from unified_edit.objective.budget import Budget
from unified_edit.objective.divided import divided
from unified_edit.objective.exact_product import matmul
from unified_edit.objective.feasibility import CONDITION_LIMIT, Feasibility, feasible
from unified_edit.objective.held import Held
from unified_edit.objective.metric import Metric, MetricProtocol
from unified_edit.objective.null_space import ALPHAEDIT_THRESHOLD, NullSpace
from unified_edit.objective.solver import EQUALITY_TOLERANCE, solve
from unified_edit.objective.update import Diagnosis, Update

__all__ = (
    "ALPHAEDIT_THRESHOLD CONDITION_LIMIT EQUALITY_TOLERANCE Budget Diagnosis Feasibility Held "
    "Metric "
    "MetricProtocol NullSpace Update divided feasible matmul solve"
).split()
