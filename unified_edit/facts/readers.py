"""Files of facts and of records: JSON lists and JSON Lines, in the formats of the field.

What each format gives a `Record`, and what it leaves empty:

| format (recognised by)            | fact                  | paraphrases | neighbours  | generation | probes     |
|-----------------------------------|-----------------------|-------------|-------------|------------|------------|
| CounterFact (`requested_rewrite`) | target_new/_true .str | 2           | 10          | 10         | none       |
| zsRE of MEND (`src`, `alt`)       | alt against answers[0]| 1           | none        | none       | `locality` |
| KnowEdit (`locality`,             | target_new against    | any number  | none        | none       | its groups |
| `portability`, `rephrase`)        | ground_truth, if any  |             |             |            |            |
| reduced (`ground_truth`)          | as in KnowEdit        | none        | 1           | 1          | `locality` |
| MQuAKE (`requested_rewrite`, a    | target_new/_true .str | 1           | none        | none       | its        |
| list)                             |                       |             |             |            | questions  |
| own (`fact`)                      | as written            | as written  | as written  | as written | as written |
| facts only (`prompt`)             | as written            | none        | none        | none       | none       |

CounterFact's attribute prompts enter none of the scores and are not read. In zsRE `alt` is the
answer that the edit plants and `answers` are the right ones (`pred`, what another model said, is
not used); the unrelated question `loc` is a probe without foil, and so is the "New Question" that
EasyEdit's selection has as `portability`. MEMIT's zsRE runs instead taught
the right answer; build such facts from `answers` yourself. A group "Reasoning" of KnowEdit's
portability becomes the probes "portability: Reasoning", one a prompt, with the first of the answers
that count as right there; where `ground_truth` is absent or empty, as throughout `wiki_recent`, the
fact has no `target_true`. (Its WikiBio has no prompts and is refused.) In the reduced form the one
"rephrase" is mostly a *generation* prompt, so it is never counted as a paraphrase; its locality
prompt is a neighbour when its answer is `target_true`, else a probe. The multi-hop questions of
MQuAKE (arXiv 2305.14795) are the probes "portability: multi-hop", `new_answer` against `answer`
(aliases and single hops are not read); a case of several rewrites, whose question needs all of them
at once, is no record. The own format is what `json.dumps(dataclasses.asdict(record))` writes, one
record a line.

Fields that no reader knows, and checks that lack a question or an answer, are left out and said so
in one warning of the log.
"""  # noqa: E501

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator

from unified_edit.arguments import as_path
from unified_edit.errors import FactError, FactFileError, quote
from unified_edit.facts.facts import Fact, Probe, Record
from unified_edit.facts.json_objects import Fields, read_objects

logger = logging.getLogger(__name__)

_FACT_FIELDS = ("prompt", "subject", "target_new", "target_true")
_PROBE_FIELDS = ("prompt", "expected", "foil")
_PROMPT_LISTS = ("paraphrases", "neighbours", "generation_prompts")
_RECORD_FIELDS = ("fact", *_PROMPT_LISTS, "probes", "case_id", "relation")
_CHECKS = ("locality", "portability")
#: The question and answer of EasyEdit's zsRE that a fact leads to.
_NEW = ("New Question", "New Answer")
# Each makes a record of what would otherwise be a bare fact.
_EASYEDIT_FIELDS = (*_CHECKS, "rephrase", "ground_truth", "rephrase_prompt", "locality_prompt")
# Known, and of no use here.
_UNREAD = {
    *("attribute_prompts", "pararel_idx", "pred", "cond"),
    *("answer_alias", "new_answer_alias", "single_hops", "new_single_hops", "orig"),
}


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
    for fields in read_objects(as_path(path, "path", FactFileError)):
        if fields.values.keys() & _FORMATS.keys() - {"prompt"}:
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
    probes = {}
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


