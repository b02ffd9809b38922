"""Files of facts and of records: JSON lists and JSON Lines, and the data sets of the field.

What each format gives a `Record`, and what it leaves empty:

| format (recognised by)            | fact                  | paraphrases | neighbours  | generation | probes     |
|-----------------------------------|-----------------------|-------------|-------------|------------|------------|
| CounterFact (`requested_rewrite`) | target_new/_true .str | 2           | 10          | 10         | none       |
| reduced (`ground_truth`)          | prompt filled in      | none        | 1           | 1          | `locality` |
| zsRE of MEND (`src`, `alt`)       | alt against answers[0]| 1           | none        | none       | `locality` |
| KnowEdit's zsRE (`locality`)      | target_new            | 1           | none        | none       | its groups |
| own (`fact`)                      | as written            | as written  | as written  | as written | as written |
| facts only (`prompt`)             | as written            | none        | none        | none       | none       |

CounterFact's attribute prompts enter none of the scores and are not read. In the reduced form the
one "rephrase" is mostly a *generation* prompt, so it is never counted as a paraphrase; its locality
prompt is a neighbour when its answer is `target_true`, else a probe. In zsRE `alt` is the answer
that the edit plants and `answers` are the right ones (`pred`, what another model said, is not
used); the unrelated question `loc` is a probe without foil. MEMIT's zsRE runs instead taught the
right answer; build such facts from `answers` yourself. The own format is what
`json.dumps(dataclasses.asdict(record))` writes, one record a line.
"""  # noqa: E501

from __future__ import annotations

import difflib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from unified_edit.errors import FactError, FactFileError
from unified_edit.facts import Fact, Probe, Record, quote
from unified_edit.json_files import Fields, read_objects

logger = logging.getLogger(__name__)

_FACT_FIELDS = ("prompt", "subject", "target_new", "target_true")
_PROBE_FIELDS = ("prompt", "expected", "foil")
_PROMPT_LISTS = ("paraphrases", "neighbours", "generation_prompts")
_RECORD_FIELDS = ("fact", *_PROMPT_LISTS, "probes", "case_id", "relation")


def _fact(fields: Fields) -> Fact:
    fields.only(_FACT_FIELDS)
    prompt, subject, target_new = (fields.take(name, str) for name in _FACT_FIELDS[:3])
    return Fact(prompt, subject, target_new, fields.optional("target_true", str))


def read_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """The facts of a file: a JSON list, or one JSON object a line (JSON Lines), in UTF-8.

    Fields: `prompt`, `subject`, `target_new`, and optionally `target_true` (see `Fact`). Anything
    else raises `FactFileError` with the file, the line, the field and what is expected.
    """
    facts = []
    for fields in read_objects(Path(path)):
        if "requested_rewrite" in fields or "fact" in fields or "src" in fields:
            raise FactFileError(
                f"{fields.where}: this is a record, not a bare fact. Read the file with "
                "read_records and take each record's .fact."
            )
        try:
            facts.append(_fact(fields))
        except FactFileError:
            raise
        except FactError as error:
            raise FactFileError(f"{fields.where}: {error}") from error
    return facts


def _own(fields: Fields) -> Record:
    fields.only(_RECORD_FIELDS)
    probes: dict[str, tuple[Probe, ...]] = {}
    for group, items in fields.groups("probes"):
        for item in items:
            item.only(_PROBE_FIELDS)
        probes[group] = tuple(
            Probe(item.take("prompt", str), item.take("expected", str), item.optional("foil", str))
            for item in items
        )
    paraphrases, neighbours, generation_prompts = (fields.texts(name) for name in _PROMPT_LISTS)
    return Record(
        _fact(fields.inside("fact")), paraphrases, neighbours, generation_prompts, probes,
        fields.optional("case_id", int, str), fields.optional("relation", str),
    )  # fmt: skip


def _counterfact(fields: Fields) -> Record:
    rewrite = fields.inside("requested_rewrite")
    new, true = (rewrite.inside(name).take("str", str) for name in ("target_new", "target_true"))
    return Record(
        Fact(rewrite.take("prompt", str), rewrite.take("subject", str), new, true),
        paraphrases=fields.texts("paraphrase_prompts"),
        neighbours=fields.texts("neighborhood_prompts"),
        generation_prompts=fields.texts("generation_prompts"),
        case_id=fields.optional("case_id", int, str),
        relation=rewrite.optional("relation_id", str),
    )


