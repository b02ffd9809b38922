"""The attribute lens: what a relation reads off every token of a text, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unified_edit.model.anatomy import Anatomy
from unified_edit.model.hooks import quiet, read_every_token
from unified_edit.model.prompts import Encoder
from unified_edit.relations.states import log_probabilities_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Lens:
    """What a relation's matrix reads in a text: the first token of an object, and its probability.

    tokens: of the text. layers: the blocks whose outputs were read. words, probabilities: for each
    layer those at each token.
    """

    relation: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    words: tuple[tuple[str, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]

    def table(self) -> pd.DataFrame:
        """One row a (layer, token): layer, place, token, object, probability."""
        import pandas as pd

        return pd.DataFrame(
            (layer, place, token, self.words[row][place], self.probabilities[row][place])
            for row, layer in enumerate(self.layers)
            for place, token in enumerate(self.tokens)
        ).set_axis(["layer", "place", "token", "object", "probability"], axis=1)

    def draw(self, axes: Any = None) -> Any:
        """Draw it with matplotlib: tokens across, blocks upwards; returns the axes."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(figsize=(5.4, 0.34 * len(self.layers) + 1.1))
        axes.imshow(self.probabilities, origin="lower", aspect="auto", cmap="Greens", vmin=0,
                    vmax=1)  # fmt: skip
        for row, words in enumerate(self.words):
            for place, word in enumerate(words):
                dark = self.probabilities[row][place] > 0.5
                colour = "white" if dark else "black"
                axes.text(place, row, word.strip(), ha="center", va="center", color=colour, size=8)
        axes.grid(False)
        axes.set_xticks(range(len(self.tokens)), [token.strip() for token in self.tokens])
        axes.tick_params(axis="x", rotation=45)
        axes.set_yticks(range(len(self.layers)), [str(layer) for layer in self.layers])
        axes.set_ylabel("block")
        return axes


def read_lens(
    name: str,
    outputs: Callable[[Tensor], Tensor],
    parts: Anatomy,
    encoder: Encoder,
    text: str,
    layers: Sequence[int] | None,
) -> Lens:
    """What `Relation.lens` gives; `outputs` makes beta W s + b of states s (rows x d)."""
    chosen = parts.check_layers(range(parts.n_layers - 1) if layers is None else layers)
    (row,) = encoder.prompts([text])
    front = () if encoder.before else encoder.start
    sites = {layer: (parts.blocks[layer], "output") for layer in chosen}
    with quiet(parts.model):
        states = read_every_token(parts.model, [[*front, *row.ids]], sites)
    read = torch.cat([states[layer][0][len(front) :] for layer in chosen])
    top, tokens = log_probabilities_of(parts, outputs(read)).max(-1)
    width, decode = len(row.ids), encoder.tokenizer.decode
    words = [decode([token]) for token in tokens.tolist()]
    chances = top.exp().tolist()
    starts = range(0, len(words), width)
    return Lens(
        name,
        tuple(decode([token]) for token in row.ids),
        chosen,
        tuple(tuple(words[start : start + width]) for start in starts),
        tuple(tuple(chances[start : start + width]) for start in starts),
    )
