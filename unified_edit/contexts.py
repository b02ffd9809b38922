"""Prefixes in front of a prompt, sampled from the model itself.

A key or a value found behind several unrelated prefixes belongs to the subject rather than to one
sentence (ROME, sec. 3.1; MEMIT, sec. 4.3). They are sampled once per model, specification and
seed, before any edit, and kept with the edit.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from unified_edit.activations import PLAIN_OUTPUT, quiet
from unified_edit.errors import MethodError, ModelError, TokenizationError
from unified_edit.methods import Contexts
from unified_edit.models import Tokenizer, anatomy
from unified_edit.tokens import check_ids, encode

#: The released code samples among the five most probable tokens.
TOP_K = 5


def sample_prefixes(
    model: PreTrainedModel, tokenizer: Tokenizer, spec: Contexts, seed: int
) -> tuple[str, ...]:
    """The bare prompt's empty prefix, then `spec.count` sampled ones, each ending in ". ".

    The same for the same model, `spec` and `seed`; torch's global random state is untouched.

    Raises MethodError for a prefix with more tokens than the model has positions,
    TokenizationError if a start has no tokens that the model knows, ModelError if the model's
    logits are not finite.
    """
    parts = anatomy(model)
    if parts.positions is not None and max(spec.lengths) > parts.positions:
        raise MethodError(
            f"a prefix of {max(spec.lengths)} tokens does not fit the model's {parts.positions} "
            "positions; give shorter ones: method.replace(contexts=Contexts(lengths=(...)))"
        )
    if "" in spec.starts and tokenizer.eos_token_id is None:
        raise TokenizationError(
            "prefixes without a start begin with the end-of-text token, but this tokenizer has "
            "none; set tokenizer.eos_token, or give contexts with starts"
        )
    # a special token that was added to the tokenizer alone is never sampled anyway
    special = [token for token in tokenizer.all_special_ids if token < parts.vocabulary]
    generator = torch.Generator().manual_seed(seed)
    prefixes = [""]
    with quiet(model), torch.no_grad():
        for length in spec.lengths:
            for start in spec.starts:
                ids = encode(tokenizer, start) if start else [tokenizer.eos_token_id]
                check_ids(parts, ids, start)
                rows = torch.tensor([ids] * spec.per_start, device=model.device)
                # the end-of-text token that stands for "no start" is not part of the prefix
                wanted = length if start else length + 1
                while rows.shape[1] < wanted:
                    seen = torch.ones_like(rows)
                    logits = (
                        model(rows, attention_mask=seen, use_cache=False, **PLAIN_OUTPUT)
                        .logits[:, -1]
                        .float()
                        .cpu()
                    )
                    if not torch.isfinite(logits).all():
                        raise ModelError(
                            "the model's logits are not finite: its weights are damaged or its "
                            "type overflows; load it again, or in float32 or bfloat16"
                        )
                    logits[:, special] = -torch.inf
                    top, tokens = logits.topk(TOP_K)
                    choice = torch.multinomial(top.softmax(-1), 1, generator=generator)
                    rows = torch.cat([rows, tokens.gather(1, choice).to(rows)], dim=1)
                texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
                prefixes += [" ".join(text.split()) + ". " for text in texts]
    return tuple(prefixes)