def _reduced(fields: Fields) -> Record:
    prompt, subject, target_new, true = (
        fields.take(name, str) for name in ("prompt", "subject", "target_new", "ground_truth")
    )
    fact = Fact(prompt, subject, target_new, true)
    rephrase = fields.optional("rephrase_prompt", str)
    neighbours: tuple[str, ...] = ()
    probes: dict[str, tuple[Probe, ...]] = {}
    if "locality_prompt" in fields:
        locality = fields.take("locality_prompt", str)
        answer = fields.take("locality_ground_truth", str)
        if answer.strip() == fact.target_true:
            neighbours = (locality,)
        else:
            probes = {"locality": (Probe(locality, answer),)}
    generation = () if rephrase is None else (rephrase,)
    return Record(
        fact, neighbours=neighbours, generation_prompts=generation, probes=probes,
        case_id=fields.optional("case_id", int, str),
    )  # fmt: skip


def _counterfactual(prompt: str, subject: str, target_new: str, answers: list[str]) -> Fact:
    """A zsRE fact, whose new target must be none of the right `answers`."""
    fact = Fact(prompt, subject, target_new, answers[0] if answers else None)
    if fact.target_new in (answer.strip() for answer in answers):
        raise FactError(
            f"the new target is one of the right answers: {quote(fact.target_new)} for {fact}. "
            "Such an edit changes nothing that could be measured."
        )
    return fact


def _zsre(fields: Fields) -> Record:
    fields.take("answers", list)
    answers = list(fields.texts("answers"))
    subject = fields.take("subject", str)
    fact = _counterfactual(fields.take("src", str), subject, fields.take("alt", str), answers)
    probes = {}
    if "loc" in fields:
        probe = Probe(fields.take("loc", str), fields.take("loc_ans", str))
        probes = {"locality": (probe,)}
    rephrase = fields.optional("rephrase", str)
    case_id = fields.number - 1  # the file has none; the published readers count from 0
    return Record(fact, () if rephrase is None else (rephrase,), probes=probes, case_id=case_id)


