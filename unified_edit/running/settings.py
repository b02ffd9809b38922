"""What a run is made from, and the file that says so: config.json.

    FOLDER/config.json     what was asked for, what it was asked of, and with which versions
    FOLDER/facts.jsonl     the facts
    FOLDER/records.jsonl   the records that the edit is judged by, if any

With these a folder goes on by itself: nothing has to be said again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unified_edit.arguments import as_list, as_path, real_number, whole_number
from unified_edit.editing import EMMET, Method
from unified_edit.errors import MethodError, RunFolderError, StatisticsError
from unified_edit.facts import (
    Conflict,
    Fact,
    Record,
    SharedSubject,
    check_items,
    check_ways,
    read_facts,
    read_records,
)
from unified_edit.measuring.answer_lines import differences, digest_of, plain
from unified_edit.model.tensor_files import read_json, write_whole
from unified_edit.running.workers import seen_in, this_process
from unified_edit.statistics.corpora import check_choice

FORMAT = "unified_edit.run/1"
CONFIG, FACTS, RECORDS = "config.json", "facts.jsonl", "records.jsonl"
#: What was answered about the records: of this edit only.
ANSWERS = "answers.jsonl"

#: Facts of one piece: what is lost at most when a process dies, and what is optimised together.
PIECE = 16
#: Shares of the text. Each is a file of the sums of all layers, until they are joined.
SHARES = 8
#: What says how C0 is collected.
COLLECTING = (
    "texts", "split", "dataset", "dataset_config", "column", "tokens", "shrinkage", "shares"
)  # fmt: skip
#: Packages whose versions decide what comes out, to the last digit.
PACKAGES = ("unified_edit", "torch", "transformers")


@dataclass(frozen=True)
class Settings:
    """What is asked of a run.

    loading: the arguments of `load_model`, but for the device. statistics: the file of C0; without
    it C0 is collected in `shares`, from the `texts` (files), a `dataset` of the Hub, or the model's
    default corpus.
    piece: facts of one piece. Everything else: as in `edit` and `KeyStatistics.collect`.
    """

    loading: Mapping[str, Any]
    facts: tuple[Fact, ...]
    records: tuple[Record, ...] = ()
    method: Method = EMMET
    seed: int = 0
    on_shared_subject: SharedSubject = "raise"
    on_conflict: Conflict = "raise"
    statistics: str | None = None
    texts: tuple[str, ...] = ()
    split: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    column: str = "text"
    tokens: int | None = None
    shrinkage: float = 0.0
    shares: int = SHARES
    piece: int = PIECE

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Checked settings from arguments as users write them; raises what is wrong with them."""
        made: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        model = made.pop("model", None)
        if model is None:
            raise RunFolderError(
                "a new run needs a model and facts (or records); give model=... and facts=..."
            )
        loading = {"name": model} if isinstance(model, (str, os.PathLike)) else dict(model)
        made["loading"] = {
            name: value if isinstance(value, bool) else str(value).removeprefix("torch.")
            for name, value in loading.items()
            if value is not None
        }
        made["records"] = tuple(as_list(made.get("records", ())))
        facts = made.get("facts", [record.fact for record in made["records"]])
        made["facts"] = tuple(check_items(facts))
        if not isinstance(made.get("method", EMMET), Method):
            raise MethodError(
                f"method is a {type(made['method']).__name__}; give a Method such as "
                "unified_edit.EMMET"
            )
        check_ways(made.get("on_shared_subject", "raise"), made.get("on_conflict", "raise"))
        for name in ("piece", "shares", "tokens"):
            if name in made:
                made[name] = whole_number(made[name], name, MethodError, least=1)
        made["seed"] = whole_number(made.get("seed", 0), "seed", MethodError, least=0)
        if "shrinkage" in made:
            made["shrinkage"] = real_number(
                made["shrinkage"], "shrinkage", StatisticsError, least=0
            )
        paths = [as_path(one, "texts", StatisticsError) for one in as_list(made.get("texts", ()))]
        made["texts"] = tuple(str(path.absolute()) for path in paths)
        if "statistics" in made:
            path = as_path(made["statistics"], "statistics", StatisticsError)
            made["statistics"] = str(path.absolute())
            if told := [name for name in COLLECTING if made.get(name)]:
                raise StatisticsError(
                    f"statistics is a file of C0, and {told[0]} says how to collect C0; give one "
                    "of the two"
                )
        check_choice(
            made["texts"], made.get("split"), made.get("dataset"), made.get("dataset_config")
        )
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; of facts and records their number and a digest."""
        shallow = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("facts", "records"):
            shallow[name] = {"count": len(shallow[name]), "digest": digest_of(shallow[name])}
        return _jsonable({**shallow, "method": self.method.to_dict()})


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(plain(value)))


def versions() -> dict[str, str]:
    """Of what decides what comes out."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@dataclass(frozen=True)
