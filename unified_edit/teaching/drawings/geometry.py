"""Drawings whose lines are computed: keys and values as points of a plane."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from unified_edit.errors import UnifiedEditError
from unified_edit.teaching.drawings.pencil import (
    BLUE,
    BOLD,
    HAIR,
    ORANGE,
    Drawing,
    Point,
    arrow,
    box,
    dot,
    drawn,
    label,
    line,
    path,
    units,
)

Matrix = tuple[Point, Point]
Place = Callable[[Point], Point]


def dot_product(a: Point, b: Point) -> float:
    """Of two vectors of the plane."""
    return a[0] * b[0] + a[1] * b[1]


def times(matrix: Matrix, x: Point) -> Point:
    """A matrix, given by its rows, times a vector."""
    return dot_product(matrix[0], x), dot_product(matrix[1], x)


def inverse(matrix: Matrix) -> Matrix:
    """Of a matrix of two rows and columns."""
    (a, b), (c, d) = matrix
    det = a * d - b * c
    return (d / det, -b / det), (-c / det, a / det)


def at_angle(degrees: float, length: float = 1) -> Point:
    """The vector of an angle against the axis to the right, counterclockwise."""
    turn = math.radians(degrees)
    return length * math.cos(turn), length * math.sin(turn)


# --- a key and its value --------------------------------------------------------------------------

#: What the drawing shows is computed from these: the key and the residual of the fact, and W0.
KEY, RESIDUAL = (-0.1, 1.1), (0.58, 0.44)
W0: Matrix = ((0.77, -0.12), (-0.29, 0.75))


def ordinary_keys(count: int = 22) -> list[Point]:
    """Keys of ordinary text: a long, narrow cloud around zero, each with its opposite."""
    keys = []
    for place in range(count // 2):
        radius, turn = math.sqrt((place + 0.5) / (count // 2)), place * math.pi * (3 - 5**0.5)
        long, short = 0.95 * radius * math.cos(turn), 0.16 * radius * math.sin(turn)
        (a, b), (c, d) = at_angle(14), at_angle(104)
        x = (a * long + c * short, b * long + d * short)
        keys += [x, (-x[0], -x[1])]
    return keys


def second_moment(keys: list[Point]) -> Matrix:
    """C0: the mean of k kᵀ."""
    xx, xy, yy = (sum(k[i] * k[j] for k in keys) / len(keys) for i, j in ((0, 0), (0, 1), (1, 1)))
    return (xx, xy), (xy, yy)


def rank_one_update(C0: Matrix, k: Point, r: Point) -> Matrix:
    """Delta = r kᵀ C0⁻¹ / (kᵀ C0⁻¹ k): moves the value of k by r, and others least."""
    row = times(inverse(C0), k)
    scale = dot_product(row, k)
    return (
        (r[0] * row[0] / scale, r[0] * row[1] / scale),
        (r[1] * row[0] / scale, r[1] * row[1] / scale),
    )


def key_to_value() -> Drawing:
    """Keys, their values under W0, and where Δ moves the values to."""
    others = ordinary_keys()
    C0 = second_moment(others)
    delta = rank_one_update(C0, KEY, RESIDUAL)
    keys, values = _plane(112, 198, 92), _plane(394, 198, 92)
    old = times(W0, KEY)
    new = (old[0] + RESIDUAL[0], old[1] + RESIDUAL[1])
    (kx, ky), (ox, oy), (nx, ny) = keys(KEY), values(old), values(new)
    parts = [
        *_frame(8, "keys"),
        *_frame(288, "values"),
        _ellipse(C0, keys),
        *(dot(keys(x), 2.4, tint=0.7) for x in others),
        *(_moved(values, times(W0, x), times(delta, x)) for x in others),
        arrow(keys((0, 0)), keys(KEY), ink=BLUE, width=BOLD, size=10),
        label(kx + 12, ky + 8, "$k$", anchor="start"),
        label(112, 252, "$C_0$: all other keys"),
        arrow((226, 128), (278, 128)),
        label(252, 116, "$W_0$"),
        arrow((226, 190), (278, 190), ink=ORANGE),
        label(252, 178, "$W_0+Δ$"),
        arrow(values((0, 0)), values(old), ink=BLUE, width=BOLD, size=10),
        arrow((ox, oy), (nx, ny), ink=ORANGE, width=BOLD, size=10),
        label(ox - 8, oy + 2, "$W_0k$", anchor="end"),
        label((ox + nx) / 2 + 10, (oy + ny) / 2 + 18, "$r$"),
        label(nx, ny - 12, "$W_0k+r$"),
        label(390, 252, "nearly unmoved"),
    ]
    moves = [math.hypot(*times(delta, x)) for x in others]
    share = max(moves) / math.hypot(*RESIDUAL)
    return drawn(
        "key_to_value",
        500,
        276,
        parts,
        description=f"""Left a plane of keys: an arrow, the key k of the fact, and a narrow cloud of
        points around zero, all other keys, with an ellipse that stands for their second moment C₀.
        k points out of the cloud. Right the plane of values. W₀ takes k to W₀k; W₀+Δ takes it to
        W₀k+r. The values of the other keys move along r too, but by at most {share:.0%} of its
        length.""",
    )


def _plane(x: float, y: float, unit: float) -> Place:
    """Where the points of a plane are on the sheet whose zero is at (x, y)."""
    return lambda point: (x + unit * point[0], y - unit * point[1])


def _frame(left: float, name: str) -> Iterator[str]:
    """The edge of a plane and its name."""
    yield label(left, 22, name, anchor="start", bold=True)
    yield box(left, 34, 204, 234, round_by=8, width=HAIR, fade=0.35)


def _ellipse(moment: Matrix, place: Place) -> str:
    """All x with xᵀ C0⁻¹ x = 4, which holds nearly all keys."""
    (a, b), (_, c) = moment
    # The columns of the Cholesky factor turn a circle into the ellipse.
    l11 = math.sqrt(a)
    l21 = b / l11
    l22 = math.sqrt(c - l21 * l21)
    corners = []
    for step in range(72):
        u, v = at_angle(5 * step, 2.05)
        corners.append(place((l11 * u, l21 * u + l22 * v)))
    steps = " L".join(units(*corner) for corner in corners)
    return path(f"M{steps} Z", width=HAIR, dash="3 3")


def _moved(place: Place, value: Point, by: Point) -> str:
    """The value of another key, and the little way that it goes."""
    end = (value[0] + by[0], value[1] + by[1])
    return (
        line(place(value), place(end), ink=ORANGE, width=HAIR)
        + "\n"
        + dot(place(value), 2.2, tint=0.6)
    )


# --- two whitened keys ----------------------------------------------------------------------------

#: How long a whitened key is drawn, where all arrows begin, and the angles for which there is room.
UNIT, ORIGIN, ANGLES = 80, (260, 146), (20, 130)


def duals(a1: Point, a2: Point) -> tuple[Point, Point]:
    """The vectors whose product with aᵢ is 1 for their own i and 0 else: columns of A(AᵀA)⁻¹."""
    gram = (
        (dot_product(a1, a1), dot_product(a1, a2)),
        (dot_product(a2, a1), dot_product(a2, a2)),
    )
    (p, q), (s, t) = inverse(gram)
    return (
        (p * a1[0] + s * a2[0], p * a1[1] + s * a2[1]),
        (q * a1[0] + t * a2[0], q * a1[1] + t * a2[1]),
    )


def whitened_keys(degrees: float = 40, dual: str = "n") -> Drawing:
    """Two whitened keys of length one at an angle, and the dual vectors that tell them apart.

    The longer a dual vector, the more it costs to write one fact and leave the other alone: its
    squared length is the crowding, :eq:`emmet-crowding`.

    degrees: the angle between the keys, 20 to 130; the drawing's name tells it. dual: the letter of
    the dual vectors. Raises UnifiedEditError for an angle that has no room.
    """
    if not ANGLES[0] <= degrees <= ANGLES[1]:
        raise UnifiedEditError(
            f"an angle of {degrees:g}° has no room; choose one from {ANGLES[0]} to {ANGLES[1]}"
        )
    a1, a2 = at_angle(90 + degrees / 2), at_angle(90 - degrees / 2)
    n1, n2 = duals(a1, a2)
    place = _plane(*ORIGIN, UNIT)
    parts = [
        path(_arc(place, 0, 180, 1), width=HAIR, fade=0.4, dash="2 4"),
        path(_arc(place, 90 - degrees / 2, 90 + degrees / 2, 0.34), width=HAIR),
        label(ORIGIN[0], ORIGIN[1] - 0.34 * UNIT - 8, "$θ$", size=14),
    ]
    for key, long, other, number in ((a1, n1, a2, 1), (a2, n2, a1, 2)):
        along = long[0] / math.hypot(*long), long[1] / math.hypot(*long)
        x, y = place(key)
        tip = place(long)
        parts += [
            line((x, y), tip, width=HAIR, dash="3 4"),
            _right_angle(place, (0, 0), along, other),
            arrow(ORIGIN, tip, ink=ORANGE, width=BOLD, dash="7 5", size=10),
            arrow(ORIGIN, (x, y), ink=BLUE, width=BOLD, size=10),
            label(x + 18 * key[0], y - 18 * key[1] + 5, f"$a_{number}$"),
            label(tip[0], tip[1] + 24, f"${dual}_{number}$")
            if degrees <= 90
            else label(tip[0] + 18 * along[0], tip[1] - 18 * along[1] + 4, f"${dual}_{number}$"),
        ]
    length = math.hypot(*n1)
    parts += [
        label(260, 184, f"$θ = {degrees:g}°$"),
        label(260, 210, f"$‖{dual}_1‖ = 1/{{sin}} θ = {length:.2f}$"),
        label(260, 236, f"crowding $1/{{sin}}^2 θ = {length**2:.2f}$"),
    ]
    return drawn(
        f"whitened_keys-{degrees:g}",
        520,
        250,
        parts,
        description=f"""Two arrows of length one, the whitened keys a1 and a2, at an angle of
        {degrees:g} degrees. Two dashed arrows, their dual vectors: {dual}1 is perpendicular to a2
        and has the product 1 with a1, and the other way round for {dual}2. The dual vectors are
        1/sin θ = {length:.2f} long, so the crowding, their squared length, is {length**2:.2f}.""",
    )


def _arc(place: Place, start: float, stop: float, radius: float) -> str:
    """Steps along a circle around zero."""
    (x0, y0), (x1, y1) = place(at_angle(start, radius)), place(at_angle(stop, radius))
    r = UNIT * radius
    return f"M{units(x0, y0)} A{units(r, r)} 0 0 0 {units(x1, y1)}"


def _right_angle(place: Place, at: Point, one: Point, other: Point, size: float = 0.14) -> str:
    """The sign of a right angle between two directions of length one."""
    corners = [
        place(
            (at[0] + size * (u * one[0] + v * other[0]), at[1] + size * (u * one[1] + v * other[1]))
        )
        for u, v in ((1, 0), (1, 1), (0, 1))
    ]
    return line(*corners, width=HAIR, fade=0.7)
