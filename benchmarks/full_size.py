"""The equality at full size: E facts at GPT-J's and GPT-2 XL's widths, and how well it holds.

    python benchmarks/full_size.py spectrum xl gptj subjects --tokenizer DIR --corpus FILE \
        --records counterfact.json --out book/data/full_size_solve.json

    spectrum   eigenvalues of atlas's C0 (layer 1), the real spectrum that the next two borrow
    xl         d_k = 6,400, d_out = 1,600: keys of that spectrum, E = 100 ... 6,400
    gptj       d_k = 16,384, d_out = 4,096: keys of that spectrum, E = 10,000 in one solution
    subjects   the distinct subjects of CounterFact's 10,000 records, read by a GPT-J of full width
               with random weights and two blocks (its second MLP is the first that sees context):
               keys and C0 are what the library reads, E is as many as there are subjects

Keys of the first two are drawn as C0^(1/2) times normal ones, so that they have C0's second moment.
Metric, solve and check are timed apart; the peak of memory is the process's. Each part runs in a
process of its own and what the file has already is kept. C0 is given away to the metric, which
factors it in place.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_files import in_lines
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.editing import compute_keys
from unified_edit.model import anatomy
from unified_edit.objective import Metric, solve
from unified_edit.statistics import statistics_for

log = logging.getLogger("full_size")

PARTS = ("spectrum", "xl", "gptj", "subjects")
FILES = ("tokenizer", "corpus", "records")
XL_SIZES = (100, 400, 1600, 3200, 4800, 6000, 6400)


def peak_gib() -> float:
    """The most memory that this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)


def spectrum() -> dict[str, Any]:
    """Relative eigenvalues of atlas's C0, at 64 places evenly from the largest to the smallest."""
    model, tokenizer = ue.load_model("atlas")
    C0 = statistics_for(model, tokenizer, [1]).C0(1).double()
    values = torch.linalg.eigvalsh(C0).flip(0)
    places = torch.linspace(0, len(values) - 1, 64).round().long()
    return {
        "values": [float(f"{float(x / values[0]):.3g}") for x in values[places]],
        "condition": float(f"{float(values[0] / values[-1]):.3g}"),
    }


def stretched(values: list[float], dim: int) -> Tensor:
    """The same spectrum over `dim` eigenvalues: log-linear between the places."""
    logs = torch.tensor(values, dtype=torch.float64).log()
    at = torch.linspace(0, len(logs) - 1, dim, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(logs) - 2)
    return (logs[low] + (at - low) * (logs[low + 1] - logs[low])).exp()


def turned(dim: int, generator: torch.Generator, X: Tensor) -> Tensor:
    """X in a random orthogonal basis: three reflections, which costs no matrix of its own."""
    for _ in range(3):
        v = torch.randn(dim, 1, generator=generator, dtype=torch.float64)
        v /= v.norm()
        X -= 2 * v @ (v.T @ X)
    return X


def problem(values: list[float], dim: int, E: int, seed: int) -> tuple[Tensor, Tensor]:
    """C0 of that spectrum in a random basis, and E keys with this second moment."""
    scale = stretched(values, dim)
    generator = torch.Generator().manual_seed(seed)
    C0 = turned(dim, generator, torch.diag(scale))
    generator = torch.Generator().manual_seed(seed)
    C0 = turned(dim, generator, C0.T.contiguous())
    C0 = (C0 + C0.T) / 2
    generator = torch.Generator().manual_seed(seed)
    draws = torch.Generator().manual_seed(seed + 1)
    K = torch.randn(dim, E, generator=draws, dtype=torch.float64).mul_(scale.sqrt()[:, None])
    return C0, turned(dim, generator, K)


def solved(C0: list[Tensor], K: Tensor, d_out: int, seed: int) -> dict[str, Any]:
    """Metric, solution and check; `C0` is emptied."""
    began = time.perf_counter()
    metric = Metric(C0.pop())
    factored = time.perf_counter()
    generator = torch.Generator().manual_seed(seed + 2)
    R = torch.randn(d_out, K.shape[1], generator=generator, dtype=torch.float64)
    update = solve(metric, K, R)
    done = time.perf_counter()
    error = float((update.delta @ K - R).norm() / R.norm())
    return {
        "E": K.shape[1],
        "condition": float(f"{update.diagnosis.condition:.3g}"),
        "rank": update.diagnosis.rank,
        "equality error": float(f"{error:.1e}"),
        "cost": float(f"{update.diagnosis.preservation_error:.4g}"),
        "seconds of the metric": round(factored - began, 1),
        "seconds of the solution": round(done - factored, 1),
        "peak GiB": peak_gib(),
    }


