"""How long solving takes, beside the released code of MEMIT and EMMET and beside bare LAPACK.

    OMP_NUM_THREADS=1 python benchmarks/solve_speed.py

At the shape of GPT-2 XL (d_k = 6,400, d_out = 1,600) and 1,000 facts, in float64, from the matrices
to the dense Delta. Ours makes the diagnosis too. Theirs are the same operations in the same order
as in the released code:

- MEMIT, kmeng01/memit 80426fd, memit/memit_main.py: a general solve with lam C0 + K K', d x d.
- EMMET, scalable-model-editing/unified-model-editing 23d72b5, emmet/emmet_main.py: the inverse of
  C0 and that of the Gram matrix, and the norms that it stores of both.

The floor is what cannot be left out, as bare calls of torch: the Cholesky factor of C0 (where it is
not at hand), two triangular solves, the Gram matrix of the keys and its factor, one product. For
an equality the same with QR in the place of the Gram matrix stands beside it.

All jobs of a row take turns; counted are seconds of this process on processors. `--against-E` adds
one round for each of several numbers of facts. `--card` measures d_k = 16,384 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import cpu_seconds, interleaved, row, write
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.objective import Metric, solve

log = logging.getLogger("solve_speed")

RESULTS = Path(__file__).resolve().parent / "results" / "solve_speed.json"
LAM = 1.0


class Problem:
    """C0 (d x d) of keys with a decaying spectrum, K (d x E) and R (d_out x E), from a seed."""

    def __init__(self, d: int, E: int, d_out: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

        scale = torch.logspace(0, -3, d, dtype=torch.float64, device=device)
        few = normal(d, max(2, d // 8)) / d**0.5
        self.C0 = scale[:, None] * (few @ few.mT) * scale
        self.C0.diagonal().add_(scale.square())
        self.C0 = (self.C0 + self.C0.mT).div_(2)
        self.K = scale[:, None] * normal(d, E)
        self.R = normal(d_out, E)


def memit_as_released(p: Problem) -> Tensor:
    """R [(lam C0 + K K')^-1 K]', by a general solve."""
    adjusted = torch.linalg.solve(LAM * p.C0 + p.K @ p.K.T, p.K)
    return p.R @ adjusted.T


def emmet_as_released(p: Problem) -> Tensor:
    """R [(K' C0^-1 K + lam I)^-1 K' C0^-1], by inverses."""
    inverse = torch.inverse(p.C0)
    gram = p.K.T @ inverse @ p.K
    gram = gram + 1e-9 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    gram_inverse = torch.inverse(gram)
    for stored in (inverse, gram, gram_inverse):
        float(torch.norm(stored))
    adjusted = (gram_inverse @ p.K.T @ inverse).T
    return p.R @ adjusted.T


def bare_factor(p: Problem) -> Tensor:
    """The Cholesky factor of C0, of which nothing is checked."""
    return torch.linalg.cholesky_ex(p.C0)[0]


def bare_ridge(p: Problem, factor: Tensor, lam: float = LAM) -> Tensor:
    """Two triangular solves, a Gram matrix, its factor, one product."""
    A = solve_triangular(factor, p.K, upper=False)
    gram = A.mT @ A
    gram.diagonal().add_(lam)
    left = torch.cholesky_solve(p.R.mT, torch.linalg.cholesky_ex(gram)[0]).mT
    if len(p.R) < p.K.shape[1]:
        return solve_triangular(factor, left @ A.mT, upper=False, left=False)
    return left @ solve_triangular(factor, A.mT, upper=False, left=False)


def bare_qr(p: Problem, factor: Tensor) -> Tensor:
    """The same for an equality, with QR."""
    Q, S = torch.linalg.qr(solve_triangular(factor, p.K, upper=False))
    left = solve_triangular(S, p.R, upper=True, left=False)
    return left @ solve_triangular(factor, Q.mT, upper=False, left=False)


def ours(p: Problem, metric: Metric | None, ridge: float) -> Tensor:
    """The dense Delta, with its diagnosis."""
    return solve(metric or Metric(p.C0), p.K, p.R, ridge=ridge).delta


def relative(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other||."""
    return float((one - other).norm() / other.norm())


def beside_others(p: Problem, rounds: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The four rows: MEMIT and EMMET, with the factor of C0 at hand and without."""
    metric = Metric(p.C0)
    factor = metric.factor
    d, E, d_out = len(p.C0), p.K.shape[1], len(p.R)
    forms: dict[str, tuple[float, Callable[[Problem], Tensor], Callable[..., Tensor]]] = {
        "MEMIT": (LAM, memit_as_released, bare_ridge),
        "EMMET": (0.0, emmet_as_released, partial(bare_ridge, lam=0.0)),
    }
    found = []
    for name in names:
        ridge, theirs, bare = forms[name]
        jobs = {
            "theirs": partial(theirs, p),
            "without": partial(ours, p, None, ridge),
            "with": partial(ours, p, metric, ridge),
            "floor": partial(bare, p, factor),
            "floor of the factor": partial(bare_factor, p),
        }
        if ridge == 0.0:
            jobs["floor with QR"] = partial(bare_qr, p, factor)
        made = {"theirs": theirs(p), "ours": ours(p, metric, ridge)}
        agree = relative(made["ours"], made["theirs"])
        made.clear()
        taken = interleaved(jobs, rounds, cpu_seconds)
        both = [a + b for a, b in zip(taken["floor"], taken["floor of the factor"], strict=True)]
        more: dict[str, Any] = {"d": d, "E": E, "d_out": d_out, "clock": "CPU seconds"}
        more |= {"difference_of_delta": agree}
        found.append(row(f"{name}, no factor", taken["without"], taken["theirs"], both, **more))
        if "floor with QR" in taken:
            more["floor_ratio_with_qr"] = _ratio(taken["with"], taken["floor with QR"])
        with_factor = row(
            f"{name}, with the factor", taken["with"], taken["theirs"], taken["floor"]
        )
        found.append(with_factor | more)
        for one in found[-2:]:
            log.info("%s", json.dumps({k: v for k, v in one.items() if k != "rounds"}))
    return found


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return round(sorted(ones)[len(ones) // 2] / sorted(others)[len(others) // 2], 3)


def against_E(d: int, d_out: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of facts: equality and ridge with the factor at hand, one round."""
    found, metric = [], None
    for E in numbers:
        p = Problem(d, E, d_out)
        metric = metric or Metric(p.C0)
        for name, ridge in (("EMMET", 0.0), ("MEMIT", LAM)):
            jobs = {
                "ours": partial(ours, p, metric, ridge),
                "floor": partial(bare_ridge, p, metric.factor, ridge),
            }
            rounds = 1 if E > 300 else 3
            taken = interleaved(jobs, rounds, cpu_seconds)
            more = {"d": d, "E": E, "d_out": d_out, "clock": "CPU seconds"}
            found.append(row(f"{name}, {E} facts", taken["ours"], floor=taken["floor"], **more))
            log.info("%s", json.dumps({k: v for k, v in found[-1].items() if k != "rounds"}))
    return found


def on_a_card(d: int, E: int, d_out: int, rounds: int) -> list[dict[str, Any]]:
    """Factor and solve on a GPU, by the clock on the wall."""
    p = Problem(d, E, d_out, "cuda")
    metric = Metric(p.C0)
    jobs: dict[str, Callable[[], object]] = {
        "factor": lambda: Metric(p.C0),
        "equality": lambda: ours(p, metric, 0.0),
        "ridge": lambda: ours(p, metric, LAM),
        "floor of the factor": lambda: bare_factor(p),
        "floor": lambda: bare_ridge(p, metric.factor),
    }

    def finished(job: Callable[[], object]) -> None:
        job()
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    jobs = {name: partial(finished, job) for name, job in jobs.items()}
    taken = interleaved(jobs, rounds, time.perf_counter)
    peak = torch.cuda.max_memory_allocated() / 2**30
    floors = {"factor": "floor of the factor"}
    return [
        row(
            f"{name}, on the card",
            taken[name],
            floor=taken[floors.get(name, "floor")],
            d=d,
            E=E,
            d_out=d_out,
            peak_memory=peak,
            clock="seconds",
        )
        for name in ("factor", "equality", "ridge")
    ]


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d", type=int, default=6400)
    parser.add_argument("--d-out", type=int, default=1600)
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="*", default=["MEMIT", "EMMET"])
    parser.add_argument("--against-E", type=int, nargs="*", default=[])
    parser.add_argument("--card", action="store_true", help="d_k = 16,384 on a GPU")
    parser.add_argument("--into", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.card:
        rows = on_a_card(16384, args.facts, 4096, args.rounds)
    elif args.against_E:
        rows = against_E(args.d, args.d_out, args.against_E)
    else:
        rows = beside_others(Problem(args.d, args.facts, args.d_out), args.rounds, args.forms)
    if args.into.exists():  # rows of the same name are measured anew, the others stay
        names = {one["name"] for one in rows}
        kept = json.loads(args.into.read_text("utf-8"))["rows"]
        rows = [one for one in kept if one["name"] not in names] + rows
    write(args.into, rows, lam=LAM)


if __name__ == "__main__":
    main()
