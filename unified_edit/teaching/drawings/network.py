"""Drawings of what happens inside a transformer between a prompt and its answer."""

from __future__ import annotations

from collections.abc import Iterator

from unified_edit.teaching.drawings.pencil import (
    BLUE,
    BOLD,
    HAIR,
    INK,
    LINE,
    ORANGE,
    Drawing,
    Point,
    arrow,
    box,
    brace,
    cells,
    dot,
    dots,
    drawn,
    label,
    line,
    path,
    shape,
    units,
)

#: The prompt, shortened, and two places in it: the last token of the subject and the last of all.
TOKENS = ("The", "Eiffel", "Tower", "is", "…", "of")
SUBJECT, LAST = 2, 5


# --- a transformer --------------------------------------------------------------------------------

#: Streams: the first one, the distance between two, and how far right of its stream a part of a
#: block stands. Heights: where the streams begin, the lower edges of the blocks, and where the
#: streams are lost from sight.
FIRST, PITCH, ASIDE = 126, 65, 24
GROUND, BLOCKS, SKY = 572, (552, 410), 218
#: Heights in a block, above its lower edge: where attention reads, stands and is added; where the
#: MLP reads, stands and is added.
READS, ATTENTION, GATHERED, TAPS, MLP, ADDED, TALL = 8, 48, 64, 70, 90, 114, 126


def transformer() -> Drawing:
    """The residual streams of a prompt, two blocks, and the MLP of one of them opened."""
    opened, low = _stream(SUBJECT) + ASIDE, BLOCKS[1] - MLP - 9
    parts = [
        path(
            f"M10 16 a8 8 0 0 1 8 -8 H396 a8 8 0 0 1 8 8 V170 a16 16 0 0 1 -6 13 "
            f"L{units(opened + 12, low)} h-24 L16 183 a16 16 0 0 1 -6 -13 Z",
            width=0,
            fill=BLUE,
            tint=0.1,
        ),
        *_opened_mlp(),
        label(104, SKY + 19, "more blocks", anchor="end"),
    ]
    for token, word in enumerate(TOKENS):
        parts += _token(token, word)
    for number, edge in enumerate(BLOCKS):
        parts += _block(edge, number)
    return drawn(
        "transformer",
        500,
        654,
        parts,
        description="""The tokens The, Eiffel, Tower, is, …, of stand in a row. From each of them a
        line, its residual stream, goes up through blocks. In each block attention reads the
        streams of a token and of those before it, and adds to the token's stream; then an MLP
        reads this one stream only, and adds to it too. The answer, Paris, is read off at the top
        of the last token's stream. The MLP of block 1 at Tower, the last token of the subject, is
        opened: a matrix W_in makes a longer vector, a nonlinearity makes the key k of it, and
        the down-projection W₀ makes the shorter value W₀k, which is added to the stream.""",
    )


def _stream(token: int) -> float:
    """Where the stream of a token is."""
    return FIRST + PITCH * token


def _token(token: int, word: str) -> Iterator[str]:
    """A word, its stream, and what is said about it."""
    x, marked = _stream(token), token in (SUBJECT, LAST)
    width = BOLD if marked else LINE
    ground = GROUND
    for edge in BLOCKS:
        for height in (GATHERED, ADDED):
            yield line((x, ground), (x, edge - height + 6), width=width)
            yield _plus((x, edge - height))
            ground = edge - height - 6
    yield line((x, ground), (x, SKY + 30), width=width)
    yield dots((x, SKY + 14))
    yield dot((x, GROUND), 3.5)
    yield label(x, GROUND + 21, word, bold=marked)
    if token == LAST:
        yield arrow((x, SKY), (x, 54), width=width)
        yield label(x, 40, "Paris", bold=True, size=17)
    if marked:
        side, at = ("middle", x) if token == SUBJECT else ("end", x + 44)
        yield arrow((x, GROUND + 42), (x, GROUND + 27), size=6, width=HAIR)
        yield label(at, GROUND + 56, "last token", anchor=side, size=14)
        whole = "subject" if token == SUBJECT else "prompt"
        yield label(at, GROUND + 73, f"of the {whole}", anchor=side, size=14)


