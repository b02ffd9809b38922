"""The drawing that opens the book: an edit in thirty seconds."""

from __future__ import annotations

from collections.abc import Iterator

from unified_edit.teaching.drawings.pencil import (
    BLUE,
    HAIR,
    INK,
    LINE,
    ORANGE,
    TEXT,
    Drawing,
    arrow,
    box,
    drawn,
    label,
    line,
)

Answer = tuple[str, float]

#: The columns of the models before and after, and how long a probability of one is drawn.
COLUMNS, ONE = (130, 370), 118
LAYERS, EDITED = 6, 1


def story(
    before: Answer = ("Paris", 0.99),
    after: Answer = ("Rome", 0.97),
    neighbour: str = "The Louvre",
    stays: tuple[Answer, Answer] = (("Paris", 0.98), ("Paris", 0.95)),
) -> Drawing:
    """A model before and after an edit, and what it says about the tower and about a neighbour.

    Each answer is the most probable word and its probability; `stays` are those about the
    neighbour, before and after.
    """
    tower = "The Eiffel Tower is located in the city of"
    asked = f"{neighbour} is located in the city of"
    parts = [
        label(250, 28, f"“{tower} …”"),
        *(arrow((x, 42), (x, 74)) for x in COLUMNS),
        label(COLUMNS[0] - 14, 63, "before", anchor="end"),
        label(COLUMNS[1] + 14, 63, "after", anchor="start"),
        *_model(COLUMNS[0], edited=False),
        *_model(COLUMNS[1], edited=True),
        label(250, 126, "$+ Δ$"),
        arrow((212, 138), (288, 138), ink=ORANGE),
        label(250, 160, "one matrix"),
        label(250, 179, "in one layer"),
        *(arrow((x, 218), (x, 250)) for x in COLUMNS),
        *_answer(COLUMNS[0], 276, before, BLUE),
        *_answer(COLUMNS[1], 276, after, ORANGE),
        line((20, 320), (480, 320), width=HAIR, fade=0.4),
        label(250, 350, f"“{asked} …”"),
        *_answer(COLUMNS[0], 384, stays[0], BLUE),
        *_answer(COLUMNS[1], 384, stays[1], BLUE),
    ]
    said = [f"{word} with probability {probability:.2f}" for word, probability in (before, after)]
    kept = [f"{word} with {probability:.2f}" for word, probability in stays]
    return drawn(
        "story",
        500,
        414,
        parts,
        description=f"""A model of {LAYERS} layers continues “{tower}” by {said[0]}. To one matrix,
        in one of its layers, Δ is added. The edited model continues the same words by {said[1]}.
        “{asked}” is continued by {kept[0]} before the edit and, as ever, by {kept[1]} after it.""",
    )


def _model(x: float, *, edited: bool) -> Iterator[str]:
    """A model as a stack of layers, read from above."""
    yield box(x - 66, 78, 132, 136, round_by=8, width=HAIR)
    for layer in range(LAYERS):
        changed = edited and layer == EDITED
        look = (
            {"ink": ORANGE, "fill": ORANGE, "tint": 0.3} if changed else {"fill": INK, "tint": 0.07}
        )
        yield box(
            x - 54, 88 + 20 * layer, 108, 15, round_by=3, width=LINE if changed else 0, **look
        )


def _answer(x: float, y: float, answer: Answer, ink: str) -> Iterator[str]:
    """A word and its probability, as a number and as a bar."""
    word, probability = answer
    left = x - ONE / 2
    yield label(left, y, word, anchor="start", bold=True, size=TEXT + 2)
    yield label(left + ONE, y, f"{probability:.2f}".removeprefix("0"), anchor="end")
    yield box(left, y + 9, ONE, 7, width=0, fill=INK, tint=0.1)
    yield box(left, y + 9, ONE * probability, 7, width=0, fill=ink)
