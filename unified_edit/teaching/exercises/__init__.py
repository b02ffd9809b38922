"""Checks for the book's exercises: ``ue.exercises.check_...(your_function)``.

A check runs your function on small examples. It returns a sentence that begins with "Right." when
all is well, and raises `ExerciseError` with what is wrong otherwise. Nothing of it is needed to
edit models, and it is only imported when you ask for it.
"""

from unified_edit.teaching.exercises.a_fact import check_contribution, check_mean_logp
from unified_edit.teaching.exercises.batches import check_held_and_weighed
from unified_edit.teaching.exercises.big_models import check_merged_scores
from unified_edit.teaching.exercises.breaks import check_overlap
from unified_edit.teaching.exercises.bridge import check_bridge, check_filter, check_frontier
from unified_edit.teaching.exercises.checking import ExerciseError
from unified_edit.teaching.exercises.concepts import check_concept_weight, check_spill
from unified_edit.teaching.exercises.emmet import check_batch_equality, check_feasible
from unified_edit.teaching.exercises.four_corners import check_projected
from unified_edit.teaching.exercises.hook_layers import check_gated
from unified_edit.teaching.exercises.judging import check_harmonic, check_paraphrase_score
from unified_edit.teaching.exercises.locating import (
    check_average_effect,
    check_noise_scale,
    check_restore,
)
from unified_edit.teaching.exercises.mass_editing import check_one_more
from unified_edit.teaching.exercises.memit import (
    check_least_squares,
    check_next_batch,
    check_written_share,
)
from unified_edit.teaching.exercises.memory import (
    check_add_association,
    check_associative_memory,
    check_crosstalk,
)
from unified_edit.teaching.exercises.one_fact import check_apart
from unified_edit.teaching.exercises.preserving import (
    check_rarities,
    check_second_moment,
    check_shrink,
)
from unified_edit.teaching.exercises.real_edits import check_paired_interval
from unified_edit.teaching.exercises.real_locating import check_resampled_interval
from unified_edit.teaching.exercises.real_model import check_smallest_strength
from unified_edit.teaching.exercises.relations import check_object_state, check_subject_step
from unified_edit.teaching.exercises.rome import (
    check_errors_in_turn,
    check_mixed_cost,
    check_rank_one,
)
from unified_edit.teaching.exercises.spreading import check_best_shares, check_parts
from unified_edit.teaching.exercises.the_objective import (
    check_move,
    check_objective_errors,
    check_strip,
)
from unified_edit.teaching.exercises.value import check_kl, check_project, check_value_loss
from unified_edit.teaching.exercises.where_this_goes import (
    check_gradient_update,
    check_low_curvature,
)

__all__ = [
    "ExerciseError",
    "check_add_association",
    "check_apart",
    "check_associative_memory",
    "check_average_effect",
    "check_batch_equality",
    "check_best_shares",
    "check_bridge",
    "check_concept_weight",
    "check_contribution",
    "check_crosstalk",
    "check_errors_in_turn",
    "check_feasible",
    "check_filter",
    "check_frontier",
    "check_gated",
    "check_gradient_update",
    "check_harmonic",
    "check_held_and_weighed",
    "check_kl",
    "check_least_squares",
    "check_low_curvature",
    "check_mean_logp",
    "check_merged_scores",
    "check_mixed_cost",
    "check_move",
    "check_next_batch",
    "check_noise_scale",
    "check_object_state",
    "check_objective_errors",
    "check_one_more",
    "check_overlap",
    "check_paired_interval",
    "check_paraphrase_score",
    "check_parts",
    "check_project",
    "check_projected",
    "check_rank_one",
    "check_rarities",
    "check_resampled_interval",
    "check_restore",
    "check_second_moment",
    "check_shrink",
    "check_smallest_strength",
    "check_spill",
    "check_strip",
    "check_subject_step",
    "check_value_loss",
    "check_written_share",
]
