"""atlas as the living page takes it: its weights, the factor of C0, its tokenizer, what it knows.

One run of bytes: the length of a description in JSON (four bytes, little end first), that
description, the weights in half precision as they are stored, and the lower triangle of L, row by
row, in single precision. A page that is opened from a folder may load scripts and nothing else, so
`scripts` cuts the bytes into pieces that are scripts.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from unified_edit.atlas import FOLDER
from unified_edit.atlas.knowledge import load_knowledge
from unified_edit.editing import EMMET, Edit, Editor
from unified_edit.facts import Fact
from unified_edit.model import anatomy
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet, read_last_token
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import KeyStatistics, statistics_for

#: Bytes of a piece; as a script it has a third more.
PIECE = 384 * 1024
#: What a page calls with the number of a piece, how many there are, and the piece.
RECEIVER = "livingPiece"


def packed(model: PreTrainedModel, tokenizer: Tokenizer) -> bytes:
    """Everything about atlas that its page needs; `model` is atlas itself, unedited.

    The description holds config, tensors ({name: [first byte, entries]} behind the description, of
    half precision), factor (the same, single precision), tokenizer (vocabulary and merges),
    prefixes, recipe (EMMET's for atlas), knowledge (triples and wordings) and what a file of an
    edit is to say (file).
    """
    method = EMMET.resolve(anatomy(model))
    assert method.layers is not None
    [layer] = method.layers
    editor = Editor(model, tokenizer, method=method)
    words = json.loads(FOLDER.joinpath("tokenizer.json").read_text(encoding="utf-8"))["model"]
    knowledge = load_knowledge()
    body, tensors = bytearray(), {}
    for name, parameter in model.named_parameters():
        half = parameter.detach().half()
        if not torch.equal(half.to(parameter.dtype), parameter):
            raise ValueError(f"{name} is not what half precision can hold: the model was edited")
        tensors[name] = (len(body), half.numel())
        body += half.numpy().tobytes()
    statistics = statistics_for(model, tokenizer, [layer])
    L = statistics.metric(layer).factor
    rows, columns = torch.tril_indices(*L.shape)
    triangle = L[rows, columns].float().numpy()
    factor = (len(body), len(triangle))
    body += triangle.tobytes()
    names = ("n_layer", "n_head", "n_embd", "n_inner", "vocab_size", "n_positions")
    described: dict[str, Any] = {
        "config": {name: getattr(model.config, name) for name in names},
        "tensors": tensors,
        "factor": factor,
        "tokenizer": {"vocabulary": words["vocab"], "merges": words["merges"]},
        "prefixes": editor.prefixes(method.contexts),
        "recipe": {
            "layer": layer,
            "steps": method.steps,
            "rate": method.learning_rate,
            "kl": method.kl_weight,
            "decay": method.weight_decay,
            "clamp": method.clamp,
            "stop": method.stop_loss,
        },
        "knowledge": {
            "triples": [(one.subject, one.relation, one.object) for one in knowledge.triples],
            "wordings": knowledge.wordings,
            "held_out": sorted(knowledge.held_out),
            # of each subject at the beginning of a text: k' C0^-1 k at its last token
            "rarities": _rarities(editor, statistics, layer, knowledge.subjects),
        },
        # what a file of an edit says besides its facts, for the page to write one
        "file": {
            "method": method.to_dict(),
            "weight": anatomy(model).weight(layer).name,
            "fingerprint": editor.ledger.fingerprint(wholly=True),
            "statistics": asdict(statistics.source),
            "library": version("unified_edit"),
            "seed": editor.seed,
        },
    }
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)  # what follows begins where a number may begin
    return struct.pack("<I", len(text)) + text + bytes(body)


def _rarities(
    editor: Editor, statistics: KeyStatistics, layer: int, subjects: Sequence[str]
) -> dict[str, float]:
    rows = [row.ids for row in Encoder(editor.tokenizer, editor.parts).prompts(subjects)]
    down = editor.parts.down(layer)
    with quiet(editor.model):
        keys = read_last_token(editor.model, rows, {"keys": (down, "input")})["keys"]
    found = statistics.metric(layer).whiten(keys.double().T).square().sum(dim=0)
    return {
        subject: float(f"{float(one):.5g}") for subject, one in zip(subjects, found, strict=True)
    }


@dataclass(frozen=True, repr=False)
class Living:
    """Something that a page brings to life: until the reader asks for it, what stands in it.

    kind: what it becomes (`book/live/src`). inside: HTML, which is all there is without a script
    and in print. invitation: the words of its button. data: what it is about, by name.
    """

    kind: str
    inside: str
    invitation: str = "Try it here"
    data: Mapping[str, str | float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Living({self.kind!r})"

    def _repr_html_(self) -> str:
        about = {"living": self.kind, "invitation": self.invitation, **self.data}
        given = " ".join(f'data-{name}="{escape(str(value))}"' for name, value in about.items())
        return f'<div class="living" {given}><div class="living-baked">{self.inside}</div></div>'


def example(
    model: PreTrainedModel, tokenizer: Tokenizer, edit: Edit, others: Sequence[tuple[str, str]] = ()
) -> Living:
    """What an edit that is in force did, as a page shows it before it is alive.

    others: (prompt, word) pairs; how likely the word is, before and now, stands beside each.
    """
    encoder, parts = Encoder(tokenizer, anatomy(model)), anatomy(model)
    fact = edit.facts[0]
    rows = encoder.continuations([(fact.text, fact.target_new), *others])
    with quiet(model):
        now = [found.probability for found in likelihoods(parts, rows)]
        edit.undo()
        try:
            before = [found.probability for found in likelihoods(parts, rows)]
        finally:
            edit.apply()
    texts = [(fact.text, fact.target_new), *others]
    lines = "".join(
        f"<tr><td>{escape(text)} …</td><td>{escape(word)}</td><td>{was:.2f} → {now_:.2f}</td></tr>"
        for (text, word), was, now_ in zip(texts, before, now, strict=True)
    )
    [update] = edit.updates.values()
    length = _why("emmet.html#one-column-of-multipliers-a-fact", "the length of Δ")
    cost = _why("preserving.html#counting-what-changes", "the preservation cost")
    return Living(
        "edit",
        f"<p>Here is one edit that the library made: <em>{escape(fact.text)}</em> "
        f"<strong>{escape(fact.target_new)}</strong>.</p>"
        '<table class="living-table"><thead><tr><th scope="col">sentence</th>'
        '<th scope="col">next word</th><th scope="col">probability, before → now</th></tr></thead>'
        f"<tbody>{lines}</tbody></table><p>One matrix was changed, by a Δ of length "
        f"{float(update.delta.norm()):.1f} {length} that costs "
        f"{update.diagnosis.preservation_error:.1f} {cost}.</p>",
        invitation="Edit a fact yourself",
    )


def _why(section: str, about: str) -> str:
    """A link to the section that explains a number, as the living page has them."""
    label = f"why? {about} (opens another tab)"
    return (
        f'<a class="living-why" href="{section}" target="_blank" rel="noopener" '
        f'aria-label="{label}">why?</a>'
    )


def restoring(fact: Fact, noise: float) -> Living:
    """Blur the subject of a fact that the model knows, put one state back, and see it answer.

    noise: its standard deviation, that of embeddings times a factor (:eq:`locate-corruption`).
    """
    said = f"<p><em>{escape(fact.text)}</em> <strong>{escape(fact.target_true or '')}</strong></p>"
    data: dict[str, str | float] = {
        "text": fact.text,
        "subject": fact.subject,
        "word": fact.target_true or "",
        "noise": float(f"{float(noise):.3g}"),
    }
    return Living("restoring", said, "Put one state back yourself", data)


def scripts(data: bytes) -> Iterator[str]:
    """The bytes as scripts, each of which hands one piece to `RECEIVER`."""
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    for number, piece in enumerate(pieces):
        text = base64.b64encode(piece).decode()
        yield f'{RECEIVER}({number},{len(pieces)},"{text}")\n'