def _case_id(fields: Fields) -> int | str:
    # Most files of zsRE have none; the published readers count from 0.
    return fields.number - 1 if (given := fields.optional("case_id", int, str)) is None else given


def _counterfact(fields: Fields) -> Record:
    rewrite = fields.inside("requested_rewrite")
    new, true = (rewrite.inside(name).take("str", str) for name in ("target_new", "target_true"))
    return Record(
        Fact(rewrite.take("prompt", str), rewrite.take("subject", str), new, true),
        paraphrases=fields.texts("paraphrase_prompts"),
        neighbours=fields.texts("neighborhood_prompts"),
        generation_prompts=fields.texts("generation_prompts"),
        case_id=_case_id(fields),
        relation=rewrite.optional("relation_id", str) or None,
    )


def _mquake(fields: Fields) -> Record:
    rewrites = fields.take("requested_rewrite", list)
    if len(rewrites) != 1:
        raise FactError(
            f"a case of several rewrites: got {len(rewrites)}. Its question needs all of them at "
            "once, and a record has one fact."
        )
    rewrite = Fields(rewrites[0], f"{fields.where}, in 'requested_rewrite'", fields.number)
    targets = (rewrite.inside(name).take("str", str) for name in ("target_new", "target_true"))
    fact = Fact(rewrite.take("prompt", str), rewrite.take("subject", str), *targets)
    new, old = fields.take("new_answer", str), fields.optional("answer", str)
    foil = None if old is None or old.strip() == new.strip() else old
    probes = tuple(Probe(question, new, foil) for question in fields.texts("questions"))
    return Record(
        fact, rewrite.answers("question"), probes={"portability: multi-hop": probes},
        case_id=_case_id(fields), relation=rewrite.optional("relation_id", str) or None,
    )  # fmt: skip


def _rewritten(fields: Fields) -> Record:
    """CounterFact, or MQuAKE, whose cases have a list of rewrites."""
    several = isinstance(fields.values["requested_rewrite"], list)
    return _mquake(fields) if several else _counterfact(fields)


def _counterfactual(fields: Fields, prompt: str, target_new: str, right: str) -> Fact:
    """A fact whose new target must be none of the right answers, where any are known."""
    text, subject, new = (fields.take(name, str) for name in (prompt, "subject", target_new))
    answers = fields.answers(right)
    fact = Fact(text, subject, new, answers[0] if answers else None)
    if fact.target_new in (answer.strip() for answer in answers):
        raise FactError(
            f"the new target is one of the right answers: {quote(fact.target_new)} for {fact}. "
            "Such an edit changes nothing that could be measured."
        )
    return fact


def _zsre(fields: Fields) -> Record:
    fields.take("answers", list)
    fact = _counterfactual(fields, "src", "alt", "answers")
    probes = {}
    if "loc" in fields:
        probes["locality"] = (Probe(fields.take("loc", str), fields.take("loc_ans", str)),)
    moved = fields.values.get("portability")
    if isinstance(moved, dict) and all(moved.get(name) for name in _NEW):
        asked, said = (fields.inside("portability").take(name, str) for name in _NEW)
        probes["portability"] = (Probe(asked, said),)
    return Record(fact, fields.answers("rephrase"), probes=probes, case_id=_case_id(fields))


def _easyedit(fields: Fields) -> Record:
    """KnowEdit and the reduced form, which share the names of most fields."""
    fact = _counterfactual(fields, "prompt", "target_new", "ground_truth")
    neighbours: tuple[str, ...] = ()
    probes: dict[str, tuple[Probe, ...]] = {}
    reduced = "locality_prompt" in fields
    if reduced:
        near = Probe(fields.take("locality_prompt", str), fields.take("locality_ground_truth", str))
        if near.expected == fact.target_true:
            neighbours = (near.prompt,)
        else:
            probes["locality"] = (near,)
    for kind in _CHECKS:
        for group, checks in fields.groups(kind):
            name = kind if group == kind else f"{kind}: {group}"
            made = tuple(probe for check in checks for probe in _probes(check, fields.notes))
            probes[name] = probes.get(name, ()) + made
    reworded, paraphrases = fields.answers("rephrase_prompt"), fields.answers("rephrase")
    if reduced or not (
        fields.values.keys() & {*_CHECKS, "rephrase"}
        or isinstance(fields.values.get("ground_truth"), list)
    ):
        return Record(fact, paraphrases, neighbours, reworded, probes, _case_id(fields))
    return Record(fact, paraphrases + reworded, probes=probes, case_id=_case_id(fields))


