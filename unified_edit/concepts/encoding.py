"""The key of a concept: what the pipeline's text encoder gives at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_edit.arguments import as_list
from unified_edit.concepts.cross_attention import Opened, Pipeline, opened
from unified_edit.errors import FactError, ModelError, TokenizationError, quote
from unified_edit.model.hooks import quiet
from unified_edit.model.progress import progress

#: Texts that are encoded at a time; each takes a full row of the encoder, 77 tokens.
_AT_ONCE = 16


@dataclass(frozen=True)
class Text:
    """A text as the tokenizer reads it: its ids, with begin and end."""

    text: str
    ids: tuple[int, ...]

    @property
    def last(self) -> int:
        """The place of its last token before the end; that of the begin in an empty text."""
        return len(self.ids) - 2


def read_text(parts: Opened, text: str) -> Text:
    """A text in tokens.

    Raises TokenizationError if it is longer than the encoder reads, FactError if it is no text.
    """
    if not isinstance(text, str):
        raise FactError(f"a concept is a text, not {type(text).__name__}")
    found = []
    for tokenizer in parts.tokenizers:
        convert = getattr(parts.pipeline, "maybe_convert_prompt", None)
        plain = text if convert is None else convert(text, tokenizer)  # textual inversion
        ids = tuple(tokenizer(plain, verbose=False)["input_ids"])
        if len(ids) > (limit := int(tokenizer.model_max_length)):
            raise TokenizationError(
                f"the concept {quote(text)} has {len(ids)} tokens with begin and end, and the "
                f"text encoder reads {limit}: what is behind them would not count. Shorten it"
            )
        if len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not put an end token behind a "
                "text, as those of Stable Diffusion do: where the concept ends is not known"
            )
        found.append(ids)
    if len({len(ids) for ids in found}) > 1:
        raise ModelError(
            f"the tokenizers of this pipeline divide {quote(text)} into different numbers of "
            "tokens, so that its last token has no one place"
        )
    return Text(text, found[0])


@torch.no_grad()
def encode(parts: Opened, texts: Sequence[Text], *, whole: bool = False) -> Tensor:
    """The keys (d_text x texts, float64, on the CPU) of some texts, one column each.

    They come from the pipeline's own `encode_prompt`, so that they are what cross-attention reads.
    whole: not only the last token of each text but all that is read of it, text by text: begin,
    words, end and what fills the row up, (d_text x texts * 77).

    Raises ModelError for keys that are not finite, or not as long as what cross-attention reads.
    """
    columns: list[Tensor] = []
    bar = progress("concepts", total=len(texts), unit="text")
    with bar, ExitStack() as stack:
        for encoder in parts.encoders:
            stack.enter_context(quiet(encoder))
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            given = parts.pipeline.encode_prompt(
                prompt=[one.text for one in some],
                device=parts.pipeline.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )[0]
            rows = torch.arange(len(some), device=given.device)
            places = torch.tensor([one.last for one in some], device=given.device)
            read = given.flatten(0, 1) if whole else given[rows, places]
            columns.append(read.cpu().double())
            bar.update(len(some))
    keys = torch.cat(columns).mT.contiguous() if columns else torch.zeros(parts.d_text, 0).double()
    if len(keys) != parts.d_text:
        raise ModelError(
            f"the text encoders of this pipeline give vectors of {len(keys)} numbers, and its "
            f"cross-attention reads {parts.d_text}: they do not belong together"
        )
    if not bool(torch.isfinite(keys).all()):
        raise ModelError("the text encoder gives NaN or infinite entries: load the pipeline again")
    return keys


def concept_keys(pipeline: Pipeline, concepts: str | Sequence[str]) -> Tensor:
    """The keys C (d_text x concepts, float64, on the CPU) of some concepts, a column each.

    A key is the encoder's output at the concept's last token before the end token; that of the
    empty text is its output at the begin token, which stands before every prompt.

    Raises ModelError for a pipeline that cannot be edited, TokenizationError for a concept that is
    longer than the encoder reads, FactError for what is no text.
    """
    parts = opened(pipeline)
    return encode(parts, [read_text(parts, text) for text in as_list(concepts)])
