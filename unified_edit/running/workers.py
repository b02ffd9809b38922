"""Who works in a run folder: a file for each process, which it keeps fresh as long as it lives.

    FOLDER/workers/HOST-PID.json   what the process is, what it works on, and what it has done
    FOLDER/workers/HOST-PID.log    what it logged

A process that ends in whatever way lets its file grow old, and after `DEAD_AFTER` seconds nobody
waits for it any longer; on its own machine the others see at once that it is gone. Nothing else is
needed to share the work: what a living process works on is left to it, all that is missing is free.
That only spares work. Should two compute one piece at once, both write the same file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from unified_edit.errors import RunFolderError
from unified_edit.model.tensor_files import read_json, write_whole

#: Seconds between two signs of life.
BEAT = 5.0
#: Seconds without one after which a process counts as dead: a dozen lost beats.
DEAD_AFTER = 60.0
FOLDER = "workers"
#: Where the place of a process among those of its machine stands.
PLACES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

#: Where a process stands.
WORKING, ENDED, FAILED = "working", "ended", "failed"


@dataclass(frozen=True)
class Share:
    """Which of how many processes this one is: where in the list of pieces it begins."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As `torchrun`, `accelerate launch` or `mpirun` say it, else as SLURM; else one of one."""
        for rank, processes, first in (
            ("RANK", "WORLD_SIZE", ""),
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("SLURM_PROCID", "SLURM_NTASKS", ""),
        ):
            with suppress(KeyError, ValueError):
                number, count = int(environment[rank]), int(environment[processes])
                number -= int(environment.get(first) or 0)
                return cls(number % count, count) if count > 0 else cls()
        return cls()

    def begin(self, pieces: int) -> int:
        """The place of the first piece of this process, of so many."""
        return self.rank * pieces // self.processes


def own_device(
    device: str | torch.device | None, environment: Mapping[str, str] = os.environ
) -> str | torch.device | None:
    """Each process of a machine its own card, where "cuda" is asked for; anything else as it is."""
    if str(device) == "cuda":
        for name in PLACES:
            if (place := environment.get(name, "")).isdigit():
                return f"cuda:{int(place) % max(1, torch.cuda.device_count())}"
    return device


def this_process() -> tuple[str, int]:
    """Host and pid: machines that see one folder may have a pid in common."""
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True)
class Sign:
    """What a process says of itself.

    number: the how manieth run of this process in the folder. config: digest of the configuration
    that it works for. piece: what it works on, "" for nothing.
    pieces, units, seconds: by kind of piece, how many it has finished, what was in them (facts,
    shares of the text), and how long they took.
    """

    host: str
    pid: int
    rank: int
    processes: int
    device: str
    config: str
    started: float
    number: int = 1
    state: str = WORKING
    piece: str = ""
    problem: str = ""
    pieces: dict[str, int] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.host}-{self.pid}" + (f"-{self.number}" if self.number > 1 else "")

    @property
    def ours(self) -> bool:
        """Whether it is of this process."""
        return (self.host, self.pid) == this_process()


@dataclass(frozen=True)
class Seen:
    """A process as another one sees it; age: seconds since its last sign of life."""

    sign: Sign
    age: float

    @property
    def alive(self) -> bool:
        """Whether it still works, as far as one can tell."""
        sign = self.sign
        if sign.state != WORKING or self.age > DEAD_AFTER:
            return False
        return sign.host != socket.gethostname() or _runs(sign.pid)


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there."""
    if os.name != "posix":  # signal 0 is Ctrl-C elsewhere; the age has to do
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def seen_in(folder: Path) -> Iterator[Seen]:
    """All processes that ever worked in a run folder, in the order of their names."""
    names = {one.name for one in Sign.__dataclass_fields__.values()}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            age = time.time() - path.stat().st_mtime
            found = read_json(path)
            yield Seen(Sign(**{name: found[name] for name in names & found.keys()}), age)
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # it went meanwhile, or is nobody's: no reason to stop


class _Log(logging.FileHandler):
    """A full disk is told by the piece that cannot be written, not by each line of the log."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class Worker:
    """This process in a run folder. Use it as a context: inside it gives signs of life.

    Raises RunFolderError where the folder cannot be written.
    """

    def __init__(self, folder: Path, share: Share, *, device: str, config: str) -> None:
        self.folder = folder
        self.sign = Sign(
            *this_process(), share.rank, share.processes, device, config, time.time()
        )  # fmt: skip
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._log: logging.Handler | None = None
        self._level = logging.NOTSET

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / FOLDER / f"{self.sign.name}.json"

    def __enter__(self) -> Worker:
        while self.path.exists():
            self.sign = replace(self.sign, number=self.sign.number + 1)
        self._write()
        self._log = _Log(self.path.with_suffix(".log"), encoding="utf-8", delay=True)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        library = logging.getLogger("unified_edit")
        self._level = library.level
        library.setLevel(min(logging.INFO, library.getEffectiveLevel()))
        library.addHandler(self._log)
        self._beating.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        library = logging.getLogger("unified_edit")
        if problem is not None and self._log is not None:
            library.error("%s: %s", type(problem).__name__, problem)
        if self._log is not None:
            library.removeHandler(self._log)
            library.setLevel(self._level)
            self._log.close()
        self._beating.join()
        told = f"{type(problem).__name__}: {problem}" if problem is not None else ""
        with suppress(RunFolderError):  # the disk may be what the problem is
            self._say(state=FAILED if problem is not None else ENDED, piece="", problem=told)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def takes(self, piece: str) -> None:
        """Say what is worked on from now on; "" for nothing."""
        self._say(piece=piece)

    def finished(self, kind: str, units: int, seconds: float) -> None:
        """Say that a piece is done."""
        sign = self.sign
        self._say(
            piece="",
            pieces={**sign.pieces, kind: sign.pieces.get(kind, 0) + 1},
            units={**sign.units, kind: sign.units.get(kind, 0) + units},
            seconds={**sign.seconds, kind: round(sign.seconds.get(kind, 0.0) + seconds, 3)},
        )

    def others(self) -> list[Sign]:
        """The living processes that work on the same, without this one."""
        living = (one.sign for one in seen_in(self.folder) if one.alive)
        return [sign for sign in living if sign.config == self.sign.config and not sign.ours]

    def _say(self, **changes: Any) -> None:
        self.sign = replace(self.sign, **changes)
        self._write()

    def _write(self) -> None:
        try:
            write_whole(self.path, json.dumps(asdict(self.sign), indent=1))
        except OSError as problem:
            raise RunFolderError(
                f"{self.path} cannot be written: {problem}. Make room there, and start the run "
                "again: what is finished is kept"
            ) from problem
