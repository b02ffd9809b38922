"""k*: the key under which a subject is looked up, and the value that stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unified_edit.editing.choices import Choice, chosen
from unified_edit.errors import MethodError
from unified_edit.facts import Fact, members_of
from unified_edit.model.anatomy import Anatomy, Tokenizer
from unified_edit.model.hooks import Name, quiet, read_last_token, read_tokens
from unified_edit.model.prompts import Encoder, FactRows, Row


def _typed(count: int) -> Tensor:
    weights = torch.full((count,), 0.5 / max(1, count - 1), dtype=torch.float64)
    weights[0] = 0.5 if count > 1 else 1.0
    return weights


#: How the contexts of a fact are weighed in its key, by their number. "typed" is the mean within
#: each context *type*, then over types: one half for the bare prompt, which comes first, and one
#: half shared by the prefixed ones (released code of MEMIT and EMMET). "plain" weighs all alike
#: (ROME, eq. 3). "bare" is the bare prompt alone (p-ROME, arXiv 2403.07175).
KEY_MEANS = {
    "typed": Choice("typed", _typed),
    "plain": Choice("plain", lambda count: torch.full((count,), 1 / count, dtype=torch.float64)),
    "bare": Choice("bare", lambda count: torch.eye(1, count, dtype=torch.float64)[0]),
}

#: Where a value is set: the module of block `layer` whose output it is.
SITES = {
    "block": Choice("block", lambda parts, layer: parts.blocks[layer]),
    "mlp": Choice("mlp", lambda parts, layer: parts.mlp(layer)),
}


def context_weights(count: int, mean: str | Choice) -> Tensor:
    """The weights (count, float64) with which the contexts of one fact are averaged.

    mean: one of `KEY_MEANS`, or a function of the number of contexts. Raises MethodError if that
    does not give `count` numbers.
    """
    choice = chosen(mean, KEY_MEANS, "key_mean")
    weights = torch.as_tensor(choice(count), dtype=torch.float64)
    if weights.shape != (count,) or not weights.isfinite().all():
        raise MethodError(
            f"the key mean {choice.name!r} gives {tuple(weights.shape)} weights for {count} "
            "contexts; give one finite number for each"
        )
    return weights


def keys_of(
    parts: Anatomy, rows: FactRows, layers: Sequence[int], mean: str | Choice = "typed"
) -> dict[int, Tensor]:
    """K for each layer: {layer: (d_in x E, float64)}, one column a fact.

    A key is the input of the layer's down-projection at the subject's last token, averaged
    over the fact's prompt behind each prefix (`context_weights`). Only the tokens up to that
    one are run: a causal model computes it from nothing else.
    """
    weights = context_weights(len(rows.prefixes), mean)
    sites = {layer: (parts.down(layer), "input") for layer in layers}
    found = _at_subjects(parts, [row for behind in rows.behind for row in behind], sites)
    return {
        layer: torch.einsum(
            "ecd,c->de", value.cpu().double().unflatten(0, (-1, len(weights))), weights
        )
        for layer, value in found.items()
    }


def values_at(
    parts: Anatomy,
    rows: FactRows,
    layer: int,
    site: str | Choice,
    mean: str | Choice = "bare",
) -> Tensor:
    """What stands at the value's site now: (d_out x E, float64).

    On the bare prompts, or averaged over contexts as `mean` weighs them (`context_weights`).
    """
    module = chosen(site, SITES, "site")(parts, layer)
    weights = context_weights(len(rows.prefixes), mean)
    asked = weights.nonzero().flatten().tolist() or [0]
    each = [behind[place] for behind in rows.behind for place in asked]
    found = _at_subjects(parts, each, {"site": (module, "output")})["site"].cpu().double()
    if asked == [0] and weights[0] == 1:
        return found.T
    return torch.einsum("ecd,c->de", found.unflatten(0, (-1, len(asked))), weights[asked])


def _at_subjects(
    parts: Anatomy, rows: Sequence[Row], sites: Mapping[Name, tuple[nn.Module, str]]
) -> dict[Name, Tensor]:
    """Activations at the last token of each row's subject: {name: (rows x width)}."""
    with quiet(parts.model):
        if parts.causal:
            return read_last_token(parts.model, [row.up_to_subject for row in rows], sites)
        places = [row.subject for row in rows]
        return read_tokens(parts.model, [row.prompt for row in rows], places, sites)


def column_means(of_facts: Tensor, columns: Sequence[int]) -> Tensor:
    """(d x facts) -> (d x columns): the mean over the facts of each column.

    columns: for each fact the number of its column. Where every fact has its own it is the same.
    """
    members = members_of(columns)
    if len(members) == len(columns):
        return of_facts
    means = [
        of_facts[:, one].mean(dim=1) if len(one) > 1 else of_facts[:, one[0]] for one in members
    ]
    return torch.stack(means, dim=1)


def compute_keys(
    parts: Anatomy,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layers: Sequence[int],
    mean: str | Choice = "typed",
) -> dict[int, Tensor]:
    """K of some facts behind some prefixes, for each layer: {layer: (d_in x E, float64)}.

    Columns are facts. See `keys_of`; raises TokenizationError if the model cannot read them.
    """
    return keys_of(parts, Encoder(tokenizer, parts).fact_rows(facts, prefixes), layers, mean)


def read_values(
    parts: Anatomy,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    layer: int,
    site: str | Choice = "block",
) -> Tensor:
    """What stands at a site at the subjects' last tokens: (d_out x E, float64).

    On the bare prompts, by the model as it is. site: "block" or "mlp" of `layer`.
    """
    return values_at(parts, Encoder(tokenizer, parts).fact_rows(facts, [""]), layer, site)
