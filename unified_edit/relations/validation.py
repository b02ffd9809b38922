"""How well a relation is a matrix: faithfulness and causality on subjects it was not made from.

    faithfulness  share of subjects for which beta W s + b decodes to what the model says
    causality     share of pairs of subjects for which s + W^+ (o' - o) makes the model say of the
                  first what it says of the second

The pairs that the model knows are dealt into folds. For each fold W comes from `n` pairs of the
others, and is tried on the fold's subjects, those that the model knows in that prompt too; each of
several layers, betas and ranks. What a setting scores where it was chosen would be too good: so the
settings of a fold are those that were best on the other folds (`RelationScores.faithfulness`).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, as_path, real_number, whole_number
from unified_edit.errors import RelationError, RelationFileError
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.fingerprints import model_fingerprint
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.model.tensor_files import written_whole
from unified_edit.relations.data import Pair, RelationData
from unified_edit.relations.estimating import EXAMPLES, expansions, known_pairs
from unified_edit.relations.inverse import Inverses
from unified_edit.relations.prompts import SEPARATOR, FewShot, enough, rows_of, says
from unified_edit.relations.scores import Fold, RelationScores
from unified_edit.relations.states import States, decode, outputs_with, read_states

BETAS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
RANKS = (4, 8, 16, 32, 64, 128)
KIND = "unified_edit relation scores/1"


@dataclass(frozen=True)
class _Settings:
    """What is tried on each fold."""

    layers: tuple[int, ...]
    betas: tuple[float, ...]
    ranks: tuple[int, ...]
    folds: int
    most: int | None
    n: int
    seed: int
    template: str
    separator: str


def cross_validate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    data: RelationData,
    *,
    layers: Sequence[int] | None = None,
    betas: Sequence[float] = BETAS,
    ranks: Sequence[int] | None = None,
    n: int = EXAMPLES,
    folds: int = 2,
    most: int | None = None,
    seed: int = 0,
    template: int = 0,
    separator: str = SEPARATOR,
    file: str | os.PathLike[str] | None = None,
) -> RelationScores:
    """Faithfulness and causality of a relation on held-out subjects, for all settings given.

    layers: by default every third block of the lower four fifths. ranks: by default those of
    4, 8, ..., 128 that are below d. folds: how many; each costs `n` Jacobians, whatever the number
    of layers. most: so many of the known pairs are dealt, drawn by `seed`; all if None. file: JSON
    that is written after each fold, and from which a run goes on.

    Raises RelationError for fewer known pairs than `n` outside of a fold or than two in one,
    RelationFileError where `file` holds another run, and what `estimate` raises.
    """
    parts = anatomy(model)
    encoder = Encoder(tokenizer, parts)
    count = whole_number(folds, "folds", RelationError, least=1)
    if layers is None:
        layers = range(0, max(1, 4 * (parts.n_layers - 1) // 5), 3 if parts.n_layers > 9 else 1)
    if ranks is None:
        ranks = [rank for rank in RANKS if rank < parts.width]
    tried = {"betas": as_list(betas), "ranks": as_list(ranks)}
    for name, given in tried.items():
        if not given:
            raise RelationError(f"no {name} are given to try; give one at least, or leave it out")
    settings = _Settings(
        parts.check_layers(layers),
        tuple(sorted(real_number(one, "a beta", RelationError, above=0) for one in tried["betas"])),
        tuple(
            sorted(
                whole_number(one, "a rank", RelationError, least=1, below=parts.width + 1)
                for one in tried["ranks"]
            )
        ),
        count,
        None if most is None else whole_number(most, "most", RelationError, least=1),
        whole_number(n, "n", RelationError, least=2),
        whole_number(seed, "seed", RelationError),
        data.wording(template),
        separator,
    )
    saved = _Saved(file, settings, model_fingerprint(model), data)
    known = known_pairs(
        model, tokenizer, data, n=settings.n, seed=seed, template=template, separator=separator
    )
    pairs = random.Random(seed).sample(known.pairs, len(known))[: settings.most]
    dealt = [pairs[place::count] for place in range(count)]
    if count == 1:  # one split: the examples, and all others
        dealt = [pairs[settings.n :]]
    for fold in dealt:
        rest = [pair for pair in pairs if pair not in fold]
        enough(rest, settings.n, "known pairs outside of a fold", f"relation {data.name!r}")
        enough(fold, 2, "known pairs in a fold", f"relation {data.name!r}")
    done = saved.folds
    bar = progress(data.name, total=count, unit="fold")
    bar.update(len(done))
    with bar:
        for number in range(len(done), count):
            rest = [pair for pair in pairs if pair not in dealt[number]]
            examples = random.Random(f"{seed} {number}").sample(rest, settings.n)
            done.append(_fold(parts, encoder, examples, dealt[number], settings, number))
            saved.write()
            bar.update(1)
    return RelationScores(data.name, len(data), len(known), tuple(done))


def _fold(
    parts: Anatomy,
    encoder: Encoder,
    examples: Sequence[Pair],
    tested: Sequence[Pair],
    settings: _Settings,
    number: int,
) -> Fold:
    prompt = FewShot(settings.template, tuple(examples), settings.separator)
    found = expansions(parts, encoder, prompt, settings.layers)
    rows = rows_of(encoder, prompt, [pair.subject for pair in tested])
    first = read_states(parts, rows, []).answers.tolist()
    kept = [i for i, pair in enumerate(tested) if says(encoder, first[i], pair.object)]
    enough(kept, 2, "subjects of a fold that the model knows in its prompt", "this relation")
    rows = [rows[index] for index in kept]
    states = read_states(parts, rows, settings.layers)
    shown = read_states(
        parts, rows_of(encoder, prompt, [pair.subject for pair in examples]), settings.layers
    )
    faithful: dict[str, list[int]] = {}
    bias: dict[str, list[int]] = {}
    translation: dict[str, list[int]] = {}
    for layer, (weight, b) in found.items():
        moved = states.s[layer].to(weight) @ weight.T
        for beta in settings.betas:
            faithful[f"{layer} {beta}"] = _hits(parts, beta * moved + b, states.answers)
        bias[str(layer)] = _hits(parts, b.expand_as(moved), states.answers)
        step = (shown.o - shown.s[layer]).mean(0)
        translation[str(layer)] = _hits(parts, states.s[layer] + step, states.answers)
    targets, causal = _causal(parts, rows, states, found, settings, number)
    return Fold(
        examples=[[pair.subject, pair.object] for pair in examples],
        subjects=[tested[index].subject for index in kept],
        answers=[encoder.tokenizer.decode([token]) for token in states.answers.tolist()],
        targets=targets,
        faithful=faithful,
        causal=causal,
        bias=bias,
        translation=translation,
    )


def _hits(parts: Anatomy, o: Tensor, wanted: Tensor) -> list[int]:
    return [int(hit) for hit in (decode(parts, o) == wanted).tolist()]


def _causal(
    parts: Anatomy,
    rows: Sequence[Any],
    states: States,
    found: dict[int, tuple[Tensor, Tensor]],
    settings: _Settings,
    number: int,
) -> tuple[list[int], dict[str, list[int]]]:
    """For each subject another one of the fold with another answer, and whether it becomes it."""
    answers = states.answers.tolist()
    draw = random.Random(f"{settings.seed} {number} targets")
    others = [[j for j, other in enumerate(answers) if other != own] for own in answers]
    targets = [draw.choice(each) if each else -1 for each in others]
    moved = [i for i, target in enumerate(targets) if target >= 0]
    to = [targets[i] for i in moved]
    causal: dict[str, list[int]] = {}
    for layer, (weight, _) in found.items():
        inverses = Inverses(weight)
        # where W has not so many singular values, a rank moves nothing that could be counted
        ranks = [rank for rank in settings.ranks if rank <= inverses.rank]
        step = (states.o[to] - states.o[moved]).to(weight)
        moves = [step @ inverses.of_rank(rank).T for rank in ranks]
        outputs = outputs_with(parts, [rows[i] for i in moved], layer, moves) if moved else []
        hits = {rank: _hits(parts, o, states.answers[to])
                for rank, o in zip(ranks, outputs, strict=bool(moved))}  # fmt: skip
        for rank in settings.ranks:
            causal[f"{layer} {rank}"] = hits.get(rank, [0] * len(moved))
    return targets, causal


class _Saved:
    """The folds of a run that a file holds; without a file, they are only kept."""

    def __init__(
        self,
        file: str | os.PathLike[str] | None,
        settings: _Settings,
        fingerprint: str,
        data: RelationData,
    ) -> None:
        self.path: Path | None = None
        self.folds: list[Fold] = []
        self.conditions = json.loads(
            json.dumps(
                {
                    "settings": asdict(settings),
                    "model": fingerprint,
                    "pairs": [[pair.subject, pair.object] for pair in data.pairs],
                }
            )
        )
        if file is None:
            return
        self.path = as_path(file, "file", RelationFileError)
        if self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            folds = [Fold(**one) for one in found["folds"]]
            kind, conditions = found["kind"], found["conditions"]
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise RelationFileError(
                f"{path} holds no scores of a relation ({problem}); give another file, or delete "
                "it to begin anew"
            ) from problem
        if kind != KIND or conditions != self.conditions:
            raise RelationFileError(
                f"{path} holds the scores of another run (other pairs, settings or model); give "
                "another file, or delete it to begin anew"
            )
        self.folds = folds

    def write(self) -> None:
        if self.path is None:
            return
        described = {
            "kind": KIND, "conditions": self.conditions, "folds": [asdict(f) for f in self.folds]
        }  # fmt: skip
        try:
            with written_whole(self.path) as temporary:
                temporary.write_text(json.dumps(described), encoding="utf-8")
        except OSError as problem:
            raise RelationFileError(
                f"{self.path} cannot be written: {problem}. Give another place (file=)"
            ) from problem
