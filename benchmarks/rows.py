"""Rows of speed: what takes how long, beside what others take and beside the floor.

All figures of a row come from one run: its rounds take turns (`interleaved`), so that what else the
machine does falls on all alike. A row holds the medians and every single time.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from result_files import in_lines

PACKAGES = ("unified_edit", "torch", "transformers", "numpy", "scipy")


def cpu_seconds() -> float:
    """Seconds of this process's threads on processors: what others run beside it does not count."""
    return time.process_time()


def interleaved(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each job in each round; one round before them is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            before = clock()
            job()
            if number:
                taken[name].append(clock() - before)
    return taken


def row(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float] = (),
    floor: Sequence[float] = (),
    **more: Any,
) -> dict[str, Any]:
    """One row: ratio = theirs / ours, floor_ratio = ours / floor, of medians.

    more: peak_memory in GiB, sizes, what `theirs` and the floor are, the clock.
    """
    middle = statistics.median
    found: dict[str, Any] = {"name": name, "seconds": middle(ours)}
    if theirs:
        found |= {"others": middle(theirs), "ratio": middle(theirs) / middle(ours)}
    if floor:
        found |= {"floor": middle(floor), "floor_ratio": middle(ours) / middle(floor)}
    found |= more
    found["rounds"] = {"ours": list(ours), "theirs": list(theirs), "floor": list(floor)}
    return rounded(found)


def rounded(value: Any) -> Any:
    """Numbers to four digits, which is more than a machine repeats."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def machine() -> dict[str, Any]:
    """What the rows were measured on: processor, cores, threads, card, versions."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def write(path: Path, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Write the rows with the machine they were measured on."""
    result = {"date": time.strftime("%Y-%m-%d"), **about, "machine": machine(), "rows": list(rows)}
    path.write_text(in_lines(result), encoding="utf-8")
