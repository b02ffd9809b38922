"""Unified Concept Editing is the objective of this library: algebra, on random matrices."""

from __future__ import annotations

import pytest
import torch
from reference_methods import uce_weight
from torch import Tensor

from unified_edit.concepts import (
    ERASE,
    OBJECT_PHRASINGS,
    Balance,
    ConceptMethod,
    preserved_metric,
    solve_concepts,
)
from unified_edit.concepts.solving import through
from unified_edit.errors import MethodError
from unified_edit.objective import solve

#: Layers of cross-attention in Stable Diffusion 1 by the length of their values.
SD_1 = (320,) * 5 + (640,) * 5 + (1280,) * 6
D_TEXT = 768


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.equation("concepts-published", "concepts-update", "concepts-map")
@pytest.mark.parametrize("scales", [(0.5, 1.0, 1.0), (0.1, 3.0, 0.25), (2.0, 0.5, 7.0)], ids=str)
@pytest.mark.parametrize(("concepts", "preserved"), [(1, 0), (3, 5), (5, 40), (40, 3)])
def test_the_published_weight(
    concepts: int, preserved: int, scales: tuple[float, float, float]
) -> None:
    """The published inverse has a condition of at most 1e3 here, so that 1e-13 is its rounding."""
    lam, a, b = scales
    d = 24
    C, G, P = (random(d, n, seed=n + s) for s, n in enumerate((concepts, concepts, preserved)))
    W0 = random(16, d, seed=9)
    D = solve_concepts(preserved_metric(P, lam=lam, weight=b), C, G - C, weight=a)
    columns = [(C[:, i], W0 @ G[:, i]) for i in range(concepts)]
    published = uce_weight(W0, columns, list(P.unbind(1)), lam, a, b)
    assert relative(W0 + W0 @ D.delta, published) < 1e-13
    # as it is written in the book, for this one matrix
    metric = lam * torch.eye(d, dtype=torch.float64) + b * P @ P.mT
    alone = solve(metric, C, W0 @ G - W0 @ C, ridge=1 / a)
    assert relative(W0 + alone.delta, published) < 1e-13


@pytest.mark.equation("concepts-objective")
def test_nothing_is_cheaper() -> None:
    """The gradient of the three costs vanishes at W0 (I + D): the least of a convex sum."""
    lam, a, b = 0.3, 2.0, 1.5
    C, G, P, W0 = random(24, 3), random(24, 3, seed=1), random(24, 6, seed=2), random(16, 24)
    D = solve_concepts(preserved_metric(P, lam=lam, weight=b), C, G - C, weight=a)
    W = (W0 + W0 @ D.delta).requires_grad_()
    cost = lam * (W - W0).square().sum() + b * ((W - W0) @ P).square().sum()
    cost = cost + a * (W @ C - W0 @ G).square().sum()
    (gradient,) = torch.autograd.grad(cost, W)
    assert float(gradient.norm()) < 1e-12 * float(W0.norm() * C.norm() ** 2)


def test_one_concept_is_reached_up_to_lam() -> None:
    """D c = r (c'c) / (lam + c'c) for one concept: what is missed is lam / (lam + c'c)."""
    c, r = random(24, 1), random(24, 1, seed=1)
    D = solve_concepts(preserved_metric(random(24, 0), lam=0.5), c, r)
    size = float(c.square().sum())
    torch.testing.assert_close(D.delta @ c, r * size / (0.5 + size), rtol=1e-13, atol=0)


def test_edits_in_force_are_one_map() -> None:
    C, P, X = random(24, 2), random(24, 3, seed=1), random(24, 4, seed=2)
    maps = [solve_concepts(preserved_metric(P), C, random(24, 2, seed=s)) for s in (3, 4)]
    every = torch.eye(24, dtype=torch.float64) + maps[0].delta + maps[1].delta
    torch.testing.assert_close(through(maps, X), every @ X, rtol=1e-13, atol=1e-13)
    assert torch.equal(through([], X), X)


def test_one_map_serves_all_matrices_at_real_shapes() -> None:
    """The 32 matrices of Stable Diffusion 1.4, 10 concepts erased and 100 preserved.

    One factor and one solution serve them all; `benchmarks/concepts.py` says how fast. With keys as
    long as CLIP's (28) the published inverse has a condition of 2e4.
    """
    keys = random(D_TEXT, 120)
    C, G, P = (28 * one / one.norm(dim=0) for one in keys.split([10, 10, 100], dim=1))
    weights = [random(d_out, D_TEXT, seed=i) / 28 for i, d_out in enumerate(SD_1 * 2)]
    D = solve_concepts(preserved_metric(P), C, G - C)
    updates = [(W0 @ D.left) @ D.right for W0 in weights]
    assert len(updates) == 32
    for which in (0, 31):
        W0 = weights[which]
        edited = [(C[:, i], W0 @ G[:, i]) for i in range(10)]
        literal = uce_weight(W0, edited, list(P.unbind(1)))
        assert relative(W0 + updates[which], literal) < 1e-12


def test_bad_numbers() -> None:
    C = random(24, 2)
    with pytest.raises(MethodError, match="lam is 0; it must be a finite number > 0"):
        preserved_metric(C, lam=0)
    with pytest.raises(MethodError, match="weight of preserved concepts is -1"):
        preserved_metric(C, weight=-1)
    with pytest.raises(MethodError, match="weight of edited concepts is 0"):
        solve_concepts(preserved_metric(C), C, C, weight=0)
    with pytest.raises(MethodError, match=r"lam = 1e-30 is nothing beside.*give a larger one"):
        preserved_metric(C, lam=1e-30)
    for field, value in {
        "name": "", "guide": 3, "lam": -1, "edit_weight": 0, "preserve_weight": float("nan"),
        "preserve_at": "first", "phrasings": ("no slot",), "balance": 3,
    }.items():  # fmt: skip
        with pytest.raises(
            MethodError, match=field.replace("_", ".") if field != "name" else "name"
        ):
            ERASE.replace(**{field: value})
    with pytest.raises(MethodError, match="has no field 'lamb'"):
        ERASE.replace(lamb=1)
    for field in ("rounds", "images", "steps", "tolerance", "step"):
        with pytest.raises(MethodError, match=f"Balance: {field} is 0"):
            Balance(**{field: 0})


def test_methods_are_data() -> None:
    method = ERASE.replace(lam=0.1, phrasings=OBJECT_PHRASINGS, balance=Balance(rounds=3))
    assert ConceptMethod.from_dict(method.to_dict()) == method
    assert method.phrased("cat")[:2] == ["cat", "image of cat"]
    assert method.phrased("")[:2] == ["", "image of"]
