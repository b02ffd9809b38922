"""Closed forms of other papers against their literal formulas: random matrices in float64."""

from __future__ import annotations

import pytest
import reference_methods as code
import torch
from recipe import relative
from test_metrics import alphaedit
from test_objective import Problem

from unified_edit.editing import norm_anchor_of
from unified_edit.editing.anchors import anchored
from unified_edit.errors import InfeasibleError, MethodError, ObjectiveError
from unified_edit.objective import Budget, Metric, MetricProtocol, NullSpace, divided, solve


@pytest.fixture
def p() -> Problem:
    """d_in 24, E 5, d_out 7; eigenvalues of C0 from 1 to 1e-4, 14 of 24 below 2e-2."""
    return Problem(0, 24, 5, 7, cond_C0=1e4)


# --- null spaces ---


@pytest.mark.parametrize("L2", [1.0, 10.0])
@pytest.mark.parametrize("before", [0, 4])
def test_alphaedit(p: Problem, L2: float, before: int) -> None:
    """Both the printed formula and the code's own lines, with keys of earlier edits."""
    Kp = p.normal(24, before)
    P = code.get_project(p.C0, 2e-2)
    metric: MetricProtocol = NullSpace(Metric(p.C0))
    if before:
        metric = metric.plus(Kp, 1 / L2)
    K = p.normal(24, 5)
    update = solve(metric, K, p.R, ridge=L2)
    assert relative(update.delta, code.alphaedit_delta(P, Kp @ Kp.T, K, p.R, L2)) <= 1e-11
    assert relative(update.delta, code.alphaedit_as_printed(P, Kp, K, p.R, L2)) <= 1e-11
    assert relative(update.delta @ P, update.delta) <= 1e-13
    leaked = torch.trace(update.delta @ p.C0 @ update.delta.T)
    history = (update.delta @ Kp).square().sum() / L2
    assert update.diagnosis.preservation_error == pytest.approx(float(leaked + history), rel=1e-11)


def test_steps_in_a_null_space_add_up(p: Problem) -> None:
    """The history is right if two batches one after another are one solve with both."""
    first, second, R = p.normal(24, 5), p.normal(24, 4), p.normal(7, 9)
    space = NullSpace(p.C0)
    one = solve(space, first, R[:, :5], ridge=2.0).delta
    rest = R[:, 5:] - one @ second
    two = solve(space.plus(first, 1 / 2.0), second, rest, ridge=2.0).delta
    at_once = solve(space, torch.cat([first, second], dim=1), R, ridge=2.0).delta
    assert relative(one + two, at_once) <= 1e-12


def test_both_sides_constraints(p: Problem) -> None:
    """The fourth corner: facts are held exactly by an update in the null space."""
    K = p.normal(24, 5)
    update = solve(NullSpace(p.C0), K, p.R)
    assert (
        relative(update.delta, code.hard_hard_delta(code.get_project(p.C0, 2e-2), K, p.R)) < 1e-11
    )
    assert relative(update.delta @ K, p.R) <= 1e-12
    assert update.diagnosis.form == "equality"
    many = p.normal(24, 15)
    with pytest.raises(InfeasibleError, match="more than the 14 dimensions of a key that the metr"):
        solve(NullSpace(p.C0), many, p.normal(7, 15))


@pytest.mark.parametrize(("threshold", "relative_"), [(2e-2, False), (1e-3, False), (3e-3, True)])
def test_what_a_projector_keeps(p: Problem, threshold: float, relative_: bool) -> None:
    C0 = 5 * p.C0
    space = NullSpace(C0, threshold, relative=relative_)
    P = code.get_project(C0, threshold * (5 if relative_ else 1))
    assert space.kept == pytest.approx(float(P.trace()) / 24)
    assert relative(space.basis @ space.basis.T, P) <= 1e-10
    assert f"kept={100 * space.kept:.1f} %" in repr(space)
    again = NullSpace(C0, threshold, relative=relative_, basis=space.basis)
    assert torch.equal(again.whiten(p.K), space.whiten(p.K))