def xl(values: list[float]) -> list[dict[str, Any]]:
    """GPT-2 XL's width, size by size; the metric is made once."""
    C0, K = problem(values, 6400, max(XL_SIZES), seed=0)
    metric = Metric(C0)
    del C0
    lines = []
    generator = torch.Generator().manual_seed(2)
    R = torch.randn(1600, max(XL_SIZES), generator=generator, dtype=torch.float64)
    for E in XL_SIZES:
        began = time.perf_counter()
        try:
            update = solve(metric, K[:, :E], R[:, :E])
        except ue.InfeasibleError as refused:
            found = ue.objective.feasible(metric, K[:, :E])
            lines.append({"E": E, "condition": float(f"{found.condition:.3g}"),
                          "refused": str(refused)[:120]})  # fmt: skip
            log.info("%s", lines[-1])
            continue
        seconds = time.perf_counter() - began
        error = float((update.delta @ K[:, :E] - R[:, :E]).norm() / R[:, :E].norm())
        lines.append({
            "E": E, "condition": float(f"{update.diagnosis.condition:.3g}"),
            "equality error": float(f"{error:.1e}"),
            "cost a fact": float(f"{update.diagnosis.preservation_error / E:.4g}"),
            "seconds of the solution": round(seconds, 1), "peak GiB": peak_gib(),
        })  # fmt: skip
        log.info("%s", lines[-1])
    return lines


def gptj(values: list[float]) -> dict[str, Any]:
    """GPT-J's width: ten thousand facts in one solution."""
    C0, K = problem(values, 16_384, 10_000, seed=0)
    held = [C0]
    del C0
    return {"d_k": 16_384, "d_out": 4096} | solved(held, K, 4096, seed=0)


def subjects(values: list[float], tokenizer: Path, corpus: Path, records: Path) -> dict[str, Any]:
    """GPT-J's width: real subjects in one solution, read by random weights."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(n_layer=2)).eval()
    reader = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    facts = {one.fact.subject: one.fact for one in reversed(ue.load_records(records))}
    began = time.perf_counter()
    lines = corpus.read_text(encoding="utf-8").splitlines()
    made = ue.KeyStatistics.collect(
        model, reader, [line for line in lines if len(line) > 200], [1], tokens=2 * 16_384
    )
    counted = time.perf_counter()
    [K] = compute_keys(anatomy(model), reader, list(facts.values()), [""], [1], "bare").values()
    read = time.perf_counter()
    about = {
        "d_k": 16_384,
        "d_out": 4096,
        "tokens of C0": made.source.tokens,
        "different keys": len({column.numpy().tobytes() for column in K.T}),
        "seconds of C0": round(counted - began, 1),
        "seconds of the keys": round(read - counted, 1),
    }
    held = [made.C0(1)]
    del model, made
    return about | solved(held, K, 4096, seed=0)


def answer(part: str, values: list[float], files: tuple[Path, ...], queue: Any) -> None:
    """One part, in a process of its own, so that its peak of memory is its own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    if part == "subjects":
        found: Any = subjects(values, *files)
    else:
        found = {"xl": xl, "gptj": gptj}[part](values)
    queue.put({"minutes": round((time.perf_counter() - began) / 60, 1), "found": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path, help="for subjects")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result: dict[str, Any] = {}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result |= {
        "command": f"python benchmarks/full_size.py {' '.join(PARTS)} --tokenizer DIR "
        "--corpus FILE --records counterfact.json --out " + arguments.out.as_posix(),
        "versions": {
            "python": platform.python_version(),
            **{one: version(one) for one in ("unified_edit", "torch")},
        },
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    if "spectrum" in arguments.parts and "spectrum" not in result:
        result["spectrum"] = spectrum()
    context = multiprocessing.get_context("spawn")
    files = tuple(getattr(arguments, name) for name in FILES)
    if "subjects" in arguments.parts and not all(files):
        parser.error("subjects needs --tokenizer, --corpus and --records")
    for part in PARTS[1:]:
        if part in arguments.parts and part not in result:
            queue = context.Queue()
            process = context.Process(
                target=answer, args=(part, result["spectrum"]["values"], files, queue)
            )
            process.start()
            result[part] = queue.get()
            process.join()
            log.info("%s: %s", part, result[part])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(in_lines(result), encoding="utf-8")


if __name__ == "__main__":
    main()
