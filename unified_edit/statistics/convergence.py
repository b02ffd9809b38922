"""Whether there was enough text: what is refused while its cause is known, and what is said."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unified_edit.statistics.key_statistics import KeyStatistics

log = logging.getLogger(__name__)


def look_at(made: KeyStatistics, unsure: Iterable[int]) -> None:
    """Refuse what has no Cholesky factor, of the layers that are `unsure`; say what is not settled.

    Raises StatisticsError for a C0 that is singular.
    """
    for layer in sorted(unsure):
        made.metric(layer)
    for layer, agreement in made.agreement.items():
        if agreement != agreement:
            log.warning(
                "C0 of layer %d: %d tokens are too few to tell whether it has converged (each "
                "half of the text needs d_k = %d at least); more text makes edits more specific",
                layer,
                made.source.tokens,
                made.width(layer),
            )
        elif not agreement <= 0.1:
            log.warning(
                "C0 of layer %d has not converged: halves of the text disagree by %.3g on fresh "
                "keys (0.1 is converged); more text makes edits more specific",
                layer,
                agreement,
            )
