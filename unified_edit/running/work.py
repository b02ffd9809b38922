"""Runs: an edit of many facts by any number of processes, which share nothing but a folder.

Values are independent from fact to fact, and statistics are sums over texts. So both are cut into
pieces, each process computes those that are missing, and whoever finds all of them there solves and
writes the edit. Processes say nothing to each other: what is done stands in the folder, and who
lives in it too (`unified_edit.running.workers`). They may be started by ``torchrun``, by
``accelerate launch``, as a job array, or by hand, together or one after another, on machines that
see the same folder. A run that was ended, by whatever, is started again with any number of
processes and computes what is missing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from unified_edit.editing import Editor, Method, load_model
from unified_edit.editing.prefixes import prefixes_key
from unified_edit.errors import RunFolderError
from unified_edit.facts import Conflict, Fact, Record, SharedSubject, read_facts
from unified_edit.model.locks import taken
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.running.finishing import finish, is_finished
from unified_edit.running.pieces import Piece, Stage, ValueStage, files_there, write_list
from unified_edit.running.settings import RunFolder, Settings
from unified_edit.running.shares import StatisticsStage
from unified_edit.running.status import SUMMARY, RunState, duration, time_left
from unified_edit.running.workers import Share, Worker, own_device

log = logging.getLogger(__name__)

#: Seconds between two looks at whether another process has finished its piece.
LOOK = 0.5
#: Times that damaged pieces are computed again.
ATTEMPTS = 3
SOLVING, LOCK = "solving", "solving.lock"
#: Who has this lock takes a piece; others ask again after so many seconds.
TURNS, TURN = "turns.lock", 0.02


def run(
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    facts: Sequence[Fact] | Fact | str | os.PathLike[str] | None = None,
    records: Sequence[Record] | None = None,
    method: Method | None = None,
    statistics: str | os.PathLike[str] | None = None,
    texts: Iterable[str | os.PathLike[str]] | None = None,
    split: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    column: str | None = None,
    tokens: int | None = None,
    shrinkage: float | None = None,
    shares: int | None = None,
    piece: int | None = None,
    seed: int | None = None,
    on_shared_subject: SharedSubject | None = None,
    on_conflict: Conflict | None = None,
    device: str | torch.device | None = None,
    gather: bool | None = None,
    accept_changes: bool = False,
) -> RunState:
    """Edit many facts in a folder, alone or as one of several processes; return where it stands.

    >>> ue.run("xl", model="gpt2-xl", facts="facts.jsonl", method=ue.MEMIT)     # doctest: +SKIP
    >>> ue.run("xl")                                    # goes on               # doctest: +SKIP

    folder: a new one, or one of a run that was begun: then it goes on, and of everything up to
        `on_conflict` nothing need be said again. What is said must be the same, and so must the
        model's weights, its tokenizer and the versions of this library, torch and transformers.
    model: its name, or the arguments of `load_model`.
    facts: a list, or a file of them; without it those of the records.
    records: the edit is judged by them at the end, as `evaluate` does.
    method: EMMET if not given; one that writes all facts together.
    statistics: a file of C0. Without it C0 is collected, from the `texts` (files, whose texts stand
        as `split` says), a `dataset` of the Hub (its `dataset_config`, the texts in its `column`),
        or else from the model's default corpus: `tokens` of it (default: all of one's own files,
        twenty for each entry of a key of others), in so many `shares`; `shrinkage` as in
        `KeyStatistics.collect`.
    piece: facts of one piece; what is lost at most when a process is killed.
    seed, on_shared_subject, on_conflict: as in `edit`.
    device: of this process; "cuda" is the card of its place on the machine, as `torchrun`,
        `mpirun` or SLURM tell it.
    gather: None: whoever finds all pieces there solves and writes the edit. False: only pieces are
        computed. True: only that last step; RunFolderError where pieces are missing.
    accept_changes: go on though the configuration, model or versions are not what they were. Pieces
        that do not fit are computed anew.

    Values, C0 and the edit are bit for bit the same for any number of processes of the same kind
    and number of threads, and those of ``edit(..., values=..., statistics=...)``.

    Raises RunFolderError for a folder that cannot be written or was begun with something else, and
    what `load_model`, `edit` and `KeyStatistics.collect` raise. What was finished before is kept.
    """
    place = RunFolder(folder)
    asked = {
        "model": model, "facts": _facts(facts), "records": records, "method": method,
        "statistics": statistics, "texts": texts, "split": split, "dataset": dataset,
        "dataset_config": dataset_config, "column": column, "tokens": tokens,
        "shrinkage": shrinkage, "shares": shares, "piece": piece, "seed": seed,
        "on_shared_subject": on_shared_subject, "on_conflict": on_conflict,
    }  # fmt: skip
    settings = place.chosen(asked, accept_changes=accept_changes)
    opened, tokenizer = load_model(**settings.loading, device=own_device(device))
    editor = Editor(opened, tokenizer, seed=settings.seed)
    made_of = {
        "fingerprint": editor.ledger.fingerprint(wholly=True),
        "tokenizer": Encoder(tokenizer, editor.parts).signature,
    }

    def prefixes() -> Sequence[str]:
        return editor.prefixes(settings.method.resolve(editor.parts).contexts)

    config = place.agree(settings, made_of, prefixes, accept_changes)
    if is_finished(place.path, config.digest):
        log.info("%s is finished: see %s", place.path, place.path / SUMMARY)
        return RunState.read(place.path)
    _use_prefixes(editor, settings, config.made_of["prefixes"])
    share = Share.of_this_process()
    where = f"{opened.device}"
    with Worker(place.path, share, device=where, config=config.digest) as worker:
        values = ValueStage(place.path, editor, settings)
        collecting = StatisticsStage(place.path, editor, settings)
        work = Work(worker, (collecting, values), share)
        for _ in range(ATTEMPTS):  # more than one where a piece proves to be damaged
            if gather is not True:
                work.through()
            if gather is False:
                break
            with _alone(place.path / LOCK) as ours:
                if not ours or is_finished(place.path, config.digest):
                    break
                worker.takes(SOLVING)
                if finish(place.path, config.digest, editor, settings, collecting, values):
                    break
            if gather is True:
                raise RunFolderError(
                    f"{place.path}: not all pieces are there ({RunState.read(place.path).told}); "
                    "run it without --gather (gather=True) first, which computes them"
                )
        else:
            raise RunFolderError(
                f"{place.path}: pieces that were just written cannot be read, {ATTEMPTS} times in "
                "turn; look at the disk, or give another folder"
            )
    return RunState.read(place.path)


def _facts(given: Any) -> Any:
    return read_facts(given) if isinstance(given, (str, os.PathLike)) else given


def _use_prefixes(editor: Editor, settings: Settings, prefixes: Sequence[str]) -> None:
    """Those that the first process sampled: on another kind of machine they may be others."""
    parts, ledger = editor.parts, editor.ledger
    key = prefixes_key(
        ledger.fingerprint(),
        Encoder(editor.tokenizer, parts).signature,
        settings.method.resolve(parts).contexts,
        settings.seed,
    )
    editor.memory.put(key, tuple(prefixes), sum(map(len, prefixes)))


def _alone(lock: Path) -> AbstractContextManager[bool]:
    """Inside, whether the lock is ours.

    Where the file system has no locks it is anybody's: to do something twice costs time, no harm.
    """
    try:
        return taken(lock)
    except OSError as problem:
        log.warning("%s has no locks (%s)", lock.parent, problem)
        return nullcontext(True)


class Work:
    """The pieces of all stages, and the part of them that this process does.

    It begins at its share of the list, goes on with what is missing anywhere else, and leaves to
    others what they are at, as long as they live.
    """

    def __init__(self, worker: Worker, stages: Sequence[Stage], share: Share) -> None:
        self.worker = worker
        self.made: list[tuple[Piece, Stage, int]] = [
            (piece, stage, place) for stage in stages for place, piece in enumerate(stage.pieces)
        ]
        begin = share.begin(len(self.made))
        self.order = [*self.made[begin:], *self.made[:begin]]
        write_list(worker.folder, (piece for piece, _, _ in self.made))

    def through(self) -> None:
        """Until all pieces are there, whoever makes them."""
        with progress("pieces", len(self.made), "piece") as bar:
            while True:
                # who looks also takes, before another one looks: or both would make the same
                with _alone(self.worker.folder / TURNS) as ours:
                    there = files_there(self.worker.folder)
                    missing = [one for one in self.order if not one[0].done(there)]
                    if not missing or is_finished(self.worker.folder, self.worker.sign.config):
                        return  # at the end shares of the text are deleted, so files may be missing
                    bar.update(len(self.made) - len(missing) - bar.n)
                    others = {sign.piece for sign in self.worker.others()}
                    free = next((one for one in missing if one[0].name not in others), None)
                    if ours and free is not None:
                        self.worker.takes(free[0].name)
                if not ours:
                    time.sleep(TURN)
                elif free is None:
                    time.sleep(LOOK)
                else:
                    self._make(*free)

    def _make(self, piece: Piece, stage: Stage, place: int) -> None:
        began = time.monotonic()
        try:
            stage.make(place)
        except Exception:
            log.error("%s cannot be made; what was finished before is kept", piece.name)
            raise
        self.worker.finished(piece.kind, piece.units, time.monotonic() - began)
        state = RunState.read(self.worker.folder)
        log.info(
            "%s done in %s; %s%s",
            piece.name,
            duration(time.monotonic() - began),
            state.told,
            time_left(state),
        )