def _strings(value: object) -> list[str]:
    """All strings in nested lists that are not blank, in order."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _knowedit(fields: Fields) -> Record:
    answers = _strings(fields.take("ground_truth", str, list))
    prompt, subject = fields.take("prompt", str), fields.take("subject", str)
    fact = _counterfactual(prompt, subject, fields.take("target_new", str), answers)
    probes: dict[str, tuple[Probe, ...]] = {}
    for group, items in chain(fields.groups("locality"), fields.groups("portability")):
        made = []
        for item in items:
            asked, said = (_strings(item.values.get(name)) for name in ("prompt", "ground_truth"))
            if asked and said:  # some of the published checks have no answer
                made.append(Probe(asked[0], said[0]))
        probes[group] = tuple(made)
    rephrase = fields.optional("rephrase_prompt", str)
    case_id = fields.number - 1
    return Record(fact, () if rephrase is None else (rephrase,), probes=probes, case_id=case_id)


def _reader(fields: Fields) -> Callable[[Fields], Record]:
    if "requested_rewrite" in fields:
        return _counterfact
    if "fact" in fields:
        return _own
    if "src" in fields:
        return _zsre
    if "locality" in fields or isinstance(fields.values.get("ground_truth"), list):
        return _knowedit
    if "ground_truth" in fields:
        return _reduced
    if "prompt" in fields:
        return lambda bare: Record(_fact(bare))
    found = ", ".join(map(repr, fields.values)) or "none"
    raise FactFileError(
        f"{fields.where}: no known format, fields found: {found}. Expected CounterFact "
        "('requested_rewrite'), zsRE ('src', 'alt', 'answers'), the reduced form ('prompt', "
        "'ground_truth'), or this library's own ('fact', 'paraphrases', 'neighbours', ...)."
    )


def _records(objects: list[Fields], source: str, skip_bad: bool) -> list[Record]:
    records, reasons, first = [], Counter[str](), ""
    for fields in objects:
        try:
            records.append(_reader(fields)(fields))
        except FactFileError:
            raise
        except FactError as error:
            case = fields.values.get("case_id")
            name = f"record {fields.number - 1 if case is None else case}"
            message = f"{fields.where}, {name}: {error}"
            if not skip_bad:
                advice = "Pass skip_bad=True to leave out such records."
                raise FactFileError(f"{message} {advice}") from error
            reasons[str(error).partition(":")[0]] += 1
            first = first or message
    why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
    if not records:
        raise FactFileError(f"{source}: no usable record. {why}. First: {first}")
    if reasons:
        logger.warning(
            "%s: skipped %d of %d records: %s. First: %s",
            source, reasons.total(), len(objects), why, first,
        )  # fmt: skip
    return records


def read_records(path: str | os.PathLike[str], *, skip_bad: bool = False) -> list[Record]:
    """The records of a file, in any of the formats that the module's docstring lists.

    Raises `FactFileError` for a file that is malformed, naming the line and the field, and for a
    record that is well formed but no usable fact (its subject is not in its prompt; its targets
    are equal). `skip_bad=True` leaves the latter out and logs how many and why.
    """
    return _records(read_objects(Path(path)), str(path), skip_bad)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}, {str(error).strip().rstrip('.')}"


def _hub_counterfact(skip_bad: bool) -> list[Record]:
    """CounterFact (Meng et al. 2022) from the Hub: both of its splits, by case_id."""
    url = "https://rome.baulab.info/data/dsets/counterfact.json"
    advice = f"Or download {url} and pass the file's path instead of 'counterfact'."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FactFileError(
            "'counterfact' is read with the package datasets, which is not installed. Install it "
            f"(pip install 'unified_edit[hub]'). {advice}"
        ) from error
    try:
        splits = load_dataset("azhx/counterfact")
    except Exception as error:  # whatever the network, the Hub or the cache raises
        raise FactFileError(
            "'counterfact' could not be loaded from the Hub (azhx/counterfact): "
            f"{_said(error)}. Check the network. {advice}"
        ) from error
    rows = sorted((row for split in splits.values() for row in split), key=lambda r: r["case_id"])
    objects = [Fields(dict(row), f"azhx/counterfact, row {i}", i) for i, row in enumerate(rows, 1)]
    return _records(objects, "azhx/counterfact", skip_bad)


def _hub_zsre(skip_bad: bool) -> list[Record]:
    """zsRE from the Hub, in KnowEdit's selection (Zhang et al. 2024)."""
    url = "https://rome.baulab.info/data/dsets/zsre_mend_eval.json"
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            "zjunlp/KnowEdit", "benchmark/ZsRE/ZsRE-test-all.json", repo_type="dataset"
        )
    except Exception as error:  # whatever the network, the Hub or the cache raises
        raise FactFileError(
            f"'zsre' could not be loaded from the Hub (zjunlp/KnowEdit): {_said(error)}. Check the "
            f"network, or download {url} and pass the file's path instead of 'zsre'."
        ) from error
    return read_records(path, skip_bad=skip_bad)


def _atlas(skip_bad: bool) -> list[Record]:
    from unified_edit.atlas.records import atlas_records

    return list(atlas_records())


_NAMED: dict[str, Callable[[bool], list[Record]]] = {
    "atlas": _atlas, "counterfact": _hub_counterfact, "zsre": _hub_zsre,
}  # fmt: skip


def load_records(
    name_or_path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> list[Record]:
    """Records by the name of a data set, or from a file.

    "atlas" needs no network; "counterfact" and "zsre" (KnowEdit's selection) are downloaded from
    the Hugging Face Hub; anything else is a path for `read_records`. `limit`: at most so many of
    the usable records, the first ones, or with a `seed` a sample without replacement, which is
    the same for the same seed. Raises `FactFileError` where the data cannot be had or read, and
    `FactError` for a limit below 1.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise FactError(f"limit must be a whole number of at least 1: got {limit!r}. Or leave it.")
    if isinstance(name_or_path, str) and name_or_path in _NAMED:
        records = _NAMED[name_or_path](skip_bad)
    else:
        path = Path(name_or_path)
        if not path.exists():
            near = difflib.get_close_matches(str(name_or_path).lower(), _NAMED, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise FactFileError(
                f"{str(name_or_path)!r} is neither a data set's name nor a file.{hint} Names: "
                f"{', '.join(map(repr, _NAMED))}; a file's path is taken from {Path.cwd()}."
            )
        records = read_records(path, skip_bad=skip_bad)
    if limit is None or limit >= len(records):
        return records
    return records[:limit] if seed is None else random.Random(seed).sample(records, limit)
