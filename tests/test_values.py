"""Values on atlas against the literal transcription in `reference.py`.

In a file of their own, because these are the slowest tests, and a file goes to one process.
"""

from __future__ import annotations

import pytest
import reference
from recipe import FACTS, contexts, relative

import unified_edit as ue
from unified_edit.editing.editor import optimise_values
from unified_edit.model.anatomy import anatomy
from unified_edit.model.ledger import ledger_of


# ROME's facts need all steps at its own limit; at this one they stop at different steps
@pytest.mark.equation("value-loss", "value-clamp")
@pytest.mark.parametrize(
    "method",
    [ue.ROME.replace(stop_loss=0.2), ue.EMMET.replace(stop_loss=0.05)],
    ids=lambda m: m.name,
)
def test_values(precise, method):
    model, double, tokenizer, tolerance = precise
    method = method.replace(layers=(1,)).resolve(anatomy(model))
    values = optimise_values(model, tokenizer, FACTS, method)
    prefixes = ledger_of(model).prefixes(tokenizer, method.contexts, seed=0)
    stopped = set()
    for column, fact in enumerate(FACTS):
        wanted = reference.value(
            double, tokenizer, fact.prompt, fact.subject, fact.target_new, contexts(prefixes),
            layer=1, site=method.site, steps=method.steps, lr=method.learning_rate,
            clamp=method.clamp, weight_decay=method.weight_decay, kl_weight=method.kl_weight,
            stop_loss=method.stop_loss,
        )  # fmt: skip
        assert len(values.losses[column]) == len(wanted.losses)
        stopped.add(len(wanted.losses))
        assert values.losses[column] == pytest.approx(wanted.losses, rel=tolerance)
        assert relative(values.target_init[:, column], wanted.target_init) <= tolerance
        assert relative(values.delta[:, column], wanted.delta) <= tolerance
    assert len(stopped) > 1, "the facts must stop at different steps for this test to mean much"


def test_values_do_not_depend_on_the_batch(atlas):
    model, tokenizer = atlas
    method = ue.EMMET.replace(layers=(1,))
    together = optimise_values(model, tokenizer, FACTS, method)
    for column, fact in enumerate(FACTS):
        alone = optimise_values(model, tokenizer, [fact], method)
        assert len(alone.losses[0]) == len(together.losses[column])
        assert relative(together.delta[:, column], alone.delta[:, 0]) <= 1e-4
