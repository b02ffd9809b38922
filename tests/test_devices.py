"""What a device has room for, halves where memory is short, float64 where there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unified_edit.errors import ModelError
from unified_edit.model import devices
from unified_edit.model.batching import CPU_BATCH_TOKENS
from unified_edit.model.devices import (
    free_bytes,
    halving,
    is_out_of_memory,
    token_bytes,
    tokens_that_fit,
)

OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.0 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 2 GiB"),
]


# --- what is free ----------------------------------------------------------------------------


def machine(folder: Path, monkeypatch, groups: str, files: dict[str, str]) -> None:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(devices, "PROC", folder / "proc")
    monkeypatch.setattr(devices, "CGROUPS", folder / "cgroup")


def group(most: str, taken: int, files: int, *, first: bool = False) -> dict[str, str]:
    """The files of a control group, in their first or second version."""
    if first:
        return {
            "memory.limit_in_bytes": most,
            "memory.usage_in_bytes": str(taken),
            "memory.stat": f"inactive_file 1\ntotal_inactive_file {files}\n",
        }
    return {
        "memory.max": most,
        "memory.current": str(taken),
        "memory.stat": f"anon 5\ninactive_file {files}\n",
    }


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   4000 kB\n"}


@pytest.mark.parametrize(
    ("groups", "folder", "files", "left"),
    [
        ("0::/\n", "cgroup", group("max\n", 100, 0), 4_096_000),
        ("0::/\n", "cgroup", group("2000000\n", 500_000, 100_000), 1_600_000),
        ("0::/job_7\n", "cgroup/job_7", group("1000000", 900_000, 0), 100_000),
        ("0::/job_7/step_0/task_0\n", "cgroup/job_7", group("1000000", 900_000, 0), 100_000),
        ("3:cpu:/\n2:memory:/a/b\n", "cgroup/memory", group("9000", 2000, 10, first=True), 7010),
        ("0::/\n", "cgroup", group("1000", 2000, 0), 0),
    ],
)
def test_a_job_has_what_its_group_leaves_it(
    tmp_path, monkeypatch, groups, folder, files, left
) -> None:
    own = {f"{folder}/{name}": text for name, text in files.items()}
    machine(tmp_path, monkeypatch, groups, {**MEMINFO, **own})
    assert free_bytes("cpu") == left


def test_where_nothing_is_said_something_is_assumed(tmp_path, monkeypatch) -> None:
    machine(tmp_path, monkeypatch, "", {})

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(devices.os, "sysconf", unknown, raising=False)
    assert free_bytes("cpu") == devices.UNKNOWN_BYTES == free_bytes("xpu")


def test_a_card_has_what_is_free_and_what_torch_holds_in_reserve(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_bytes("cuda:1") == 1400


# --- what fits -------------------------------------------------------------------------------


def test_tokens_come_from_what_is_free(tiny, monkeypatch) -> None:
    one = token_bytes(tiny)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 200 * one)
    assert tokens_that_fit(tiny) == 100
    assert tokens_that_fit(tiny, gradients=True) == 100 // len(tiny.transformer.h)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 0)
    assert tokens_that_fit(tiny) == 1
    monkeypatch.setattr(devices, "free_bytes", lambda device: 2**50)
    assert tokens_that_fit(tiny) == CPU_BATCH_TOKENS
    assert tokens_that_fit(tiny, "cuda") == devices.MOST_TOKENS
    assert tokens_that_fit(tiny, "cuda", most=77) == 77


def test_written_out_attention_needs_more_for_longer_rows(make_gpt2) -> None:
    model = make_gpt2()
    model.set_attn_implementation("eager")
    assert token_bytes(model, longest=512) > token_bytes(model, longest=8)
    model.set_attn_implementation("sdpa")
    assert token_bytes(model, longest=512) == token_bytes(model, longest=8)


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("problem", OUT, ids=lambda one: type(one).__name__)
def test_what_does_not_fit_is_done_in_halves(problem, caplog) -> None:
    sizes = []

    def run(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise problem
        return [2 * one for one in part]

    batches = [list(range(10)), list(range(10, 17)), [17]]
    with caplog.at_level(logging.WARNING):
        found = list(halving(run, batches))
    assert [one for part, _ in found for one in part] == list(range(18))
    assert [one for _, result in found for one in result] == list(range(0, 36, 2))
    # ten, five, then threes, and a quarter of what comes after: what did not fit is not tried again
    assert sizes == [10, 5, 3, 3, 3, 1, 2, 2, 2, 1, 1]
    assert len(caplog.records) == 2 and "out of memory" in caplog.text


def test_a_single_text_that_does_not_fit_is_an_error() -> None:
    def run(part):
        raise OUT[0]

    with pytest.raises(ModelError, match="even for one at a time"):
        list(halving(run, [[1, 2, 3]]))


@pytest.mark.parametrize("problem", [RuntimeError("shapes do not match"), ValueError("no")])
def test_any_other_error_is_left_alone(problem) -> None:
    calls = []

    def run(part):
        calls.append(part)
        raise problem

    with pytest.raises(type(problem), match=str(problem)):
        list(halving(run, [[1, 2]]))
    assert len(calls) == 1 and not is_out_of_memory(problem)


def test_a_failed_batch_is_let_go_of_before_it_is_tried_again(monkeypatch) -> None:
    """What it had made lives as long as its traceback, and would be in the way."""
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []
    alive = []
    monkeypatch.setattr(devices, "free_cached", lambda: alive.append(made[-1]() is not None))

    def run(part):
        big = torch.zeros(10)
        made.append(weakref.ref(big))
        if len(part) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return len(part)

    assert [result for _, result in halving(run, [[1, 2, 3, 4]])] == [1, 1, 1, 1]
    assert alive == [False, False]


def test_a_result_goes_when_it_is_let_go_of() -> None:
    """The next batch may need its room."""
    import weakref

    for _, made in halving(lambda part: torch.zeros(len(part)), [[1, 2]]):
        seen = weakref.ref(made)
        del made
        assert seen() is None


def test_apple_says_what_it_has_left(monkeypatch) -> None:
    own = SimpleNamespace(recommended_max_memory=lambda: 900, current_allocated_memory=lambda: 250)
    monkeypatch.setattr(torch, "mps", own)
    assert free_bytes("mps") == 650
