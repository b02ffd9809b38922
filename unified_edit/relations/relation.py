"""A relation as a matrix: o is about beta W s + b (Hernandez et al., ICLR 2024, arXiv 2308.09124).

s is what a block gives at the subject's last token, o what the last block gives where the model is
about to say the object. W is the mean of do/ds over a few examples, each asked in the few-shot
prompt of the others, and b the mean of o - (do/ds) s, each with its own Jacobian, as in the
released code: the mean of first-order expansions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, as_path, real_number, whole_number
from unified_edit.errors import FactError, RelationError, RelationFileError
from unified_edit.facts.facts import clean_text
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.prompts import Encoder
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.relations.data import Pair
from unified_edit.relations.inverse import low_rank_inverse
from unified_edit.relations.lens import Lens, read_lens
from unified_edit.relations.prompts import FewShot, enough, rows_of
from unified_edit.relations.states import log_probabilities_of, outputs_with, read_states

if TYPE_CHECKING:
    import pandas as pd

KIND = "unified_edit relation/1"


@dataclass(frozen=True, eq=False)
class Relation:
    """A relation of one model, as a matrix between two places inside of it.

    weight: W (d x d, on the CPU); bias: b (d,); beta scales what W s contributes.
    layer: the block whose output s is. rank: of W's pseudo-inverse, where subjects are edited; None
    for all of W. prompt: the few-shot prompt, with the examples that W comes from. provenance: the
    model, its fingerprint, the library's version, and the seed.
    """

    name: str
    layer: int
    weight: Tensor
    bias: Tensor
    prompt: FewShot
    beta: float = 1.0
    rank: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d = len(self.bias)
        if self.bias.ndim != 1 or tuple(self.weight.shape) != (d, d):
            raise RelationError(
                f"W is {tuple(self.weight.shape)} and b {tuple(self.bias.shape)}; they must be "
                "(d x d) and (d,)"
            )
        layer = whole_number(self.layer, "layer", RelationError, least=0)
        object.__setattr__(self, "layer", layer)
        beta = real_number(self.beta, "beta", RelationError, above=0)
        object.__setattr__(self, "beta", beta)
        if self.rank is not None:
            rank = whole_number(self.rank, "rank", RelationError, least=1, below=d + 1)
            object.__setattr__(self, "rank", rank)

    def outputs(self, s: Tensor) -> Tensor:
        """beta W s + b for each of some subjects' states: (rows x d) from (rows x d)."""
        weight = self.weight.to(s.device)
        return self.beta * s.to(weight.dtype) @ weight.T + self.bias.to(s.device)

    def inverse(self, rank: int | None = None) -> Tensor:
        """W's pseudo-inverse (d x d) of `rank` (its own by default).

        Raises RelationError where W is singular at that rank.
        """
        return low_rank_inverse(self.weight, self.rank if rank is None else rank)

    def predict(
        self, model: PreTrainedModel, tokenizer: Tokenizer, subjects: str | Sequence[str]
    ) -> pd.DataFrame:
        """What the matrix reads off some subjects, beside what the model says.

        Columns: subject, relation (the most probable first token by beta W s + b), probability, and
        model (the model's own). Raises what `anatomy` raises, RelationError for a model of
        another shape.
        """
        import pandas as pd

        parts, encoder, given = self._opened(model, tokenizer, subjects)
        enough(given, 1, "subjects", "this call")
        states = read_states(parts, rows_of(encoder, self.prompt, given), [self.layer])
        logp = log_probabilities_of(parts, self.outputs(states.s[self.layer]))
        top, tokens = logp.max(-1)
        decode = tokenizer.decode
        return pd.DataFrame(
            {
                "subject": given,
                "relation": [decode([token]) for token in tokens.tolist()],
                "probability": top.exp().tolist(),
                "model": [decode([token]) for token in states.answers.tolist()],
            }
        )

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        subjects: str | Sequence[str],
        like: str | Sequence[str],
    ) -> pd.DataFrame:
        """Make the model take each subject for another one: s + W^+ (o' - o) instead of s.

        o' is what the model has where it is about to say the object of `like`. No weight changes:
        it is one forward. Columns: subject, like, before and after (what the model says), wanted
        (what it says of `like`), probability (of that, after). Raises RelationError for unequal
        numbers of subjects and where W is singular at its rank.
        """
        import pandas as pd

        parts, encoder, given = self._opened(model, tokenizer, subjects)
        others = [str(one) for one in as_list(like)]
        if len(others) != len(given):
            raise RelationError(
                f"{len(given)} subjects are to be like {len(others)} others; give one for each"
            )
        enough(given, 1, "subjects", "this call")
        rows = rows_of(encoder, self.prompt, given)
        here = read_states(parts, rows, [])
        there = read_states(parts, rows_of(encoder, self.prompt, others), [])
        inverse = self.inverse().to(here.o.device)
        move = (there.o - here.o).to(inverse.dtype) @ inverse.T
        (moved,) = outputs_with(parts, rows, self.layer, [move])
        logp = log_probabilities_of(parts, moved)
        chances = logp.gather(1, there.answers[:, None]).squeeze(1).exp()
        decode = tokenizer.decode
        words = {
            "before": here.answers, "after": logp.argmax(-1), "wanted": there.answers
        }  # fmt: skip
        return pd.DataFrame(
            {
                "subject": given,
                "like": others,
                **{name: [decode([t]) for t in each.tolist()] for name, each in words.items()},
                "probability": chances.tolist(),
            }
        )

    def lens(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        text: str,
        layers: Sequence[int] | None = None,
    ) -> Lens:
        """The attribute lens: what the matrix reads off every token of a text, block by block."""
        parts, encoder, _ = self._opened(model, tokenizer, [])
        return read_lens(self.name, self.outputs, parts, encoder, text, layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; RelationFileError where that is not possible."""
        prompt = self.prompt
        description = {
            "name": self.name,
            "layer": self.layer,
            "beta": self.beta,
            "rank": self.rank,
            "template": prompt.template,
            "separator": prompt.separator,
            "examples": [[pair.subject, pair.object] for pair in prompt.examples],
            "provenance": dict(self.provenance),
        }
        tensors = {"weight": self.weight, "bias": self.bias}
        to = as_path(path, "path", RelationFileError)
        write_safetensors(to, tensors, KIND, description, RelationFileError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Relation:
        """Read what `save` wrote; RelationFileError for a damaged file or one of another kind."""
        found = as_path(path, "path", RelationFileError)
        tensors, described = read_safetensors(found, KIND, RelationFileError)
        try:
            examples = tuple(Pair(*pair) for pair in described["examples"])
            return cls(
                described["name"],
                described["layer"],
                tensors["weight"],
                tensors["bias"],
                FewShot(described["template"], examples, described["separator"]),
                beta=described["beta"],
                rank=described["rank"],
                provenance=described["provenance"],
            )
        except (KeyError, TypeError, FactError, RelationError) as problem:
            raise RelationFileError(
                f"{found}: its description is not that of a relation ({problem}); make it again"
            ) from problem

    def _opened(
        self, model: PreTrainedModel, tokenizer: Tokenizer, subjects: str | Sequence[str]
    ) -> tuple[Anatomy, Encoder, list[str]]:
        parts = anatomy(model)
        if parts.width != len(self.bias) or self.layer >= parts.n_layers - 1:
            raise RelationError(
                f"relation {self.name!r} is a matrix of {len(self.bias)} rows at block "
                f"{self.layer}; this model has states of {parts.width} and blocks "
                f"0..{parts.n_layers - 1}: it belongs to another model"
            )
        given = [clean_text(one, "a subject", self.name) for one in as_list(subjects)]
        return parts, Encoder(tokenizer, parts), given
