"""What a device has room for, and what it can compute: the one place that asks it.

Work is cut into batches of tokens. How many fit is estimated before (`tokens_that_fit`); what does
not fit after all is done in halves (`halving`). Neither changes a result beyond the rounding of
batches that are cut elsewhere.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from unified_edit.errors import ModelError
from unified_edit.model.batching import CPU_BATCH_TOKENS
from unified_edit.model.families import FAMILIES

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Of what is free, so much may be planned for: fragments, workspaces and other processes need room.
SHARE = 0.5
#: What is taken for free where a device does not say.
UNKNOWN_BYTES = 4 * 2**30
#: Tokens from which on a larger batch makes no card faster.
MOST_TOKENS = 32_768

#: Where Linux says what a process may take.
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can be allocated on `device` now; `UNKNOWN_BYTES` where it does not say.

    On a GPU with what torch holds in reserve; on the CPU at most what the job's control group has
    left. Asking makes a GPU's queue wait: once for a run, not once for a step.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "cpu":
        known = [one for one in (_available(), *_left_in_groups()) if one is not None]
        return max(0, min(known)) if known else UNKNOWN_BYTES
    return UNKNOWN_BYTES


def tokens_that_fit(
    model: PreTrainedModel,
    device: torch.device | str | None = None,
    *,
    gradients: bool = False,
    cached: bool = False,
    longest: int = 256,
    most: int | None = None,
) -> int:
    """Tokens, with padding, of one batch through the body of `model`: at least 1.

    By what is free on `device` (the model's own by default) and what a token needs at its peak: in
    one block without gradients, in all of them with (`token_bytes`). The head is not counted; who
    makes logits makes few at a time.

    cached: keys and values of attention are kept, twice: those that others begin from, and a copy.
    longest: tokens of the longest row. most: an upper bound; by default `MOST_TOKENS`, and without
    gradients on a CPU `CPU_BATCH_TOKENS`.
    """
    where = torch.device(model.device if device is None else device)
    if most is None:
        most = CPU_BATCH_TOKENS if where.type == "cpu" and not gradients else MOST_TOKENS
    each = token_bytes(model, gradients=gradients, cached=cached, longest=longest)
    return max(1, min(most, int(SHARE * free_bytes(where)) // each))


def token_bytes(
    model: PreTrainedModel, *, gradients: bool = False, cached: bool = False, longest: int = 256
) -> int:
    """Bytes that one token of a batch takes at the peak of a forward, from the model's shape.

    A block holds about 12 vectors of the states' width (with those that norms make in float32) and
    4 of the keys' length, and its attention, where that is written out, two scores for each token
    of the row and head. Without gradients they are there for one block at a time; keys and values
    that are `cached` (twice, and counted as for a head each) for all.
    """
    family, config = FAMILIES[model.config.model_type], model.config
    blocks = model.get_submodule(family.blocks)
    down = blocks[0].get_submodule(family.down).weight  # type: ignore[index]
    short, long = sorted(down.shape)
    plain = down.element_size() * (12 * short + 4 * long)
    fused = getattr(config, "_attn_implementation", None) in ("sdpa", "flash_attention_2")
    scores = 0 if fused else 8 * longest * config.num_attention_heads
    kept = len(blocks) * 4 * short * down.element_size() if cached else 0  # type: ignore[arg-type]
    return int(plain + scores) * (len(blocks) if gradients else 1) + int(kept)  # type: ignore[arg-type]


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether `problem` says that a device, or the machine, has no room left."""
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(problem).lower()
    return isinstance(problem, RuntimeError) and (
        "out of memory" in said
        or "can't allocate memory" in said
        or "cublas_status_alloc_failed" in said
    )


def halving(
    run: Callable[[Sequence[Item]], Result], batches: Iterable[Sequence[Item]]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Yield each batch and what `run` gives for it; in parts where memory is short.

    A batch that does not fit is cut in two, and so are all after it: what did not fit once is not
    tried again. `run` must keep nothing of a batch at which it fails.

    Raises ModelError for a single item that does not fit, and whatever else `run` raises.
    """
    parts = 1
    for batch in batches:
        start = 0
        while start < len(batch):
            size = max(1, -(-len(batch) // parts))
            part, made = batch[start : start + size], list[Result]()
            try:
                made.append(run(part))
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                if size == 1:
                    raise ModelError(
                        f"there is no memory left even for one at a time ({problem}). Free some, "
                        "give shorter texts, load the model in a shorter type (dtype='bfloat16'), "
                        "or take a larger device"
                    ) from problem
            if made:
                yield part, made.pop()  # so that it goes when the caller lets go of it
                start += size
                continue
            # only out here does the failed call's traceback hold its tensors no more
            free_cached()
            parts *= 2
            log.warning("out of memory with %d at a time; going on with halves", size)


def free_cached() -> None:
    """Give back what torch holds in reserve on GPUs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _available() -> int | None:
    """Bytes that this machine can give without swapping."""
    try:
        for line in (PROC / "meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    try:  # elsewhere: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_groups() -> Iterator[int]:
    """Bytes that the control groups of this process leave it: a container's limit, or a job's."""
    try:
        groups = (PROC / "self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, kinds, path = group.split(":", 2)
        if kinds == "":  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # the limit may be that of a group above; inside of a container its own is the root
        own = root / path.lstrip("/")
        for folder in (own, *(one for one in own.parents if one.is_relative_to(root))):
            try:
                most, taken = (int((folder / name).read_text("ascii")) for name in names)
                stat = (folder / "memory.stat").read_text("ascii").splitlines()
            except (OSError, ValueError):  # none there, or its limit is the word "max"
                continue
            sizes = dict(line.split() for line in stat)
            # pages of files count as taken, and are given back when memory is asked for
            files = sizes.get("total_inactive_file") or sizes.get("inactive_file") or 0
            yield most - taken + int(files)
