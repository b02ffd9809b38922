"""Whether there was enough text."""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

#: Halves of a text that disagree by no more on fresh keys say that there was enough.
CONVERGED = 0.1


def warn(agreement: Mapping[int, float], tokens: int, widths: Mapping[int, int]) -> None:
    """Say of which layers it is not settled; each has `widths` entries in a key."""
    for layer, found in agreement.items():
        if found != found:
            log.warning(
                "C0 of layer %d: %d tokens are too few to tell whether it has converged (each "
                "half of the text needs d_k = %d at least); more text makes edits more specific",
                layer,
                tokens,
                widths[layer],
            )
        elif not found <= CONVERGED:
            log.warning(
                "C0 of layer %d has not converged: halves of the text disagree by %.3g on fresh "
                "keys (%g is converged); more text makes edits more specific",
                layer,
                found,
                CONVERGED,
            )
