"""From pairs to a relation's matrix: which pairs a model knows, and W and b from a few of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import real_number, whole_number
from unified_edit.errors import RelationError, quote
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.fingerprints import model_fingerprint
from unified_edit.model.prompts import Encoder
from unified_edit.relations.data import Pair, RelationData
from unified_edit.relations.jacobian import linearise
from unified_edit.relations.prompts import SEPARATOR, FewShot, enough, rows_of, says
from unified_edit.relations.relation import Relation
from unified_edit.relations.states import read_states

#: Examples that a relation is estimated from, as published.
EXAMPLES = 5


def drawn(data: RelationData, n: int, seed: int) -> tuple[Pair, ...]:
    """`n` of the pairs, the same for the same seed; RelationError where there are fewer."""
    enough(data.pairs, n, "pairs", f"relation {data.name!r}")
    return tuple(random.Random(seed).sample(data.pairs, n))


def expansions(
    parts: Anatomy, encoder: Encoder, prompt: FewShot, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (W, b)}: means over the prompt's examples of do/ds and of o - (do/ds) s."""
    weights: dict[int, Tensor] = {}
    biases: dict[int, Tensor] = {}
    rows = rows_of(encoder, prompt, [pair.subject for pair in prompt.examples])
    for row in rows:
        found = linearise(parts, row, layers)
        for layer, jacobian in found.jacobian.items():
            s, o = found.s[layer].to(jacobian), found.o.to(jacobian)
            bias = o - jacobian @ s
            weights[layer] = weights.get(layer, 0.0) + jacobian / len(rows)
            biases[layer] = biases.get(layer, 0.0) + bias / len(rows)
    return {layer: (weights[layer], biases[layer]) for layer in weights}


def known_pairs(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    data: RelationData,
    *,
    n: int = EXAMPLES,
    seed: int = 0,
    template: int = 0,
    separator: str = SEPARATOR,
) -> RelationData:
    """The pairs of which the model says the object behind `n` others, in their order.

    It says it if its most probable token begins the object, blanks and case aside (the published
    rule; an object of several tokens is known by its first one).

    Raises RelationError for fewer than `n` pairs, and where the model knows none.
    """
    parts = anatomy(model)
    encoder = Encoder(tokenizer, parts)
    prompt = FewShot(data.wording(template), drawn(data, n, seed), separator)
    states = read_states(parts, rows_of(encoder, prompt, [p.subject for p in data.pairs]), [])
    answers = states.answers.tolist()
    known = [p for p, a in zip(data.pairs, answers, strict=True) if says(encoder, a, p.object)]
    if not known:
        raise RelationError(
            f"{parts.name} knows none of the {len(data)} pairs of relation {data.name!r} in the "
            f"prompt {quote(prompt.text('...'))}; try another template or separator, or a larger "
            "model"
        )
    return data.with_pairs(known)


def estimate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    data: RelationData,
    *,
    layer: int,
    beta: float = 1.0,
    rank: int | None = None,
    n: int = EXAMPLES,
    seed: int = 0,
    template: int = 0,
    separator: str = SEPARATOR,
    unknown: Literal["raise", "keep"] = "raise",
) -> Relation:
    """The relation as a matrix, from `n` of its pairs drawn with `seed`.

    layer: the block whose output s is. template: which of the wordings. unknown: what is done where
    the model does not say the object of an example itself ("keep" is the published code's way).

    Raises RelationError for fewer pairs than `n`, for n < 2 and for examples that the model does
    not know, ModelError for a layer that is not below the last block.
    """
    number = whole_number(n, "n", RelationError, least=2, advice="One is asked behind the others")
    parts = anatomy(model)
    real_number(beta, "beta", RelationError, above=0)
    if rank is not None:
        whole_number(rank, "rank", RelationError, least=1, below=parts.width + 1)
    if unknown not in ("raise", "keep"):
        raise RelationError(f'unknown is {unknown!r}; it can be "raise" or "keep"')
    encoder = Encoder(tokenizer, parts)
    prompt = FewShot(data.wording(template), drawn(data, number, seed), separator)
    if unknown == "raise":
        _check_known(parts, encoder, prompt, data.name)
    ((at, (weight, bias)),) = expansions(parts, encoder, prompt, [layer]).items()
    provenance = {
        "model": parts.name,
        "fingerprint": model_fingerprint(model),
        "library": version("unified_edit"),
        "seed": seed,
    }
    return Relation(
        data.name, at, weight.cpu(), bias.cpu(), prompt, beta=beta, rank=rank,
        provenance=provenance,
    )  # fmt: skip


def _check_known(parts: Anatomy, encoder: Encoder, prompt: FewShot, name: str) -> None:
    rows = rows_of(encoder, prompt, [pair.subject for pair in prompt.examples])
    answers = read_states(parts, rows, []).answers.tolist()
    wrong = [
        f"{pair.subject!r} (says {encoder.tokenizer.decode([answer])!r}, not {pair.object!r})"
        for pair, answer in zip(prompt.examples, answers, strict=True)
        if not says(encoder, answer, pair.object)
    ]
    if wrong:
        raise RelationError(
            f"of the {len(rows)} examples of relation {name!r} the model does not know "
            f"{', '.join(wrong[:3])}; choose among those of relations.known_pairs, or pass "
            'unknown="keep"'
        )