def test_dead_coordinates_lie_in_the_null_space(p: Problem) -> None:
    """A neuron that no preserved key has costs nothing, for AlphaEdit's projector too."""
    C0 = torch.zeros(26, 26, dtype=torch.float64)
    C0[1:25, 1:25] = p.C0
    space = NullSpace(Metric(C0))
    assert relative(space.basis @ space.basis.T, code.get_project(C0, 2e-2)) <= 1e-10
    K = p.normal(26, 3)
    update = solve(space, K, p.R[:, :3], ridge=1.0)
    P = code.get_project(C0, 2e-2)
    wanted = code.alphaedit_as_printed(P, K[:, :0], K, p.R[:, :3], 1.0)
    assert relative(update.delta, wanted) <= 1e-11


def test_a_key_outside_of_the_null_space(p: Problem) -> None:
    space = NullSpace(p.C0)
    K = p.normal(24, 2)
    outside = K - space.basis @ (space.basis.T @ K)
    assert not space.whiten(outside).any()
    with pytest.raises(InfeasibleError):
        solve(space, outside, p.R[:, :2])


def test_wrong_null_spaces(p: Problem) -> None:
    with pytest.raises(ObjectiveError, match=r"null space is empty: no eigenvalue .*below 1e-05"):
        NullSpace(p.C0, 1e-5)
    for threshold in (0.0, -1.0, float("nan"), "0.02"):
        with pytest.raises(ObjectiveError, match="the threshold is"):
            NullSpace(p.C0, threshold)  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match="relative is 1; it must be True or False"):
        NullSpace(p.C0, relative=1)  # type: ignore[arg-type]


def test_with_everything_kept_it_is_memit_of_the_identity(p: Problem) -> None:
    """FIELD's third finding: with P = I AlphaEdit is MEMIT with lam C0 := L2 I."""
    update = solve(NullSpace(p.C0, 2.0), p.K, p.R, ridge=10.0)
    flat = solve(Metric.identity(24), p.K, p.R, ridge=10.0)
    assert relative(update.delta, flat.delta) <= 1e-12
    assert relative(update.delta, alphaedit(torch.eye(24).double(), p.K[:, :0], p.K / 10**0.5,
                                            p.R / 10**0.5)) <= 1e-12  # fmt: skip


# --- divided by another key ---


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("E", [1, 5])
def test_divided_by_another_key(p: Problem, E: int, ridge: float) -> None:
    K, R = p.K[:, :E], p.R[:, :E]
    D = K + 0.1 * p.normal(24, E)
    inverse = torch.linalg.inv(p.C0)
    damping = ridge * torch.eye(E, dtype=torch.float64)
    wanted = R @ torch.linalg.inv(K.T @ inverse @ D + damping) @ K.T @ inverse
    update = solve(p.C0, K, divided(p.C0, K, D, R, ridge=ridge), ridge=ridge)
    assert relative(update.delta, wanted) <= 1e-9
    if ridge == 0:
        assert relative(update.delta @ D, R) <= 1e-9
    assert relative(divided(p.C0, K, K, R, ridge=ridge), R) <= 1e-9


def test_keys_that_do_not_reach_each_other() -> None:
    K, D = torch.eye(4, dtype=torch.float64)[:, :1], torch.eye(4, dtype=torch.float64)[:, 1:2]
    with pytest.raises(InfeasibleError, match="has no inverse: the update's rows do not reach"):
        divided(Metric.identity(4), K, D, torch.ones(3, 1).double())


# --- the norm of Delta ---


@pytest.mark.parametrize("before", [0, 6])
def test_encore_s_norm_term(p: Problem, before: int) -> None:
    """w C0 + A + K K^T + lam_n I, of the metric C0 + (lam_n / w) I and its history."""
    w, lam_n = 20_000.0, 10.0
    Kp = p.normal(24, before)
    metric = Metric(p.C0).plus(torch.eye(24, dtype=torch.float64), lam_n / w)
    if before:
        metric = metric.plus(Kp, 1 / w)
    found = solve(metric, p.K, p.R, ridge=w).delta
    assert relative(found, code.encore_delta(p.C0, Kp @ Kp.T, p.K, p.R, w, lam_n)) <= 1e-9