def _plus(at: Point) -> str:
    """The sign for: is added here."""
    x, y = at
    return "\n".join((
        dot(at, 6, fill="none", width=HAIR),
        line((x - 3, y), (x + 3, y), width=HAIR),
        line((x, y - 3), (x, y + 3), width=HAIR),
    ))  # fmt: skip


def _block(edge: float, number: int) -> Iterator[str]:
    """Attention and MLP of a block whose lower edge is at `edge`."""
    yield box(FIRST - 16, edge - TALL, PITCH * LAST + 58, TALL, round_by=8, width=HAIR, fade=0.3)
    yield label(104, edge - TALL + 13, f"block {number}", anchor="end", bold=True)
    yield label(104, edge - MLP + 5, "MLP", anchor="end")
    yield label(104, edge - ATTENTION + 5, "attention", anchor="end")
    if number == 0:
        yield label(104, edge - MLP + 22, "each alone", anchor="end", size=13)
        yield label(104, edge - ATTENTION + 22, "tokens meet", anchor="end", size=13)
    for token in range(len(TOKENS)):
        x = _stream(token)
        at = x + ASIDE
        for earlier in range(token + 1):
            start = (_stream(earlier), edge - READS)
            yield line(start, (at, edge - ATTENTION + 8), width=HAIR, fade=0.4)
        yield dot((at, edge - ATTENTION), 8, fill=INK, tint=0.12, width=HAIR)
        yield arrow(
            (at - 6, edge - ATTENTION - 6), (x + 7, edge - GATHERED + 1), size=5, width=HAIR
        )
        opened = token == SUBJECT and number == 1
        ink, tint = (BLUE, 0.35) if opened else (INK, 0.12)
        yield line((x, edge - TAPS), (at, edge - MLP + 9), width=HAIR, fade=0.4)
        yield box(at - 12, edge - MLP - 9, 24, 18, width=HAIR, ink=ink, fill=ink, tint=tint)
        yield arrow((at, edge - MLP - 9), (x + 7, edge - ADDED + 1), size=5, width=HAIR)


def _opened_mlp() -> Iterator[str]:
    """The two matrices of an MLP, and the vectors before, between and behind them."""
    middle, short, tall = 86, 24, 66
    yield cells(24, middle - short, 4, 12)
    yield label(30, middle + short + 22, "$y$")
    yield shape((46, middle - short), (108, middle - tall), (108, middle + tall),
                (46, middle + short), width=HAIR, fill=INK, tint=0.07)  # fmt: skip
    yield label(82, middle + 6, "$W_{in}$")
    yield arrow((115, middle), (153, middle), size=7)
    yield label(133, middle - 10, "act")
    yield cells(160, middle - tall, 11, 12, fill=BLUE, tint=0.35, ink=BLUE)
    yield shape((184, middle - tall), (246, middle - short), (246, middle + short),
                (184, middle + tall), width=HAIR, fill=INK, tint=0.07)  # fmt: skip
    yield label(212, middle + 6, "$W_0$")
    yield cells(258, middle - short, 4, 12)
    yield arrow((277, middle), (301, middle), size=7)
    yield label(308, middle - 4, "added to", anchor="start", size=14)
    yield label(308, middle + 14, "the stream", anchor="start", size=14)
    yield label(166, middle + tall + 22, "key $k$")
    yield label(252, middle + tall + 22, "value $W_0k$", anchor="start")
    yield line((264, middle + short + 6), (264, middle + tall + 4), width=HAIR, fade=0.4)


# --- the three runs of causal tracing -------------------------------------------------------------

#: Columns and rows of the small pictures, row 0 being the embeddings; which state is restored; and
#: how probable the answer is drawn.
STEP, RISE, ROWS = 33, 30, 4
RESTORED = (SUBJECT, 2)
ANSWERS = {"clean": 0.95, "corrupted": 0.08, "restored": 0.7}


