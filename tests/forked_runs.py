"""Processes of one run that die at chosen moments; a program, which tests start.

    python tests/forked_runs.py JOB     # JSON: a list of rounds, or one without processes

In each round so many `processes` are forked from this one, which has imported everything: that
saves the seconds that each would need. As with torchrun, they are told their rank, and all end when
one is killed. Printed is of each round whether all came to their end. A single object without
processes is done in this process, as torchrun starts it.

    given: {...}      what `unified_edit.run` is told, the method as `Method.to_dict` gives it

    dies: [rank, n]   this one kills itself with its n-th file half written, when all others, for
                      whom their n-th takes very long, have come so far
    moment: n         each kills itself at its n-th step in the folder: before it opens, moves,
                      links or deletes something there; one that needs fewer comes to its end
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import unified_edit as ue
from unified_edit.model import tensor_files

#: What Python tells of a step in a folder (its audit events).
STEPS = {"open", "os.rename", "os.link", "os.remove"}


def stop_at(number: int, folder: Path, processes: int, *, dies: bool) -> None:
    """Have the n-th file of this process take very long, or killed half way."""
    plain, count = tensor_files.save_file, 0

    def save_file(tensors: Any, path: Path, **more: Any) -> None:
        nonlocal count
        plain(tensors, path, **more)
        count += 1
        if count == number:
            os.truncate(path, Path(path).stat().st_size // 2)
            while not dies or len(list(folder.glob("pieces/*/[!.]*"))) < processes * (number - 1):
                time.sleep(0.01)
            kill()

    tensor_files.save_file = save_file


def at_step(number: int, folder: Path, then: Callable[[], None]) -> None:
    """Have something done before the n-th step of this process in a folder."""
    steps = 0

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in STEPS and str(arguments[0]).startswith(str(folder)):
            steps += 1
            if steps == number:
                then()

    sys.addaudithook(heard)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(given: dict[str, Any], dies: list[int] | None = None, moment: int | None = None) -> None:
    """One process of the run."""
    if moment:
        at_step(moment, Path(given["folder"]), kill)
    if dies:
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        stop_at(dies[1], Path(given["folder"]), processes, dies=rank == dies[0])
    ue.run(**{**given, "method": ue.Method.from_dict(given["method"])})


def fork(rank: int, processes: int, told: dict[str, Any]) -> int:
    """The number of a new process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        work(**told)
        code = 0
    finally:
        os._exit(code)


def round_of(processes: int, **told: Any) -> bool:
    """Whether all processes of a round have come to their end."""
    pids = {fork(rank, processes, told) for rank in range(processes)}
    well = True
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and "moment" not in told:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        well = well and status == 0
    return well


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if isinstance(job, list):
        print(json.dumps([round_of(**one) for one in job]))
    else:
        work(**job)
