"""One fact by one method after another: how their updates and scores differ on atlas.

    python benchmarks/one_fact.py --out book/data/one_fact.json

Forty facts are written singly into fresh models, by ROME, EMMET and MEMIT, by the released codes of
ROME, r-ROME and p-ROME, and by the methods on the way from EMMET to ROME, in each of which one more
choice is ROME's. Of each update: how long it is, and the angles of its column and of its row with
those of ROME's at the same layer, in the inner product of C0. Before that, for a fact of every
subject, the bare key against the mean over ROME's contexts, in both layers. Values are optimised
once for all methods that share them. Four minutes on a core; methods that the file holds already
are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.editing import SITES, compute_keys
from unified_edit.measuring import Report, Sheet, to_table
from unified_edit.measuring.scores import AFTER
from unified_edit.model import anatomy
from unified_edit.statistics import statistics_for

log = logging.getLogger("one_fact")

COMMAND = "python benchmarks/one_fact.py"
LAYERS = (0, 1)


def methods() -> Iterator[tuple[str, ue.Method, bool]]:
    """Name, method, and whether its scores are asked; ROME comes first."""
    for method in (ue.ROME, ue.ROME_RELEASED, ue.R_ROME, ue.P_ROME, ue.EMMET, ue.MEMIT):
        yield method.name, method, True
    yield "MEMIT, one layer", ue.MEMIT.replace(layers=(1,)), False
    step = ue.EMMET.replace(preset="ROME")
    yield "EMMET, settings", step, False
    step = step.replace(site=SITES["mlp"])
    yield "EMMET, settings, site", step, False
    step = step.replace(contexts=ue.ROME.contexts)
    yield "EMMET, settings, site, contexts", step, False
    step = step.replace(key_mean=ue.ROME.key_mean)
    yield "EMMET, settings, site, contexts, mean", step, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)

    model, tokenizer = ue.load_model("atlas")
    statistics = statistics_for(model, tokenizer, LAYERS)
    everything = ue.load_records("atlas", seed=arguments.seed)
    records = [replace(record, probes={}) for record in everything[: arguments.facts]]
    result: dict[str, Any] = {
        "command": f"{COMMAND} --facts {arguments.facts} --seed {arguments.seed} "
        f"--out {arguments.out.as_posix()}",
        "facts": arguments.facts,
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
        },
        "threads": torch.get_num_threads(),
        "two keys": {},
        "methods": [],
    }
    if arguments.out.exists():
        known = json.loads(arguments.out.read_text(encoding="utf-8"))
        result |= {name: known[name] for name in ("two keys", "methods")}
    if not result["two keys"]:
        began = time.process_time()
        result["two keys"] = two_keys(model, tokenizer, everything, statistics)
        result["two keys"]["minutes"] = minutes(began)
        save(result, arguments.out)

    sheet = Sheet.of(model, tokenizer, records)
    values: dict[Any, ue.Values] = {}
    rome: list[ue.Edit] = []
    for name, method, scored in methods():
        known = {one["name"] for one in result["methods"]}
        if rome and name in known:
            continue
        began = time.process_time()
        resolved = method.resolve(model)
        shared = (
            resolved.site, resolved.contexts, resolved.clamp, resolved.stop_loss, resolved.steps,
        )  # fmt: skip
        facts = [record.fact for record in records]
        if shared not in values:
            values[shared] = ue.optimise_values(model, tokenizer, facts, method)
        edits, rows = [], []
        for number, fact in enumerate(facts):
            edit = ue.edit(
                model, tokenizer, fact, method, values=values[shared].of([fact]),
                statistics=statistics, apply=False,
            )  # fmt: skip
            edits.append(edit)
            if scored and name not in known:
                with edit.applied():
                    rows += sheet.rows(AFTER, [number])
        rome = rome or edits
        if name in known:
            continue
        made: dict[str, Any] = {"name": name}
        made["compared"] = compared(edits, rome, statistics)
        made["losses"] = [len(loss) for loss in values[shared].losses]
        if scored:
            made |= scores(rows)
        made["minutes"] = minutes(began)
        result["methods"].append(made)
        log.info("%s: %s CPU minutes", name, made["minutes"])
        save(result, arguments.out)


def two_keys(
    model: Any, tokenizer: Any, records: Sequence[ue.Record], statistics: ue.KeyStatistics
) -> dict[str, Any]:
    """c and zeta of the bare key and the mean over ROME's contexts, for every record."""
    facts = [record.fact for record in records]
    first = ue.edit(model, tokenizer, facts[0], ue.ROME, statistics=statistics, apply=False)
    prefixes, parts = first.provenance.prefixes, anatomy(model)
    mean = compute_keys(parts, tokenizer, facts, prefixes, LAYERS, "plain")
    bare = compute_keys(parts, tokenizer, facts, [""], LAYERS, "bare")
    found = {}
    for layer in LAYERS:
        metric = statistics.metric(layer)
        A, B = metric.whiten(mean[layer]), metric.whiten(bare[layer])
        between = (A * B).sum(dim=0)
        found[f"layer {layer}"] = {
            "c": digits(between / (A.norm(dim=0) * B.norm(dim=0))),
            "zeta": digits(A.square().sum(dim=0) / between),
        }
    return found


def compared(
    edits: Sequence[ue.Edit], rome: Sequence[ue.Edit], statistics: ue.KeyStatistics
) -> dict[str, Any]:
    """Each update beside ROME's of the same fact and layer, all in the inner product of C0."""
    C0, found = statistics.C0(1), []
    for edit, other in zip(edits, rome, strict=True):
        u, v = column_and_row(edit.delta(1))
        x, y = column_and_row(other.delta(1))
        length, base = cost(edit.delta(1), C0) ** 0.5, cost(other.delta(1), C0) ** 0.5
        sign = 1.0 if float(v @ C0 @ y) > 0 else -1.0  # of the factors of a product
        found.append(
            [
                length / base,
                sign * float(u @ x / (u.norm() * x.norm())),
                float(sign * v @ C0 @ y / ((v @ C0 @ v) * (y @ C0 @ y)).sqrt()),
                cost(edit.delta(1) - other.delta(1), C0) ** 0.5 / base,
                cost(edit.delta(0), statistics.C0(0)) ** 0.5 / base if 0 in edit.layers else 0.0,
            ]
        )
    names = ("length", "cosine of columns", "cosine of rows", "difference", "length at layer 0")
    return {
        name: digits(column) for name, column in zip(names, zip(*found, strict=True), strict=True)
    }


def column_and_row(delta: Tensor) -> tuple[Tensor, Tensor]:
    """u and v of an update u v' of rank one."""
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    assert s[1] < 1e-6 * s[0], "the update is no product"
    return U[:, 0] * s[0], Vh[0]


def cost(delta: Tensor, C0: Tensor) -> float:
    return float(torch.trace(delta @ C0 @ delta.T).clamp_min(0))


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """ES, PS, NS and S with intervals, and the margins of each record."""
    table = to_table(rows)
    summary = Report(table).summary
    found: dict[str, Any] = {
        name: digits([score.value, score.low, score.high])
        for name in ("ES", "PS", "NS", "S")
        for score in (summary[name],)
    }
    for kind in ("paraphrase", "neighbour"):
        asked = table[table["kind"] == kind]
        found[f"margins, {kind}"] = digits(asked.groupby("record")["magnitude"].mean())
    return found


def digits(numbers: Any) -> list[float]:
    return [round(float(x), 4) for x in numbers]


def minutes(began: float) -> float:
    return round((time.process_time() - began) / 60, 1)


def save(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
