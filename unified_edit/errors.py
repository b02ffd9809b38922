"""Every error the library raises on purpose.

Each message says what was wrong, where, and what to do about it. All classes derive from
`UnifiedEditError`, so one `except` catches what the library foresaw and nothing else.
"""

from __future__ import annotations


class UnifiedEditError(Exception):
    """Base of all errors that the library raises on purpose."""


class FactError(UnifiedEditError, ValueError):
    """A fact or record is malformed: subject not in the prompt, an empty target, no facts."""


class FactFileError(FactError):
    """A file of facts cannot be read; the message names the file and the line."""


class ContradictionError(FactError):
    """Two facts of one batch give the same prompt and subject different targets."""


class SharedSubjectError(FactError):
    """Two facts of one equality batch share a subject, so that their keys may be identical."""


class TokenizationError(FactError):
    """Tokens of a subject or a target cannot be found in the encoded prompt."""


class ObjectiveError(UnifiedEditError, ValueError):
    """Matrices given to the objective have wrong shapes or entries."""


class InfeasibleError(ObjectiveError):
    """`Delta K = R` cannot be held: the keys are (numerically) linearly dependent."""


class NotPositiveDefiniteError(ObjectiveError):
    """C0 has no Cholesky factor: too few tokens, or a direction that never occurred."""


class NullSpaceError(NotPositiveDefiniteError):
    """Keys have entries in coordinates in which no preserved key has one.

    `facts` are the columns of those keys.
    """

    def __init__(self, message: str, facts: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.facts = facts


class MethodError(UnifiedEditError, ValueError):
    """A method lacks a setting for this model, or a setting is out of range."""


class ModelError(UnifiedEditError, ValueError):
    """The model cannot be edited: unknown family, wrapped, quantised, offloaded, NaN weights."""


class ModelChangedError(ModelError):
    """A weight is not what the ledger left there: somebody else changed it."""


class StatisticsError(UnifiedEditError, ValueError):
    """Key statistics are missing, too small, or were made from something else."""


class StatisticsFileError(StatisticsError):
    """A statistics file is corrupt, truncated, or not one of ours."""


class EditError(UnifiedEditError, RuntimeError):
    """An edit failed or had no effect; the model is as it was before."""


class EditFileError(EditError, ValueError):
    """An edit file is corrupt, truncated, not one of ours, or made for another model."""


class RelationError(UnifiedEditError, ValueError):
    """A linear relation cannot be made or used: too few pairs, unknown subjects, a singular W."""


class RelationFileError(RelationError):
    """A file of relations or of their scores is damaged, not one of ours, or of another model."""


class ReportFileError(UnifiedEditError, ValueError):
    """A file of answers is damaged, not one of ours, or was made from something else."""


class RunFolderError(UnifiedEditError, ValueError):
    """The folder of a run was begun with something else, is damaged, or cannot be written."""


def quote(text: str, width: int = 80) -> str:
    """`text` in quotes, shortened to about `width` characters, for messages."""
    return repr(text if len(text) <= width else text[: width - 3] + "...")


def brief(value: object, width: int = 40) -> str:
    """The first `width` characters or so of `repr(value)`, for messages."""
    try:
        text = repr(value)
    except Exception:  # too many digits, too deep, or a class whose repr fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= width else text[: width - 3] + "..."