def _probes(check: Fields, notes: list[str]) -> Iterator[Probe]:
    """One probe, or one a pair where the check holds lists of prompts and of their answers."""
    prompts, answers = (check.optional(name, str, list) for name in ("prompt", "ground_truth"))
    pairs = [(prompts, answers)]
    if isinstance(prompts, list) and len(prompts) > 1:
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise FactFileError(
                f"{check.where}: {len(prompts)} prompts need a list of as many answers. Give it "
                "as 'ground_truth'."
            )
        pairs = list(zip(prompts, answers, strict=True))
    for prompt, answer in pairs:
        one = Fields({"prompt": prompt, "ground_truth": answer}, check.where, check.number)
        asked, said = one.answers("prompt"), one.answers("ground_truth")
        if asked and said:
            yield Probe(asked[0], said[0])
        else:
            notes.append("check without a prompt or an answer")
    notes.extend(f"field {name!r} of a check" for name in check.values if name not in check.used)


_FORMATS: dict[str, Callable[[Fields], Record]] = {
    "requested_rewrite": _rewritten, "fact": _own, "src": _zsre,
    **dict.fromkeys(_EASYEDIT_FIELDS, _easyedit), "prompt": lambda bare: Record(_fact(bare)),
}  # fmt: skip


def _record(fields: Fields) -> Record:
    for name, reader in _FORMATS.items():
        if name in fields.values:
            return reader(fields)
    found = ", ".join(map(repr, fields.values)) or "none"
    raise FactFileError(
        f"{fields.where}: no known format, fields found: {found}. Expected CounterFact "
        "or MQuAKE ('requested_rewrite'), zsRE ('src', 'alt', 'answers'), KnowEdit or the reduced "
        "form ('prompt', 'ground_truth', ...), or this library's own ('fact', 'paraphrases', ...)."
    )


def as_records(objects: list[Fields], source: str, *, skip_bad: bool = False) -> list[Record]:
    """The records that the `objects` of a `source` describe, as `read_records` gives them."""
    records, reasons, left_out, first = [], Counter[str](), Counter[str](), ""
    for fields in objects:
        try:
            records.append(_record(fields))
        except FactFileError:
            raise
        except FactError as error:
            message = f"{fields.where}, record {_case_id(fields)}: {error}"
            if not skip_bad:
                advice = "Pass skip_bad=True to leave out such records."
                raise FactFileError(f"{message} {advice}") from error
            reasons[str(error).partition(":")[0]] += 1
            first = first or message
        else:
            unread = [name for name in fields.values if name not in fields.used | _UNREAD]
            left_out.update(f"field {name!r}" for name in unread if name in fields)
            left_out.update(fields.notes)
    why, what = (
        "; ".join(f"{n} x {text}" for text, n in counts.most_common())
        for counts in (reasons, left_out)
    )
    if not records:
        raise FactFileError(f"{source}: no usable record. {why}. First: {first}")
    if what:
        logger.warning("%s: left out of the records: %s", source, what)
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
    are equal). `skip_bad=True` leaves the latter out and logs how many and why. So is logged what
    of the records is left out: unknown fields, checks without an answer.
    """
    file = as_path(path, "path", FactFileError)
    return as_records(read_objects(file), str(file), skip_bad=skip_bad)
