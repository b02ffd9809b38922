"""Text that a model writes by itself: shown, and measured as fluency.

Fluency is the GE of ROME and MEMIT: a damaged model repeats itself, and text that repeats itself
has few different n-grams. With f the frequencies of a text's n-grams of words

    GE = mean over n in {2, 3} of weight_n * H_n,    H_n = -sum over n-grams of f log2 f,

and the weights 2/3 and 4/3 (kmeng01/rome@0874014, experiments/py/eval_utils_counterfact.py; the
papers' tables show a hundred times that). As there a text is a generation prompt with what follows
it, a hundred tokens in all, sampled from the five likeliest at each place. Two things differ: each
text has random numbers of its own, so that neither the batch nor an interruption changes it, and
the same ones before and after; and words are found by a regular expression instead of by NLTK.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from unified_edit.arguments import whole_number
from unified_edit.errors import MethodError, brief, quote
from unified_edit.measuring.asking import checked_texts
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import TEXT
from unified_edit.measuring.scores import GENERATION
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.hooks import quiet
from unified_edit.model.prompts import Encoder

if TYPE_CHECKING:
    import pandas as pd

#: n of the n-grams -> weight of their entropy.
NGRAMS = {2: 2 / 3, 3: 4 / 3}
#: As NLTK's tokenizer takes words apart: contractions in two ("do n't", "it 's"), numbers, hyphens
#: and abbreviations in one, every other sign by itself.
_WORD = re.compile(
    r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|m|d|ll|re|ve)\b"
    r"|(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*|\w+(?:-\w+)*|\.\.\.|--|[^\w\s]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Generation:
    """How text is generated to measure fluency.

    length: tokens of a text, its prompt among them. top_k: each token is drawn from so many of the
    likeliest; with 1 it is the likeliest itself. seed: of the drawing.
    """

    length: int = 100
    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("top_k", 1), ("seed", 0)):
            value = whole_number(
                getattr(self, name), f"Generation: {name}", MethodError, least=least
            )
            object.__setattr__(self, name, value)

    @classmethod
    def wanted(cls, given: object, seed: int) -> Generation | None:
        """What the argument `generate` asks for: a `Generation`, True for the standard, or none."""
        if given is True:
            return cls(seed=seed)
        if given is False or given is None:
            return None
        if not isinstance(given, Generation):
            raise MethodError(f"generate is {brief(given)}; give True, False or a Generation")
        return given


def complete(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: str | Sequence[str], tokens: int = 20
) -> pd.DataFrame:
    """What the model as it is writes behind each prompt by itself: the likeliest token each time.

    Columns: prompt, text (what follows it, without special tokens). At most `tokens` tokens; fewer
    where the model ends the text. Prompts go in as they are, without a chat template.

    Raises FactError for no or empty prompts, MethodError for fewer than one token or more than the
    model has positions for, TokenizationError, and what `anatomy` raises.
    """
    import pandas as pd

    number = whole_number(tokens, "tokens", MethodError, least=1, advice="Ask for at least one")
    parts, texts = anatomy(model), checked_texts(prompts, "prompts")
    rows = [row.ids for row in Encoder(tokenizer, parts).prompts(texts)]
    for text, row in zip(texts, rows, strict=True):
        if parts.positions is not None and len(row) + number > parts.positions:
            raise MethodError(
                f"{quote(text)} has {len(row)} tokens, and with {number} more it would have more "
                f"than the model has positions ({parts.positions}); ask for fewer tokens"
            )
    found = _continued(parts, rows, [number] * len(rows), _ends(parts, tokenizer))
    shown = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    return pd.DataFrame({"prompt": texts, TEXT: shown})


def generated_rows(
    sheet: Sheet, tokenizer: Tokenizer, when: str, records: Iterable[int], how: Generation
) -> list[dict[str, Any]]:
    """Text behind the generation prompts of some records, by the model as it is: rows of a table.

    Their kind is "generation", their magnitude the text's `ngram_entropy`.
    """
    import pandas as pd

    asked = [
        (index, place, prompt)
        for index in records
        for place, prompt in enumerate(sheet.records[index].generation_prompts)
    ]
    parts = sheet.parts
    prompts = [row.ids for row in Encoder(tokenizer, parts).prompts([text for *_, text in asked])]
    most = min(how.length, parts.positions or how.length)
    left = [max(0, most - len(ids)) for ids in prompts]
    seeds = [f"{how.seed} {sheet.numbers[index]} {place}" for index, place, _ in asked]
    # as in the released code, the end of a text is a token like others
    found = _continued(parts, prompts, left, [], how.top_k, seeds)
    nan, rows = float("nan"), []
    for (index, _, prompt), ids, more in zip(asked, prompts, found, strict=True):
        text = tokenizer.decode([*ids, *more], skip_special_tokens=True)
        text = unicodedata.normalize("NFKD", text).replace("\n\n", " ")
        rows.append(
            {
                "record": sheet.numbers[index],
                "case_id": sheet.records[index].case_id,
                "relation": sheet.records[index].relation,
                "when": when,
                "kind": GENERATION,
                "prompt": prompt,
                "logp_new": nan,
                "logp_true": nan,
                "success": pd.NA,
                "magnitude": ngram_entropy(text),
                "generated": False,
                TEXT: text,
            }
        )
    return rows


def ngram_entropy(text: str) -> float:
    """GE of one text, in bits; 0 for one that is too short to have n-grams."""
    found = words(text)
    each = [
        weight * _entropy(Counter(zip(*(found[i:] for i in range(n)), strict=False)))
        for n, weight in NGRAMS.items()
    ]
    return math.fsum(each) / len(each)


def words(text: str) -> list[str]:
    """The words and signs of a text."""
    return _WORD.findall(text)


def _entropy(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return math.fsum(-n / total * math.log2(n / total) for n in counts.values())


def _ends(parts: Anatomy, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: of the model's own settings, and of its tokenizer."""
    config = getattr(parts.model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    given = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(token) for token in given if token is not None})