def three_runs() -> Drawing:
    """Causal tracing: the clean, the corrupted and the restored run."""
    left, right, high, low = 22, 268, 30, 296
    x, y = _state((left, low), *RESTORED)
    gap, above = x + STEP / 2, _state((left, high), *RESTORED)[1]
    parts = [
        *_run((left, high), "clean"),
        *_run((right, high), "corrupted"),
        *_run((left, low), "restored"),
        path(f"M{units(x + 7, above)} H{units(gap - 6)} q6 0 6 6 V{units(y - 6)} q0 6 -6 6",
             ink=BLUE),
        arrow((gap - 6, y), (x + 9, y), ink=BLUE, size=7),
        label(right, low + 16, "States", anchor="start", bold=True),
    ]  # fmt: skip
    for place, (kind, text) in enumerate(
        (("clean", "as in the clean run"), ("corrupted", "as in the corrupted run"),
         ("restored", "computed anew"))
    ):  # fmt: skip
        at = low + 42 + 26 * place
        parts += [_mark((right + 7, at - 5), kind), label(right + 24, at, text, anchor="start")]
    return drawn(
        "three_runs",
        500,
        520,
        parts,
        description="""Three runs of one prompt, drawn as grids of states: a column for each token,
        a row for the embeddings and one for each layer, and on top of the last token's column the
        probability of the answer. In the clean run it is high. In the corrupted run noise is added
        to the embeddings of the subject's tokens; all states that depend on them are corrupted,
        and the probability is low. The restored run is corrupted by the same noise, but one state,
        at the last token of the subject, is copied from the clean run; the states in later layers,
        at this token and those behind it, are computed anew from it, and part of the probability
        comes back.""",
    )


def _state(corner: Point, token: int, row: int) -> Point:
    """Where a state stands in the picture with this upper left corner."""
    return corner[0] + 6 + STEP * token, corner[1] + 62 + RISE * (ROWS - 1 - row)


def _mark(at: Point, kind: str) -> str:
    """A state that is clean, corrupted, or computed anew after one was restored."""
    x, y = at
    if kind == "clean":
        return dot(at, 6, fill=BLUE)
    if kind == "corrupted":
        return dot(at, 6, fill="none", width=LINE, ink=ORANGE, dash="2.5 3")
    half = path(f"M{units(x, y - 6)} a6 6 0 0 0 0 12 Z", width=0, fill=BLUE)
    return half + "\n" + dot(at, 6, fill="none", width=LINE, ink=BLUE)


def _run(corner: Point, run: str) -> Iterator[str]:
    """One of the small pictures."""
    x, y = corner
    ground = _state(corner, 0, 0)[1]
    yield label(x, y, run, anchor="start", bold=True)
    for token in range(len(TOKENS)):
        for row in range(ROWS):
            if row:
                (a, b), (_, c) = _state(corner, token, row - 1), _state(corner, token, row)
                yield line((a, b - 9), (a, c + 9), width=HAIR, fade=0.4)
            clean = run == "clean" or (row == 0 and token > SUBJECT)
            clean = clean or (run == "restored" and (token, row) == RESTORED)
            anew = run == "restored" and token >= RESTORED[0] and row > RESTORED[1]
            kind = "clean" if clean else "restored" if anew else "corrupted"
            yield _mark(_state(corner, token, row), kind)
        if run != "clean" and token <= SUBJECT:
            at = _state(corner, token, 0)[0]
            yield label(at, ground + 27, "$+ξ$", size=13)
    ends = [(_state(corner, token, 0)[0], ground + 34) for token in (0, SUBJECT)]
    yield brace((ends[0][0] - 6, ends[0][1]), (ends[1][0] + 6, ends[1][1]))
    yield label((ends[0][0] + ends[1][0]) / 2, ground + 62, "subject", size=14)
    last, top = _state(corner, LAST, ROWS - 1)
    yield label(last + 8, ground + 62, "last token", anchor="end", size=14)
    yield arrow((last, top - 9), (last, y + 25), size=7)
    yield label(last - 60, y, "Paris", anchor="start")
    yield box(last - 60, y + 8, 68, 9, width=0, fill=INK, tint=0.1)
    yield box(last - 60, y + 8, 68 * ANSWERS[run], 9, width=0, fill=BLUE)