# --- lam by a budget ---


@pytest.mark.parametrize("alpha", [1.5, 60.0])
def test_lyaplock(p: Problem, alpha: float) -> None:
    """Each batch of its code is one solve for all pairs so far, with the budget's lam."""
    W0, weight = p.normal(7, 24), 0.05
    batches = [(p.normal(24, 3), p.normal(7, 3)) for _ in range(6)]
    literal = code.lyaplock(W0, p.C0, batches, weight, alpha)
    metric, budget = Metric(p.C0), Budget(weight=weight, alpha=alpha)
    total = torch.zeros_like(W0)
    K, R = p.normal(24, 0), p.normal(7, 0)
    ridges = []
    for (keys, residual), W in zip(batches, literal, strict=True):
        ridges.append(budget.ridge)
        K = torch.cat([K, keys], dim=1)
        asked = torch.cat([R, residual + total @ keys], dim=1)
        update = solve(metric, K, asked, ridge=budget.ridge)
        total = update.delta
        assert relative(W0 + total, W) <= 1e-8  # condition of A: 1e7
        R = torch.cat([R, total @ keys], dim=1)
        budget = budget.after(update.diagnosis.preservation_error)
    # the budget is met by the large one and exceeded by the small one
    assert (len(set(ridges)) > 1) == (alpha < 10)
    assert min(ridges) == weight


def test_wrong_budgets() -> None:
    for name in ("weight", "alpha", "queue"):
        with pytest.raises(ObjectiveError, match=f"Budget: {name} is 0"):
            Budget(**{name: 0})
    with pytest.raises(ObjectiveError, match="Budget: the cost is -1"):
        Budget().after(-1)
    with pytest.raises(ObjectiveError, match="the first batch cost nothing"):
        Budget().after(0.0)


# --- norm anchors ---


def test_anchors(p: Problem) -> None:
    outputs, delta = p.normal(7, 4), p.normal(7, 4)
    delta[:, 3] *= 50  # beyond twice the anchor: written as it was
    anchor = norm_anchor_of(outputs[:, :3], delta[:, :3])
    assert anchor == pytest.approx(float((outputs + delta)[:, :3].norm(dim=0).mean()))
    found = anchored(outputs, delta, anchor)
    assert (outputs + found)[:, :3].norm(dim=0).tolist() == pytest.approx([anchor] * 3)
    assert not found[:, 3].any()


def test_the_longest_values_do_not_count_in_an_anchor() -> None:
    sizes = torch.arange(1.0, 41.0, dtype=torch.float64)[None]
    assert norm_anchor_of(sizes, torch.zeros_like(sizes)) == pytest.approx(
        float(sizes[0, :38].mean())
    )
    for wrong in ((sizes, sizes[:, :3], 0.95), (sizes[:, :0], sizes[:, :0], 0.95),
                  (sizes, sizes, 1.5)):  # fmt: skip
        with pytest.raises(MethodError, match="norm_anchor_of"):
            norm_anchor_of(*wrong)


# --- UltraEdit ---


def test_ultraedit_is_memit_without_a_value(p: Problem) -> None:
    """lam C0 := I, and R is the gradient, scaled by each key's length; both of them normalised."""
    keys, gradients = [p.normal(24, 6) for _ in range(3)], [p.normal(7, 6) for _ in range(3)]
    normalizer = code.RunningMeanStd(24 + 7)
    for batch in zip(keys, gradients, strict=True):
        normalizer.update(torch.cat(batch).T)
    K, G = torch.cat(keys, dim=1), torch.cat(gradients, dim=1)
    shift, v_feature = code.ultraedit_shift(normalizer, K.T, G.T, lr=1e-6)
    scaled = normalizer(torch.cat([K, G]).T).T
    R = -1e-6 * scaled[:24].square().sum(dim=0) * scaled[24:]
    assert relative(R, v_feature.T) <= 1e-12
    assert relative(solve(Metric.identity(24), K, R, ridge=1.0).delta, shift) <= 1e-10
