"""Records by the name of a data set: atlas, CounterFact, zsRE."""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import huggingface_hub

from unified_edit.arguments import as_path, whole_number
from unified_edit.atlas.records import atlas_records
from unified_edit.errors import FactError, FactFileError
from unified_edit.facts.facts import Record
from unified_edit.facts.json_objects import Fields
from unified_edit.facts.readers import as_records, read_records


def _no_hub(name: str, repository: str, error: Exception, url: str) -> FactFileError:
    said = f"{type(error).__name__}, {str(error).strip().rstrip('.')}"
    return FactFileError(
        f"{name!r} could not be loaded from the Hub ({repository}): {said}. Check the network, or "
        f"download {url} and pass the file's path instead of {name!r}."
    )


def _hub_counterfact(skip_bad: bool) -> list[Record]:
    """CounterFact (Meng et al. 2022) from the Hub: both of its splits, by case_id."""
    source, url = "azhx/counterfact", "https://rome.baulab.info/data/dsets/counterfact.json"
    try:
        from datasets import load_dataset  # an extra of this library
    except ImportError as error:
        raise FactFileError(
            "'counterfact' is read with the package datasets, which is not installed. Install it "
            f"(pip install 'unified_edit[hub]'), or download {url} and pass the file's path "
            "instead of 'counterfact'."
        ) from error
    try:
        rows = [dict(row) for split in load_dataset(source).values() for row in split]
        rows.sort(key=lambda row: row["case_id"])
    except Exception as error:  # whatever the network, the Hub or the cache raises
        raise _no_hub("counterfact", source, error, url) from error
    objects = [Fields(row, f"{source}, row {i}", i) for i, row in enumerate(rows, start=1)]
    return as_records(objects, source, skip_bad=skip_bad)


def _some_counterfact(skip_bad: bool) -> list[Record]:
    """The 250 records of CounterFact that come with the library, see data/SOURCES.md."""
    with as_file(files("unified_edit") / "data" / "counterfact_250.json") as path:
        return read_records(path, skip_bad=skip_bad)


def _hub_zsre(skip_bad: bool) -> list[Record]:
    """zsRE from the Hub, in KnowEdit's selection (Zhang et al. 2024)."""
    source, url = "zjunlp/KnowEdit", "https://rome.baulab.info/data/dsets/zsre_mend_eval.json"
    file = "benchmark/ZsRE/ZsRE-test-all.json"
    try:
        path = huggingface_hub.hf_hub_download(source, file, repo_type="dataset")
    except Exception as error:  # whatever the network, the Hub or the cache raises
        raise _no_hub("zsre", source, error, url) from error
    return read_records(path, skip_bad=skip_bad)


_NAMED: dict[str, Callable[[bool], list[Record]]] = {
    "atlas": lambda skip_bad: list(atlas_records()),
    "counterfact": _hub_counterfact,
    "counterfact-250": _some_counterfact,
    "zsre": _hub_zsre,
}


def _from_file(name_or_path: str | os.PathLike[str], skip_bad: bool) -> list[Record]:
    names = ", ".join(map(repr, _NAMED))
    advice = f"give the name of a data set ({names}) or the path of a file"
    path = as_path(name_or_path, "name_or_path", FactFileError, advice=advice)
    try:
        return read_records(path, skip_bad=skip_bad)
    except FactFileError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        near = difflib.get_close_matches(str(name_or_path).lower(), _NAMED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise FactFileError(
            f"{str(name_or_path)!r} is neither a data set's name nor a file.{hint} Names: {names}; "
            f"a file's path is taken from {Path.cwd()}."
        ) from error.__cause__


def load_records(
    name_or_path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> list[Record]:
    """Records by the name of a data set, or from a file.

    "atlas" needs no network, nor does "counterfact-250", a part of CounterFact that comes with the
    library (MIT, Meng et al. 2022; see `unified_edit/data/SOURCES.md`); "counterfact" and "zsre"
    (KnowEdit's selection) are downloaded from the Hugging Face Hub; anything else is a path for
    `read_records`. `limit`: at most so many of the usable records, the first ones, or with a `seed`
    a sample without replacement, which is the same for the same seed. Raises `FactFileError` where
    the data cannot be had or read, and `FactError` for a limit below 1 and for a limit or a seed
    that is no whole number.
    """
    if limit is not None:
        limit = whole_number(limit, "limit", FactError, least=1, advice="Leave it out for all.")
    if seed is not None:
        seed = whole_number(seed, "seed", FactError, advice="Leave it out for the first records.")
    named = _NAMED.get(name_or_path) if isinstance(name_or_path, str) else None
    records = named(skip_bad) if named else _from_file(name_or_path, skip_bad)
    if limit is None or limit >= len(records):
        return records
    return records[:limit] if seed is None else random.Random(seed).sample(records, limit)
