"""Checks for the book's exercises: ``ue.exercises.check_...(your_function)``.

A check runs your function on small examples. It returns a sentence that begins with "Right." when
all is well, and raises `ExerciseError` with what is wrong otherwise. Nothing of it is needed to
edit models, and it is only imported when you ask for it.
"""

from unified_edit.exercises._check import ExerciseError
from unified_edit.exercises.a_fact import (
    check_harmonic,
    check_mean_logp,
    check_paraphrase_score,
)
from unified_edit.exercises.locating import (
    check_average_effect,
    check_noise_scale,
    check_restore,
)
from unified_edit.exercises.preserving import (
    check_rarities,
    check_second_moment,
    check_shrink,
)

__all__ = [
    "ExerciseError",
    "check_average_effect",
    "check_harmonic",
    "check_mean_logp",
    "check_noise_scale",
    "check_paraphrase_score",
    "check_rarities",
    "check_restore",
    "check_second_moment",
    "check_shrink",
]
