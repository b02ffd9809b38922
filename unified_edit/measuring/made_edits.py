"""Measuring edits that somebody else makes: fine-tuning, or a method of the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from unified_edit.arguments import whole_number
from unified_edit.editing.edits import Edit
from unified_edit.errors import EditError, MethodError, brief
from unified_edit.facts import Fact, Record
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import Report, to_table
from unified_edit.measuring.scores import AFTER, BEFORE, check_bootstrap
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.progress import progress


def evaluate_made(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[Record] | Record,
    make: Callable[[list[Fact]], Edit | None],
    *,
    batch_size: int = 1,
    seed: int = 0,
    bootstrap: int = 2000,
) -> Report:
    """`evaluate_edits` for edits that are made by a function: of `fine_tune`, or of one's own.

    >>> tuned = lambda facts: ue.fine_tune(model, tokenizer, facts, layer=3, norm=5e-4)
    ...                                                                       # doctest: +SKIP
    >>> evaluate_made(model, tokenizer, records, tuned, batch_size=100)       # doctest: +SKIP

    make: is given the facts of `batch_size` consecutive records, with the model as its base, and
        gives an `Edit` of that model, applied or not, or None where the model shall be measured as
        it is. Each batch is measured with that edit alone, then it is undone.
    seed: of the bootstrap.

    Edits active when it is called are taken out meanwhile and put back bit for bit, also on
    failure. Raises what `evaluate` and `make` raise, and EditError if `make` gives anything else.
    """
    bootstrap, seed = check_bootstrap(bootstrap), whole_number(seed, "seed", MethodError, least=0)
    size = whole_number(batch_size, "batch_size", MethodError, least=1)
    sheet, ledger = Sheet.of(model, tokenizer, records), ledger_of(model)
    everything = range(len(sheet.records))
    batches = [everything[start : start + size] for start in everything[::size]]
    with quiet(model), ledger.base_state():
        rows = sheet.rows(BEFORE, everything)
        with progress("editing and evaluating", len(batches), "batch") as bar:
            for batch in batches:
                with ledger.state_kept():
                    made = make([sheet.records[index].fact for index in batch])
                    if made is not None and not isinstance(made, Edit):
                        raise EditError(
                            f"make gave {brief(made)} for records {list(batch)[:3]}; it must give "
                            "an Edit, or None where nothing is to be edited"
                        )
                    if made is not None and not made.is_applied:
                        made.apply(model)
                    rows += sheet.rows(AFTER, batch)
                bar.update()
    return Report(to_table(rows), bootstrap, seed)
