"""Processes of one run that die at chosen moments; a program, which tests start.

    python tests/forked_runs.py JOB     # JSON: a list of rounds, or one without processes

In each round so many `processes` are forked from this one, which has imported everything: that
saves the seconds that each would need. As with torchrun, they are told their rank, and all end when
one is killed. Printed is of each round whether all came to their end. A single object without
processes is done in this process, as torchrun starts it.

    given: {...}      what `unified_edit.run` is told, the method as `Method.to_dict` gives it

    dies: [rank, n]   this one kills itself with its n-th file half written, when all others, for
                      whom their n-th takes very long, have come so far
    after: seconds    all are killed so long after the first of them began to work
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import unified_edit as ue
from unified_edit.model import tensor_files


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
            os.kill(os.getpid(), signal.SIGKILL)

    tensor_files.save_file = save_file


def work(given: dict[str, Any], dies: list[int] | None) -> None:
    """One process of the run."""
    if dies:
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        stop_at(dies[1], Path(given["folder"]), processes, dies=rank == dies[0])
    ue.run(**{**given, "method": ue.Method.from_dict(given["method"])})


def fork(given: dict[str, Any], rank: int, processes: int, dies: list[int] | None) -> int:
    """The number of a new process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        work(given, dies)
        code = 0
    finally:
        os._exit(code)


def begun(folder: Path) -> set[Path]:
    return set(folder.glob("workers/*.json"))


def round_of(given: dict[str, Any], processes: int, dies: Any = None, after: Any = None) -> bool:
    """Whether all processes of a round have come to their end."""
    before = begun(Path(given["folder"]))
    pids = {fork(given, rank, processes, dies) for rank in range(processes)}
    if after is not None:
        while begun(Path(given["folder"])) == before:
            time.sleep(0.01)
        time.sleep(after)
    well = after is None
    while pids:
        if not well:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        pid, status = os.wait()
        pids.discard(pid)
        well = well and status == 0
    return well


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if isinstance(job, list):
        print(json.dumps([round_of(**one) for one in job]))
    else:
        work(job["given"], job.get("dies"))