class Config:
    """What config.json says.

    asked: `Settings.to_dict`. made_of: the model's fingerprint, its tokenizer, the prefixes.
    """

    asked: dict[str, Any]
    made_of: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def samples(self) -> tuple[Any, ...]:
        """What prefixes are sampled from."""
        asked, made_of = self.asked, self.made_of
        spec = asked["method"]["contexts"], asked["seed"]
        return *spec, made_of["fingerprint"], made_of["tokenizer"]

    @property
    def digest(self) -> str:
        """A short name of it all."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:20]


class RunFolder:
    """A run's folder; path: where it is."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = as_path(folder, "the run's folder", RunFolderError)

    def config(self) -> Config | None:
        """What the folder says it is; None for a new one. RunFolderError if it is damaged."""
        path = self.path / CONFIG
        try:
            found = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            raise RunFolderError(
                f"{path} cannot be read ({problem}); give another folder, or delete this file and "
                "start the run as before: its pieces are found again"
            ) from problem
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise RunFolderError(
                f"{path} is no configuration of a run, or one of another version of this library: "
                f"it does not say {FORMAT!r}. Give another folder"
            )
        return Config(**found)

    def settings(self) -> Settings:
        """What was asked for, from the folder alone; RunFolderError if it is no run's."""
        config = self.config()
        if config is None:
            raise RunFolderError(
                f"{self.path} holds no run yet; say of what: a model, and facts or records"
            )
        asked = dict(config.asked)
        facts, records = self.path / FACTS, self.path / RECORDS
        asked["facts"] = tuple(read_facts(facts))
        asked["records"] = tuple(read_records(records)) if asked["records"]["count"] else ()
        asked["method"] = Method.from_dict(asked["method"])
        asked["texts"] = tuple(asked["texts"])
        made = Settings(**asked)
        if made.to_dict() != config.asked:
            raise RunFolderError(
                f"{facts} or {records} is not what {CONFIG} says: somebody has changed it. Put it "
                "back, or start in a new folder"
            )
        return made

    def chosen(self, given: Mapping[str, Any], *, accept_changes: bool) -> Settings:
        """The folder's settings where nothing else is given, else those given.

        Raises RunFolderError where they differ, unless changes are accepted.
        """
        said = {name: value for name, value in given.items() if value is not None}
        config = self.config()
        if config is None:
            return Settings.of(said)
        known = self.settings()
        if not said:
            return known
        whole = {one.name: getattr(known, one.name) for one in fields(known)}
        whole = {name: value for name, value in whole.items() if value not in (None, ())}
        whole["model"] = whole.pop("loading")
        of_file = "statistics" in said or (
            "statistics" in whole and not said.keys() & set(COLLECTING)
        )
        for name in COLLECTING if of_file else ("statistics",):
            whole.pop(name, None)
        if "facts" not in said and tuple(said.get("records", known.records)) != known.records:
            whole.pop("facts")
        asked = Settings.of({**whole, **said})
        self._check(config, replace(config, asked=asked.to_dict()), accept_changes)
        return asked

    def agree(
        self,
        settings: Settings,
        made_of: Mapping[str, Any],
        sample: Callable[[], Sequence[str]],
        accept_changes: bool,
    ) -> Config:
        """Write config.json, or hold it against the one that is there; return what holds.

        Of several processes that begin at once, the first one writes. The prefixes, which `sample`
        gives, are those of the first one too, as long as they would be sampled from the same: on
        another kind of machine they may be others.
        """
        ours = Config(settings.to_dict(), _jsonable(made_of))
        there = self.config()
        if there is None:
            ours.made_of["prefixes"] = list(sample())
            self._write(settings, ours, first=True)
            there = self.config()
            assert there is not None
        known = there.made_of.get("prefixes") if there.samples == ours.samples else None
        ours.made_of["prefixes"] = known or list(sample())
        if self._check(there, ours, accept_changes):
            self._write(settings, ours, first=False)
            return ours
        return there

    def _check(self, there: Config, ours: Config, accept_changes: bool) -> bool:
        """Whether something has changed and that is accepted; RunFolderError where it is not."""
        told = "; ".join(
            text
            for part in ("asked", "made_of", "versions")
            if (text := differences(getattr(ours, part), getattr(there, part)))
        )
        if not told:
            return False
        living = [
            one.sign.name
            for one in seen_in(self.path)
            if one.alive and one.sign.config == there.digest and not one.sign.ours
        ]
        if living:
            raise RunFolderError(
                f"{self.path}: {', '.join(living)} is at work there on another configuration "
                f"({told}). Give another folder, or wait until that run has ended"
            )
        if not accept_changes:
            raise RunFolderError(
                f"{self.path} was begun with another configuration ({told}). Give another folder, "
                "or go on with accept_changes=True (--accept-changes): pieces that still fit are "
                "used, all others are computed again"
            )
        return True

    def _write(self, settings: Settings, config: Config, *, first: bool) -> None:
        path = self.path / CONFIG
        text = json.dumps({"format": FORMAT, **asdict(config)}, indent=1) + "\n"
        try:
            if not first:
                for old in self.path.glob(f"*{ANSWERS}"):  # half finished ones begin with a dot
                    old.unlink(missing_ok=True)
            _lines(self.path / FACTS, settings.facts)
            if settings.records:
                _lines(self.path / RECORDS, settings.records)
            ours = path.with_name("{}.{}-{}".format(CONFIG, *this_process()))
            write_whole(ours, text)
            try:
                if first:
                    os.link(ours, path)  # fails where another was quicker, which holds then
                else:
                    ours.replace(path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                ours.replace(path)
            ours.unlink(missing_ok=True)
        except OSError as problem:
            raise RunFolderError(
                f"{self.path} cannot be written: {problem}. Give another place, or make room there"
            ) from problem


def _lines(path: Path, items: Iterable[Any]) -> None:
    """One JSON object a line."""
    write_whole(path, "".join(json.dumps(asdict(one)) + "\n" for one in items))
