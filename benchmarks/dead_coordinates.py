"""What coordinates that are zero in every preserved key cost, and save, at the size of GPT-J.

    OMP_NUM_THREADS=1 python benchmarks/dead_coordinates.py

In half precision many neurons are exactly zero in every key, so C0 has zero rows and columns.
`Metric` leaves them out. This makes C0 (float32, as statistics come) from random keys, with and
without such coordinates, and measures the factorisation, an equality for 100 facts, and a history
of as many (`plus`): seconds of the processor (one thread, or they add up), and the peak of the
memory. Each case has a process of its own, because a peak never goes down. Random keys are fewer
than d_k here: a shrinkage makes up for it, on the coordinates that are alive.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from unified_edit.objective import Metric, solve

log = logging.getLogger("dead_coordinates")

RESULTS = Path(__file__).resolve().parent / "results" / "dead_coordinates.json"


def peak_gib() -> float:
    """Peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keys_of(generator: torch.Generator, alive: torch.Tensor, d: int, count: int) -> torch.Tensor:
    """Random keys (d x count, float32) that are zero in all coordinates but `alive`."""
    keys = torch.zeros(d, count)
    keys[alive] = torch.randn(len(alive), count, generator=generator)
    return keys


def second_moment(keys: torch.Tensor, alive: torch.Tensor, shrinkage: float) -> torch.Tensor:
    C0 = torch.zeros(len(keys), len(keys)).addmm_(keys, keys.T).div_(keys.shape[1])
    C0.diagonal()[alive] += shrinkage
    return C0


def measure(d: int, dead: float, facts: int, d_out: int, tokens: int) -> dict[str, Any]:
    """One case: d coordinates, of which the share `dead` is zero in every key."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(d, generator=generator)
    alive = order[round(dead * d) :].sort().values
    C0 = second_moment(keys_of(generator, alive, d, tokens), alive, shrinkage=0.1)
    K = keys_of(generator, alive, d, facts)
    R = torch.randn(d_out, facts, generator=generator)
    line: dict[str, Any] = {"d_k": d, "dead": d - len(alive), "facts": facts, "d_out": d_out}
    line["peak GiB before"] = round(peak_gib(), 2)
    clock = time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        line[f"{name} seconds"] = round(time.process_time() - clock, 2)
        line[f"{name} peak GiB"] = round(peak_gib(), 2)
        clock = time.process_time()

    metric = Metric(C0)
    lap("Metric")
    del C0  # what follows needs the factor alone, and no edit needs C0 at the same time
    update = solve(metric, K, R)
    lap("solve")
    metric.plus(K, 1.0)
    lap("plus")
    line["memorization error"] = float(f"{update.diagnosis.memorization_error:.2g}")
    untouched = torch.ones(d, dtype=torch.bool).index_fill_(0, alive, False)
    line["Delta is zero in dead coordinates"] = not bool(update.right[:, untouched].any())
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, default=16384, help="entries of a key")
    parser.add_argument("--dead", type=float, default=0.3, help="share of dead coordinates")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--d-out", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048, help="random keys of which C0 is made")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = []
    names = [f"{step} {unit}" for step in ("Metric", "solve", "plus") for unit in ("s", "GiB")]
    log.info("%8s %8s " + "%12s" * len(names), "d_k", "dead", *names)
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for dead in (0.0, arguments.dead):
            sizes = (arguments.facts, arguments.d_out, arguments.tokens)
            line = pool.submit(measure, arguments.d, dead, *sizes).result()
            lines.append(line)
            numbers = [
                line[f"{step} {what}"]
                for step in ("Metric", "solve", "plus")
                for what in ("seconds", "peak GiB")
            ]
            log.info("%8d %8d " + "%12.2f" * len(numbers), line["d_k"], line["dead"], *numbers)
    result = {
        "command": "python benchmarks/dead_coordinates.py "
        f"--d {arguments.d} --dead {arguments.dead} --facts {arguments.facts}",
        "tokens": arguments.tokens,
        "shrinkage": 0.1,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cases": lines,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
