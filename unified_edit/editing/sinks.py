"""Subjects at the very beginning of a text, where many models read no word but an attention sink.

What stands at the first place is seen by every later token, and many models park their attention
there: whatever the word, it gets a state of its own kind (arXiv 2309.17453). A tokenizer that puts
BOS in front keeps words out of that place. Where it puts nothing, the key of a subject of one token
that begins its prompt is not the key that the same subject has in any other text.
"""

from __future__ import annotations

from torch import cosine_similarity

from unified_edit.model.anatomy import Anatomy
from unified_edit.model.hooks import quiet, read_last_token
from unified_edit.model.prompts import FactRows

#: Keys of one subject at the first place and elsewhere that are less alike than this are of two
#: kinds. Measured: at most .16 in blocks 1 to 28 of SmolLM2, where they are .77 or more between
#: other places; at least .61 on atlas, which has no sink.
ALIKE = 0.5


def check_first_place(parts: Anatomy, rows: FactRows, layer: int) -> list[str]:
    """A warning for each fact whose bare prompt has the subject's last token at a sink.

    It is one where the key at `layer` there has a cosine below `ALIKE` with the mean of those
    behind the prefixes, on the model as it is.
    """
    first = [i for i, row in enumerate(rows.bare) if row.subject == 0]
    if not first or len(rows.prefixes) == 1:
        return []
    chosen = rows.of(first)
    texts = [row.up_to_subject for behind in chosen.behind for row in behind]
    with quiet(parts.model):
        found = read_last_token(parts.model, texts, {layer: (parts.down(layer), "input")})
    keys = found[layer].double().cpu().unflatten(0, (-1, len(rows.prefixes)))
    cosines = cosine_similarity(keys[:, 0], keys[:, 1:].mean(dim=1), dim=1).tolist()
    return [
        f"the subject of {fact.text!r} is the first token that the model reads, and this model "
        "reads whatever stands there as the beginning of a text (an attention sink): the cosine of "
        f"its key at layer {layer} with those behind other words is {cosine:.2f}. The edit may "
        "take inside of texts and not in this prompt; put words in front of the subject: "
        f"Fact('It is known that {{}}{fact.suffix}', {fact.subject!r}, ...)"
        for fact, cosine in zip(chosen.facts, cosines, strict=True)
        if cosine < ALIKE
    ]
