"""Prefixes in front of a prompt, sampled from the model itself.

A key or a value found behind several unrelated prefixes belongs to the subject rather than to one
sentence (ROME, sec. 3.1; MEMIT, sec. 4.3). They are sampled once for each model, tokenizer,
specification and seed, without any edit, and kept with the edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, whole_number
from unified_edit.errors import MethodError, ModelError, TokenizationError, brief
from unified_edit.model.hooks import PLAIN_OUTPUT, logits_of, quiet
from unified_edit.model.prompts import Encoder

#: The words that MEMIT's released code begins its sampled prefixes with.
MEMIT_STARTS = ("The", "Therefore", "Because", "I", "You")
#: The released code samples among the five most probable tokens.
TOP_K = 5


@dataclass(frozen=True)
class Contexts:
    """Prefixes in front of a prompt: `per_start` samples of each length after each start.

    `lengths` are numbers of tokens, the start included; what the model reads in front of it
    (`Encoder.opening`) is not counted. An empty start stands for a text from nothing. `prefixes`,
    if given, are used as they are and nothing is sampled: those of a published run replay it. The
    bare prompt always comes first and is not counted here.
    """

    starts: tuple[str, ...] = MEMIT_STARTS
    lengths: tuple[int, ...] = (10,)
    per_start: int = 1
    prefixes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        starts = _texts(self.starts, "starts")
        prefixes = self.prefixes
        if prefixes is not None:
            prefixes = _texts(prefixes, "prefixes")
            wrong = next((text for text in prefixes if not text or "{}" in text), None)
            if wrong is not None:
                raise MethodError(
                    f"Contexts: the prefix {wrong!r} is no text to stand before a prompt; the bare "
                    "prompt comes first by itself, and {} is not needed: 'It is said. '"
                )
        given = as_list(self.lengths)
        if not given:
            raise MethodError("Contexts: lengths is empty; it must be a list of numbers")
        numbers = [
            whole_number(one, name, MethodError, least=1)
            for name, one in (
                *(("Contexts: a length", length) for length in given),
                ("Contexts: per_start", self.per_start),
            )
        ]
        for name, value in (
            ("starts", starts), ("lengths", tuple(numbers[:-1])), ("per_start", numbers[-1]),
            ("prefixes", prefixes),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def count(self) -> int:
        """How many prefixes there are."""
        if self.prefixes is not None:
            return len(self.prefixes)
        return len(self.starts) * len(self.lengths) * self.per_start


def _texts(values: object, field: str) -> tuple[str, ...]:
    texts = as_list(values)
    if isinstance(values, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise MethodError(f"Contexts: {field} is {brief(values)}; it must be a list of texts")
    return tuple(texts)


def prefixes_key(
    fingerprint: str, tokenizer: str, contexts: Contexts, seed: int
) -> tuple[object, ...]:
    """By what sampled prefixes are kept in the memory of a model (`Memory`)."""
    return ("prefixes", fingerprint, tokenizer, contexts, seed)


def sample_prefixes(
    model: PreTrainedModel, encoder: Encoder, spec: Contexts, seed: int
) -> tuple[str, ...]:
    """The bare prompt's empty prefix, then `spec.count` others, the sampled ones ending in ". ".

    The same for the same model, tokenizer, `spec` and `seed`; torch's global random state is
    untouched. No special token and none that was added to the vocabulary is sampled.

    Raises MethodError for a prefix with more tokens than the model has positions,
    TokenizationError if a start has no tokens that the model knows, ModelError if the model's
    logits are not finite.
    """
    if spec.prefixes is not None:
        return ("", *spec.prefixes)
    limit = encoder.parts.positions if encoder.parts is not None else None
    if limit is not None and max(spec.lengths) > limit:
        raise MethodError(
            f"a prefix of {max(spec.lengths)} tokens does not fit the model's {limit} "
            "positions; give shorter ones: method.replace(contexts=Contexts(lengths=(...)))"
        )
    if "" in spec.starts and not encoder.start:
        raise TokenizationError(
            "prefixes without a start begin with the token that texts begin with, or with the "
            "end-of-text token, but this tokenizer has none; set tokenizer.bos_token or "
            "tokenizer.eos_token, or give contexts with starts that are words"
        )
    generator = torch.Generator().manual_seed(seed)
    prefixes = [""]
    with quiet(model), torch.no_grad():
        for length in spec.lengths:
            for start in spec.starts:
                # what stands in front of the words is read, but is no part of the prefix
                front = encoder.opening if start else encoder.start
                words = encoder.encode([start])[0].ids[len(encoder.before) :] if start else ()
                encoder.check_ids(front)
                rows = torch.tensor([[*front, *words]] * spec.per_start, device=model.device)
                while (missing := len(front) + length - rows.shape[1]) > 0:
                    from_nothing = not start and missing == length
                    tokens = _next(model, encoder, rows, generator, from_nothing)
                    rows = torch.cat([rows, tokens], dim=1)
                sampled = rows[:, len(front) :]
                texts = encoder.tokenizer.batch_decode(sampled, skip_special_tokens=True)
                prefixes += [" ".join(text.split()) + ". " for text in texts]
    return tuple(prefixes)


def _next(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: torch.Tensor,
    generator: torch.Generator,
    from_nothing: bool,
) -> torch.Tensor:
    """One sampled token for each row, the first word of a text if `from_nothing`: (rows x 1)."""
    seen = torch.ones_like(rows)
    output = model.base_model(rows, attention_mask=seen, use_cache=False, **PLAIN_OUTPUT)
    logits = logits_of(model, output.last_hidden_state[:, -1]).float().cpu()
    if not torch.isfinite(logits).all():
        raise ModelError(
            "the model's logits are not finite: its weights are damaged or its "
            "type overflows; load it again, or in float32 or bfloat16"
        )
    # a token that was added to the tokenizer alone is never sampled anyway
    logits[:, [token for token in encoder.added if token < logits.shape[1]]] = -torch.inf
    if from_nothing and encoder.opening and not encoder.before:
        # Its corpus was one stream of texts, so that it never learned what follows a separator at
        # the very first place: SmolLM2 says "-_12321" there. All rows are equal still.
        words = _first_words(encoder, logits[0])
        if words:
            others = torch.ones(logits.shape[1], dtype=torch.bool)
            others[words] = False
            logits[:, others] = -torch.inf
    top, tokens = logits.topk(TOP_K)
    choice = torch.multinomial(top.softmax(-1), 1, generator=generator)
    return tokens.gather(1, choice).to(rows)


def _first_words(encoder: Encoder, logits: torch.Tensor) -> list[int]:
    """The likeliest tokens that a sentence can begin with, such as "The"; [] if there are few."""
    found: list[int] = []
    known = min(len(encoder.tokenizer), len(logits))
    for token in logits[:known].argsort(descending=True).tolist():
        text = encoder.tokenizer.decode([token]).strip()
        if len(text) > 1 and text.isalpha() and text.istitle() and token not in encoder.added:
            found.append(token)
        if len(found) == TOP_K:
            return found
    return []
