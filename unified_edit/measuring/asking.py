"""Asking a model about prompts: what it says next, and how probable it finds what one expects.

The model is left bit for bit as it was found, also on failure; it runs in evaluation mode without
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, whole_number
from unified_edit.editing.edits import Edit
from unified_edit.errors import EditError, FactError, MethodError, brief
from unified_edit.facts.facts import clean_text
from unified_edit.measuring.scores import AFTER, BEFORE
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.likelihoods import likelihoods, next_token
from unified_edit.model.prompts import Encoder

if TYPE_CHECKING:
    import pandas as pd


def ask(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: str | Sequence[str], k: int = 5
) -> pd.DataFrame:
    """The `k` most probable next tokens after each prompt, by the model as it is.

    Columns: prompt, rank (from 1), token (its text, with the blank in front that belongs to it),
    probability. Outer whitespace of a prompt is dropped: a blank at its end would be a token of
    its own, after which the model expects something else.

    Raises FactError for no or empty prompts, MethodError for k < 1, and what `anatomy` raises.
    """
    import pandas as pd

    number = whole_number(k, "k", MethodError, least=1, advice="Ask for at least one token")
    parts = anatomy(model)
    texts = checked_texts(prompts, "prompts")
    rows = Encoder(tokenizer, parts).prompts(texts)
    lines = []
    for text, distribution in zip(texts, next_token(parts, rows), strict=True):
        top = distribution.topk(min(number, len(distribution)))
        for place, (value, token) in enumerate(zip(*map(list, top), strict=True)):
            lines.append((text, place + 1, tokenizer.decode([int(token)]), float(value)))
    return pd.DataFrame(lines, columns=["prompt", "rank", "token", "probability"])


def compare(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    targets: str | Sequence[str],
    edits: Edit | Sequence[Edit] | None = None,
) -> pd.DataFrame:
    """Probabilities of each target after each prompt, before and after editing.

    One row a (prompt, target); columns prompt, target, tokens (how many the target has), before
    and after. Both are P = exp(mean token log-probability), the geometric mean of the
    probabilities of the target's tokens, so that targets of different length can be compared;
    for a target of one token it is its probability. "before" is the base model, without any
    edit. "after" is the model as it is, or, with `edits`, the base with exactly those, whether
    they are applied at the moment or not.

    Raises FactError for no or empty prompts or targets, TokenizationError, and what
    `Edit.apply` raises.
    """
    import pandas as pd

    parts, ledger = anatomy(model), ledger_of(model)
    given = [] if edits is None else as_list(edits)
    if not all(isinstance(one, Edit) for one in given):
        raise EditError(f"edits is {brief(edits)}; give an Edit or a list of them, or nothing")
    pairs = [
        (prompt, target)
        for prompt in checked_texts(prompts, "prompts")
        for target in checked_texts(targets, "targets")
    ]
    asked = Encoder(tokenizer, parts).continuations(pairs)
    with quiet(model):
        with ledger.base_state():
            before = likelihoods(parts, asked)
        with ledger.state_kept():
            if edits is not None:
                ledger.activate(())
                for one in given:
                    one.apply(model)
            after = likelihoods(parts, asked) if ledger.active else before
    return pd.DataFrame(
        {
            "prompt": prompt,
            "target": target,
            "tokens": len(row.target),
            BEFORE: old.probability,
            AFTER: new.probability,
        }
        for (prompt, target), row, old, new in zip(pairs, asked, before, after, strict=True)
    )


def checked_texts(given: str | Sequence[str], name: str) -> list[str]:
    """Texts without outer whitespace; FactError if there are none or one is empty."""
    texts = as_list(given)
    if not texts:
        raise FactError(f"{name} is empty: give at least one text.")
    return [clean_text(text, f"{name}[{index}]") for index, text in enumerate(texts)]
