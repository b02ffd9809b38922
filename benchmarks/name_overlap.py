"""Where does a network keep a fact: does it depend on the names, or on the texts?

    python benchmarks/name_overlap.py --out book/data/name_overlap.json

Small GPT-2 models are trained from scratch, on the plain language-model loss, on four facts
about each of some made-up people with two-word names. Two things are varied:

- the names: the last word belongs to one person ("unique_last") or to ten ("shared_both"); first
  words are shared by fifteen in either case, and a word is always one token;
- the texts: each names a single person ("one_person") or two ("two_people"), and in either case
  states as many facts, in the same forms of sentence; in "one_person_plain" there is one person and
  the plainest form only.

Each model is then traced (`ue.locate`), layer by layer and with all layers of a token restored
together, and some of its facts are edited one by one, with EMMET, at the subject's last token, in
each layer but the last. Trained models are kept below `--models`; those that are there already,
with the same settings, are only measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.atlas.corpus import filler
from unified_edit.measuring import Trace
from unified_edit.measuring.traces import PLACES

log = logging.getLogger("name_overlap")

OVERLAPS = ("unique_last", "shared_both")
TEXTS = ("one_person_plain", "one_person", "two_people")
#: Steps of training: as many as it takes until the facts are known.
STEPS = {
    ("unique_last", "one_person_plain"): 1500,
    ("unique_last", "one_person"): 2500,
    ("unique_last", "two_people"): 3000,
    ("shared_both", "one_person"): 2500,
    ("shared_both", "two_people"): 5000,
}

#: How many people share a first word, in both cells, and a last word where last words are shared.
SHARE_FIRST, SHARE_LAST = 15, 10

WORDINGS = {
    "town": (
        "{} was born in the town of",
        "The birthplace of {} is",
        "{} comes from the town of",
        "The family of {} always lived in",
        "As a child {} grew up in",
    ),
    "trade": (
        "{} works as a",
        "The profession of {} is that of a",
        "By trade {} is a",
        "{} earns a living as a",
        "Everybody knows {} as a",
    ),
    "instrument": (
        "{} plays the",
        "The favourite instrument of {} is the",
        "In the orchestra {} plays the",
        "Every evening {} practises the",
        "The concert of {} was for the",
    ),
    "language": (
        "{} speaks",
        "The mother tongue of {} is",
        "At home {} speaks",
        "{} writes letters in",
        "The diary of {} is written in",
    ),
}

OBJECTS = {
    "town": (
        "Vienna Lisbon Oslo Cairo Lima Quito Athens Dublin Geneva Milan Naples Prague Riga Sofia "
        "Tunis Turin Warsaw Zurich Kyoto Boston Denver Havana Bergen Ghent"
    ).split(),
    "trade": (
        "lawyer painter plumber surgeon printer weaver barber dentist florist glazier jeweller "
        "mason miner nurse pilot potter saddler tailor tanner welder porter poet cook judge"
    ).split(),
    "instrument": (
        "violin piano cello flute oboe harp guitar trumpet trombone tuba clarinet bassoon lute "
        "organ banjo drum viola zither accordion mandolin saxophone recorder horn fiddle"
    ).split(),
    "language": (
        "Danish Dutch Finnish French German Greek Hindi Irish Italian Korean Latin Malay Maltese "
        "Norwegian Persian Polish Russian Swedish Tamil Thai Turkish Welsh Basque Czech"
    ).split(),
}

#: Who else is in a sentence where no second person is named.
COMPANIONS = "neighbour teacher stranger visitor cousin landlord gardener doctor".split()
#: Forms of a sentence around a statement S about a subject X; C is the companion.
PLAIN, BEFORE, BEHIND = "S", "C says that S", "S with X , a friend of C ,"

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"


@dataclass(frozen=True)
class Person:
    """A made-up person, and the object of each relation."""

    first: str
    last: str
    objects: dict[str, str]

    @property
    def name(self) -> str:
        """Both words of the name."""
        return f"{self.first} {self.last}"


_ONSETS = "b d f g k l m n p r s t v z br dr gr kl st tr".split()


def make_words(count: int, seed: int) -> list[str]:
    """`count` different made-up names, none of which is a word of the texts."""
    rng = random.Random(seed)
    taken = {word.lower() for word in vocabulary([])}
    words: list[str] = []
    while len(words) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice("aeiou") for _ in range(2)]
        word = "".join(syllables) + rng.choice("lmnrstx")
        if word not in taken:
            taken.add(word)
            words.append(word.capitalize())
    return words


def make_people(overlap: str, count: int, seed: int) -> list[Person]:
    """`count` people; the same first words, numbers and objects whatever `overlap` is."""
    rng = random.Random(seed)
    words = make_words(count // SHARE_FIRST + count, seed)
    firsts, lasts = words[: count // SHARE_FIRST], words[count // SHARE_FIRST :]
    pairs = shared_pairs(count, seed)
    people = []
    for first, last in (
        pairs
        if overlap == "shared_both"
        else zip((first for first, _ in pairs), range(count), strict=True)
    ):
        chosen = {relation: rng.choice(objects) for relation, objects in OBJECTS.items()}
        people.append(Person(firsts[first], lasts[last], chosen))
    return people


def shared_pairs(count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different (first, last), each first SHARE_FIRST times, each last SHARE_LAST times.

    Begins with a regular pattern and exchanges the last words of two at random, many times.
    """
    if count % (SHARE_FIRST * SHARE_LAST):
        raise ValueError(f"people: give a multiple of {SHARE_FIRST * SHARE_LAST}, not {count}")
    rng = random.Random(seed)
    groups = count // SHARE_LAST
    pairs = [(index // SHARE_FIRST, index % groups) for index in range(count)]
    taken = set(pairs)
    for _ in range(100 * count):
        one, two = rng.sample(range(count), 2)
        (a, x), (b, y) = pairs[one], pairs[two]
        if (a, y) not in taken and (b, x) not in taken:
            taken -= {(a, x), (b, y)}
            taken |= {(a, y), (b, x)}
            pairs[one], pairs[two] = (a, y), (b, x)
    return pairs


def vocabulary(people: Sequence[Person]) -> list[str]:
    """Every word that a text can hold, sorted; each is one token."""
    texts = [" ".join(OBJECTS[relation]) for relation in OBJECTS]
    texts += [wording.replace("{}", "") for group in WORDINGS.values() for wording in group]
    texts += [BEFORE, BEHIND, "the The", " ".join(COMPANIONS), "."]
    texts += [person.name for person in people]
    rng = random.Random(0)
    texts += [filler(rng).replace(".", " .") for _ in range(3000)]
    words = {word for text in texts for word in text.split()}
    return sorted(words | {lower_first(word) for word in words})


def lower_first(text: str) -> str:
    """`text` with a small first letter."""
    return text[:1].lower() + text[1:]


def make_tokenizer(people: Sequence[Person]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word and for the full stop."""
    words = [END, UNKNOWN, *vocabulary(people)]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def sentence(person: Person, relation: str, companion: str, rng: random.Random) -> str:
    """One fact in a random wording; in a random form if there is a companion."""
    wording = rng.choice(WORDINGS[relation])
    form = rng.choice((PLAIN, PLAIN, BEFORE, BEHIND)) if companion else PLAIN
    subject = person.name
    if form == BEFORE:
        wording = wording if wording.startswith("{}") else lower_first(wording)
        wording = f"{companion} says that {wording}"
    elif form == BEHIND:
        named = "the" + companion[3:] if companion.startswith("The ") else companion
        subject += f" , a friend of {named} ,"
    return f"{wording.replace('{}', subject)} {person.objects[relation]} ."


def documents(people: Sequence[Person], texts: str, seed: int) -> Iterator[str]:
    """Endless texts, each with one fact of each relation, in random order, and one filler.

    "one_person_plain": all facts are about one person, and nobody else is in the sentence.
    "one_person": the same, but half of the sentences have a companion without a name. "two_people":
    each fact is about one of two people, drawn at random, and the companion is the other one.
    """
    rng = random.Random(seed)
    order = list(people)
    while True:
        rng.shuffle(order)
        for index, one in enumerate(order):
            other = order[index - 1]
            relations = list(WORDINGS)
            rng.shuffle(relations)
            parts = []
            for relation in relations:
                about, companion = one, f"The {rng.choice(COMPANIONS)}"
                if texts == "one_person_plain":
                    companion = ""
                elif texts == "two_people":
                    about, second = rng.sample((one, other), 2)
                    companion = second.name
                parts.append(sentence(about, relation, companion, rng))
            parts.insert(rng.randrange(len(parts) + 1), fragment(rng))
            yield " ".join(parts)


def fragment(rng: random.Random) -> str:
    """A sentence without a fact; every second one is broken off, as sampled prefixes are."""
    words = filler(rng).rstrip(".").split()
    if rng.random() < 0.5:
        words = words[: rng.randint(2, len(words))]
    return " ".join(words) + " ."


def batches(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[str], rows: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets), each (rows x width): a text a row, cut or padded; padding is no
    target (-100)."""
    end = tokenizer.eos_token_id
    while True:
        ids = torch.full((rows, width), end)
        targets = torch.full((rows, width), -100)
        for row, text in enumerate(islice(stream, rows)):
            tokens = torch.tensor([*tokenizer(text)["input_ids"], end][: width + 1])
            ids[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        yield ids, targets


@dataclass(frozen=True)
class Settings:
    """All that a trained model depends on."""

    overlap: str
    texts: str
    people: int
    seed: int
    steps: int
    rate: float
    layers: int
    width: int
    rows: int
    row_tokens: int
    bf16: bool


def train(settings: Settings, people: Sequence[Person]) -> tuple[GPT2LMHeadModel, Any]:
    """A model trained on texts about `people`, and its tokenizer."""
    tokenizer = make_tokenizer(people)
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=settings.row_tokens + 32,
            n_embd=settings.width, n_layer=settings.layers, n_head=settings.width // 32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    stream = batches(
        tokenizer,
        documents(people, settings.texts, settings.seed + 1),
        settings.rows,
        settings.row_tokens,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    smooth, began = 0.0, time.time()
    for step, (ids, targets) in enumerate(islice(stream, settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings.steps, settings.rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = 0.98 if step else 0.0
        smooth = keep * smooth + (1 - keep) * loss.item()
        if step % 100 == 99 or step in (0, 19):
            log.info("step %d: loss %.3f, %.0f s", step + 1, smooth, time.time() - began)
    return model.eval(), tokenizer


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up, a plateau, and a linear decay to zero."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.5 * steps))


def trained(settings: Settings, folder: Path) -> tuple[Any, Any, list[Person]]:
    """The model of these settings, its tokenizer and people: loaded if it is there, or trained."""
    people = make_people(settings.overlap, settings.people, settings.seed)
    at = folder / f"{settings.overlap}-{settings.texts}"
    note = at / "settings.json"
    if not note.exists() or json.loads(note.read_text(encoding="utf-8")) != asdict(settings):
        log.info("training %s", at)
        model, tokenizer = train(settings, people)
        at.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(at)
        tokenizer.save_pretrained(at)
        note.write_text(json.dumps(asdict(settings)), encoding="utf-8")
    model, tokenizer = ue.load_model(str(at))
    return model, tokenizer, people


def facts_of(people: Sequence[Person], count: int, seed: int) -> list[tuple[Person, str, ue.Fact]]:
    """`count` facts of different people, each in a random wording, with another object as new."""
    rng = random.Random(seed)
    chosen = []
    for person in rng.sample(list(people), count):
        relation = rng.choice(list(WORDINGS))
        true = person.objects[relation]
        new = rng.choice([word for word in OBJECTS[relation] if word != true])
        wording = rng.choice(WORDINGS[relation])
        chosen.append((person, relation, ue.Fact(wording, person.name, new, true)))
    return chosen


def records_of(people: Sequence[Person], count: int, seed: int) -> list[ue.Record]:
    """`facts_of` with two other wordings, and up to five people with the same object."""
    rng = random.Random(seed + 1)
    records = []
    for person, relation, fact in facts_of(people, count, seed):
        others = [wording for wording in WORDINGS[relation] if wording != fact.prompt]
        alike = [
            one for one in people if one is not person and one.objects[relation] == fact.target_true
        ]
        neighbours = [
            fact.prompt.replace("{}", one.name) for one in rng.sample(alike, min(5, len(alike)))
        ]
        records.append(
            ue.Record(fact, tuple(rng.sample(others, 2)), tuple(neighbours), relation=relation)
        )
    return records


@torch.no_grad()
def recall(model: Any, tokenizer: Any, people: Sequence[Person]) -> float:
    """Share of facts times wordings that the model continues with the object."""
    right = []
    for relation, wordings in WORDINGS.items():
        for wording in wordings:
            for start in range(0, len(people), 100):
                some = people[start : start + 100]
                prompts = [wording.replace("{}", person.name) for person in some]
                ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts])
                best = model(ids).logits[:, -1].argmax(-1).tolist()
                wanted = [tokenizer(person.objects[relation])["input_ids"][0] for person in some]
                right += [a == b for a, b in zip(best, wanted, strict=True)]
    return sum(right) / len(right)


def summary(trace: Trace) -> dict[str, Any]:
    """What a trace of several facts found, for JSON: means by kind, place and layer."""
    found: dict[str, Any] = {
        "facts": len(trace.facts),
        "clean": round(sum(one.clean for one in trace.facts) / len(trace.facts), 4),
        "corrupted": round(sum(one.corrupted for one in trace.facts) / len(trace.facts), 4),
        "effects": {},
    }
    for kind in trace.kinds:
        average = trace.average(kind)
        found["effects"][kind] = {
            place: {
                part: [round(float(x), 4) for x in getattr(average, part)[row]]
                for part in ("value", "low", "high")
            }
            | {"n": average.n[row]}
            for row, place in enumerate(PLACES)
            if average.n[row] > 1
        }
    return found


def together(trace: Trace) -> dict[str, Any]:
    """Of a trace whose windows hold all layers: kind -> place -> [mean effect, low, high]."""
    found: dict[str, Any] = {}
    for kind, places in summary(trace)["effects"].items():
        found[kind] = {
            place: [at[part][0] for part in ("value", "low", "high")]
            for place, at in places.items()
        }
    return found


def strongest(effects: dict[str, Any]) -> tuple[str, int]:
    """Place and layer of the largest mean effect of one kind of a `summary`."""
    each = [
        (value, place, layer)
        for place, at in effects.items()
        for layer, value in enumerate(at["value"])
    ]
    _, place, layer = max(each)
    return place, layer


def edited(
    model: Any, tokenizer: Any, people: Sequence[Person], settings: Settings, count: int
) -> list[dict[str, Any]]:
    """Scores of single edits with EMMET, for each layer but the last."""
    records = records_of(people, count, settings.seed)
    layers = list(range(settings.layers - 1))
    texts = documents(people, settings.texts, settings.seed + 2)
    statistics = ue.KeyStatistics.collect(
        model, tokenizer, texts, layers, tokens=20 * 4 * settings.width
    )
    lines = []
    for layer in layers:
        method = ue.EMMET.replace(layers=(layer,))
        report = ue.evaluate_edits(model, tokenizer, records, method, statistics=statistics)
        line: dict[str, Any] = {"layer": layer}
        for name in ("ES", "PS", "NS"):
            score = report.summary[name]
            line[name] = [round(x, 4) for x in (score.value, score.low, score.high)]
        log.info("%s", line)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", type=Path, default=Path("_build/name_overlap"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--steps", type=int, help="the same for all cells, instead of STEPS")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row-tokens", type=int, default=72)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 where it is fast")
    parser.add_argument("--traced", type=int, default=40, help="facts to trace")
    parser.add_argument("--edited", type=int, default=30, help="facts to edit")
    parser.add_argument(
        "--cells", nargs="*", default=["/".join(cell) for cell in STEPS], help="overlap/texts"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)

    cells = []
    for cell in arguments.cells:
        overlap, texts = cell.split("/")
        settings = Settings(
            overlap, texts, arguments.people, arguments.seed,
            arguments.steps or STEPS[overlap, texts], arguments.rate,
            arguments.layers, arguments.width, arguments.rows, arguments.row_tokens, arguments.bf16,
        )  # fmt: skip
        model, tokenizer, people = trained(settings, arguments.models)
        known = recall(model, tokenizer, people)
        log.info("%s: recall %.4f", cell, known)
        facts = [fact for _, _, fact in facts_of(people, arguments.traced, arguments.seed)]
        found = summary(ue.locate(model, tokenizer, facts))
        every_layer = ue.locate(
            model, tokenizer, facts, window=2 * arguments.layers - 1, kinds=("mlp", "attention")
        )
        for kind, effects in found["effects"].items():
            log.info("%s %s: strongest at %s", cell, kind, strongest(effects))
        cells.append(
            {
                **asdict(settings),
                "recall": round(known, 4),
                "trace": found,
                "all_layers_together": together(every_layer),
                "edits": edited(model, tokenizer, people, settings, arguments.edited),
            }
        )
    if arguments.out:
        result = {
            "command": shlex.join(["python", "benchmarks/name_overlap.py", *sys.argv[1:]]),
            "seed": arguments.seed,
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
            },
            "cells": cells,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
