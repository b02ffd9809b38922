"""Records on atlas: edits to be made, and the prompts that show what they did.

One record a subject that is not held out. The new object is another one *of the same relation*,
never a right answer. Neighbours are held-out subjects with the same true object, which no record
ever edits: five of them in two wordings each. One-to-one relations have no such neighbours; there
the subject that really owns the new object is asked instead (probe group "own_object"). The
edited subject's *other* relations are asked too ("other_relations"): they share its key.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache

from unified_edit.atlas.corpus import filler
from unified_edit.atlas.knowledge import Knowledge, Triple, fill, load_knowledge
from unified_edit.facts.facts import Fact, Probe, Record

#: Relations in which an object belongs to one subject.
ONE_TO_ONE = frozenset({"countries.capital"})
#: An object is used in a record if at least so many held-out subjects share it.
SHARED_BY = 5
NEIGHBOUR_WORDINGS = 2
#: The first wordings of each relation have the subject first; edits are made with one of them.
EDIT_WORDINGS = 3
#: Relations with more than one right answer, of which the data give one: never edited.
SEVERAL_RIGHT = frozenset({"people.instrument", "countries.language"})
#: Fields that one person may well have worked in both of: a new field is from another group.
AKIN = (
    frozenset(
        "physics chemistry mathematics astronomy engineering geology biology medicine "
        "psychology philosophy economics".split()
    ),
    frozenset("painting sculpture architecture".split()),
    frozenset("literature film music politics exploration".split()),
)


@lru_cache(maxsize=1)
def atlas_records(seed: int = 0) -> tuple[Record, ...]:
    """All records of atlas, in the order of the data; always the same for a seed."""
    return tuple(_make(load_knowledge(), seed))


def _make(knowledge: Knowledge, seed: int) -> list[Record]:
    held_out = knowledge.held_out
    shared = Counter((t.relation, t.object) for t in knowledge.triples if t.subject in held_out)
    pools: dict[str, list[str]] = {}
    for (relation, value), count in sorted(shared.items()):
        if relation not in SEVERAL_RIGHT and (count >= SHARED_BY or relation in ONE_TO_ONE):
            pools.setdefault(relation, []).append(value)
    by_subject: dict[str, list[Triple]] = {}
    for triple in knowledge.triples:
        by_subject.setdefault(triple.subject, []).append(triple)
    records = []
    for subject, triples in by_subject.items():
        if subject in held_out:
            continue
        rng = random.Random(f"{seed} {subject}")
        right = {triple.object for triple in triples}
        usable = [
            triple
            for triple in triples
            if triple.object in pools.get(triple.relation, ())
            and _new_objects(triple, right, pools)
        ]
        if usable:
            records.append(_record(knowledge, rng.choice(usable), triples, pools, rng))
    return records


def _new_objects(triple: Triple, right: set[str], pools: dict[str, list[str]]) -> list[str]:
    """Objects that may stand in for the true one: none of them right for the subject."""
    group = next((akin for akin in AKIN if triple.object in akin), frozenset())
    return [value for value in pools[triple.relation] if value not in right | group]


def _record(
    knowledge: Knowledge,
    chosen: Triple,
    triples: list[Triple],
    pools: dict[str, list[str]],
    rng: random.Random,
) -> Record:
    subject, relation = chosen.subject, chosen.relation
    right = {triple.object for triple in triples}
    new = rng.choice(_new_objects(chosen, right, pools))
    wordings = list(knowledge.wordings[relation])
    wording = wordings.pop(rng.randrange(EDIT_WORDINGS))
    rng.shuffle(wordings)
    paraphrases = [
        fill(other, subject) if place % 2 == 0 else f"{filler(rng)} {fill(other, subject)}"
        for place, other in enumerate(wordings)
    ]
    sharing = sorted(
        triple.subject
        for triple in knowledge.triples
        if triple.relation == relation
        and triple.object == chosen.object
        and triple.subject in knowledge.held_out
    )
    neighbours, probes = [], {}
    if relation in ONE_TO_ONE:
        owner = next(
            t.subject for t in knowledge.triples if (t.relation, t.object) == (relation, new)
        )
        probes["own_object"] = tuple(
            Probe(fill(line, owner), expected=new, foil=chosen.object)
            for line in knowledge.wordings[relation][:NEIGHBOUR_WORDINGS]
        )
    else:
        for neighbour in rng.sample(sharing, SHARED_BY):
            lines = rng.sample(knowledge.wordings[relation], NEIGHBOUR_WORDINGS)
            neighbours += [fill(line, neighbour) for line in lines]
    others = [triple for triple in triples if triple.relation != relation]
    if others:
        probes["other_relations"] = tuple(
            Probe(fill(rng.choice(knowledge.wordings[t.relation]), subject), expected=t.object)
            for t in others
        )
    return Record(
        fact=Fact(wording, subject=subject, target_new=new, target_true=chosen.object),
        paraphrases=tuple(paraphrases),
        neighbours=tuple(neighbours),
        generation_prompts=tuple(paraphrases[::2]),
        probes=probes,
        case_id=f"atlas:{subject}",
        relation=relation,
    )