def _continued(
    parts: Anatomy,
    rows: Sequence[Sequence[int]],
    tokens: Sequence[int],
    ends: list[int],
    top_k: int = 1,
    seeds: Sequence[str] = (),
) -> list[list[int]]:
    """The ids that follow each row: as many as `tokens` says, or up to one of `ends`."""
    model: Any = parts.model
    found: list[list[int]] = [[] for _ in rows]
    lengths = [len(row) + more if more else 0 for row, more in zip(rows, tokens, strict=True)]
    with quiet(model), _own_settings(model):
        batches = batches_by_length(lengths)
        for chosen in (part for batch in batches for part in _fitting(parts, batch, rows, tokens)):
            most = max(tokens[index] for index in chosen)
            if most == 0:
                continue
            inputs = left_padded([rows[index] for index in chosen], model.device)
            width = inputs["input_ids"].shape[1]
            draw = [TopK(top_k, [seeds[i] for i in chosen])] if top_k > 1 else []
            config = GenerationConfig(
                max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=ends or None
            )
            made = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=config,
                logits_processor=LogitsProcessorList(draw),
            )
            for ids, index in zip(made[:, width:].tolist(), chosen, strict=True):
                end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                found[index] = ids[: min(end, tokens[index])]
    return found


def _fitting(
    parts: Anatomy, batch: list[int], rows: Sequence[Sequence[int]], tokens: Sequence[int]
) -> Iterator[list[int]]:
    """The rows of a batch in parts that go on together: all of them as long as the longest does.

    Where this would be more than the model has positions for, those that ask for as many tokens.
    """
    most = max(tokens[index] for index in batch)
    if parts.positions is None or most + max(len(rows[i]) for i in batch) <= parts.positions:
        yield batch
        return
    for number in dict.fromkeys(tokens[index] for index in batch):
        yield [index for index in batch if tokens[index] == number]


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, nothing that the model came with has a say in what it generates.

    Many come with a temperature, a penalty on repetitions or tokens to suppress.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class TopK(LogitsProcessor):
    """Draw from the k likeliest tokens, each row with random numbers of its own.

    The largest of log p + g, with g from a Gumbel distribution, is a draw from p; so the token that
    is drawn is left as the only possible one.
    """

    def __init__(self, k: int, seeds: Sequence[str]) -> None:
        self.k = k
        self.generators = []
        for seed in seeds:
            number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
            self.generators.append(torch.Generator().manual_seed(number))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows x vocabulary) that leave the token that was drawn, and no other."""
        k = min(self.k, scores.shape[-1])
        top = scores.float().topk(k, dim=-1)
        chance = torch.stack(
            [torch.rand(k, generator=g, dtype=torch.float64) for g in self.generators]
        )
        # drawn for places, not for tokens: the first is the likeliest
        gumbel = -(-chance.clamp(min=1e-300).log()).log()
        best = (top.values.double() + gumbel.to(scores.device)).argmax(-1, keepdim=True)
        chosen = top.indices.gather(1, best)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
