"""How long an edit of concepts takes at the shapes of Stable Diffusion 1.4, with random weights.

    python benchmarks/concepts.py --out book/data/concepts.json
    python benchmarks/concepts.py --theirs uce_sd_erase.py   # of the authors, beside it

The UNet is of the real class and size; of its 860 M numbers only the 32 matrices that read text
are random, the others zero. Ten concepts are erased and a hundred preserved. The keys are random
too, as long as CLIP's: what encoding takes depends on the encoder alone and is not counted. The
last row is a whole edit in a pipeline with an encoder of two layers: checks, keys (`encoding`),
hashes, the ledger; `peak_memory` in GiB, beside the pipeline. The clock is the processor's.
`--theirs` is the file trainscripts/uce_sd_erase.py of rohitgandikota/unified-concept-editing; its
function is given the same keys.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rows import cpu_seconds, interleaved, row, write

from unified_edit.concepts import (
    concept_keys,
    cross_attention,
    edit_concepts,
    preserved_metric,
    solve_concepts,
)
from unified_edit.model import model_fingerprint
from unified_edit.objective import matmul
from unified_edit.teaching.tiny_pictures import tiny_pipeline

ERASED, PRESERVED, D_TEXT, LENGTH = 10, 100, 768, 28.0


def sd_1_unet() -> Any:
    """A UNet of Stable Diffusion 1.4, whose matrices that read text are random."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=D_TEXT, attention_head_dim=8
        )
    unet = unet.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.zero_()
    for weight in cross_attention(unet).values():
        weight.parameter.normal_(0.0, D_TEXT**-0.5, generator=generator)
    return unet


def load_theirs(path: Path) -> Any:
    """The authors' function, with the globals that their command line sets."""
    spec = importlib.util.spec_from_file_location("theirs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.device, module.torch_dtype = "cpu", torch.float32  # type: ignore[attr-defined]
    return module.UCE  # type: ignore[attr-defined]


def stand_in(unet: Any, keys: dict[str, torch.Tensor]) -> Any:
    """What their function asks of a pipeline: three tokens a text, its key at the middle one."""

    class Tokenizer:
        model_max_length = 3

        def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
            return {"attention_mask": torch.ones(1, 3, dtype=torch.long)}

    def encode_prompt(prompt: str, **_: Any) -> tuple[torch.Tensor]:
        return (keys[prompt].float().expand(1, 3, D_TEXT),)

    return SimpleNamespace(unet=unet, tokenizer=Tokenizer(), encode_prompt=encode_prompt)


def whole_edit(unet: Any) -> dict[str, Any]:
    """A row: an edit of a pipeline, its UNet known already, and the memory that it takes more."""
    pipeline = tiny_pipeline(width=D_TEXT)
    pipeline.unet = unet
    erased = [f"style {number}" for number in range(ERASED)]
    kept = [f"artist {number}" for number in range(PRESERVED)]
    taken = []
    for number in range(3):
        found, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, cpu_seconds()
        edit = edit_concepts(pipeline, erased, guide="art", preserve=kept)
        taken.append(cpu_seconds() - before)
        if not number:
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - found) / 2**20
        edit.undo()
    before = cpu_seconds()
    concept_keys(pipeline, [*erased, "art", *kept])
    encoding = cpu_seconds() - before
    return row("a whole edit", taken[1:], first=taken[0], encoding=encoding, peak_memory=more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("book/data/concepts.json"))
    parser.add_argument("--theirs", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    unet = sd_1_unet()
    whole = whole_edit(unet)  # first: a process's highest memory is never less again
    matrices = cross_attention(unet)
    generator = torch.Generator().manual_seed(1)
    count = ERASED + 1 + PRESERVED
    keys = torch.randn(D_TEXT, count, generator=generator, dtype=torch.float64)
    keys = (LENGTH * keys / keys.norm(dim=0)).float().double()
    C, g, P = keys.split([ERASED, 1, PRESERVED], dim=1)
    names = [f"concept {number}" for number in range(count)]

    def solved() -> Any:
        return solve_concepts(preserved_metric(P), C, g - C)

    def ours() -> dict[str, torch.Tensor]:
        D = solved()
        return {
            name: (
                weight.parameter.double() + matmul(matmul(weight.parameter, D.left), D.right)
            ).float()
            for name, weight in matrices.items()
        }

    jobs: dict[str, Any] = {"solve": solved, "weights": ours}
    folder = Path(tempfile.mkdtemp())
    if given.theirs:
        uce, pipeline = (
            load_theirs(given.theirs),
            stand_in(unet, dict(zip(names, keys.mT, strict=True))),
        )

        def theirs() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                uce(
                    pipeline, names[:ERASED], [names[ERASED]] * ERASED, names[ERASED + 1 :],
                    1, 1, 0.5, str(folder), "theirs",
                )  # fmt: skip

        jobs["theirs"] = theirs
    taken = interleaved(jobs, given.rounds, cpu_seconds)
    before = cpu_seconds()
    model_fingerprint(unet)
    once = cpu_seconds() - before
    size = {"matrices": len(matrices), "erased": ERASED, "preserved": PRESERVED, "d_text": D_TEXT}
    entries = sum(weight.parameter.numel() for weight in matrices.values())
    rows = [
        row("one map for 32 matrices", taken["solve"], **size),
        row(
            "their new weights", taken["weights"], taken.get("theirs", ()), entries=entries, **size
        ),
        row("the fingerprint of the UNet, once", [once]),
        whole,
    ]
    if given.theirs:
        from safetensors.torch import load_file

        found = load_file(folder / "theirs.safetensors")
        apart = max(
            float((mine - found[name]).norm() / (mine - matrices[name].parameter).norm())
            for name, mine in ours().items()
        )
        rows[1]["furthest from theirs, of the change"] = float(f"{apart:.1e}")
    write(given.out, rows, clock="processor")


if __name__ == "__main__":
    main()
