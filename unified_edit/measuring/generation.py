"""What a model writes: the greedy continuation of a prompt, as one would read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, whole_number
from unified_edit.errors import FactError, MethodError
from unified_edit.facts.facts import clean_text
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.batching import left_padded
from unified_edit.model.hooks import quiet
from unified_edit.model.prompts import Encoder

if TYPE_CHECKING:
    import pandas as pd


def complete(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: str | Sequence[str], tokens: int = 20
) -> pd.DataFrame:
    """What the model as it is says after each prompt: `tokens` tokens at most, greedily.

    Columns: prompt, text. Special tokens end a text and are not shown; blanks and line breaks in
    the text are as the model made them. Outer whitespace of a prompt is dropped, as in `ask`.

    Raises FactError for no or empty prompts, MethodError for tokens < 1, and what `anatomy` raises.
    """
    import pandas as pd

    number = whole_number(tokens, "tokens", MethodError, least=1, advice="Ask for at least one")
    given = as_list(prompts)
    if not given:
        raise FactError("prompts is empty: give at least one text.")
    texts = [clean_text(text, f"prompts[{index}]") for index, text in enumerate(given)]
    encoder = Encoder(tokenizer, anatomy(model))
    rows = [row.ids for row in encoder.prompts(texts)]
    inputs = left_padded(rows, model.device)
    del inputs["position_ids"]  # generate makes them from the mask, and goes on counting
    with quiet(model), torch.no_grad():
        written = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=number,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=_padding(tokenizer),
        )
    found = tokenizer.batch_decode(
        written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return pd.DataFrame({"prompt": texts, "text": found})


def _padding(tokenizer: Tokenizer) -> int:
    """A token that stands behind the end of a text; skipped when it is read."""
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in choices if token is not None)
