"""Models from GGUF files: dequantised to plain numbers once, and kept as safetensors.

What is kept is one file for each GGUF file, type of numbers and version of transformers. It is
found by all three and holds them too, to be compared when it is read; it is written whole or not
at all, and one that is damaged is made again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unified_edit.errors import ModelError
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.families import why_not
from unified_edit.model.gguf_header import Header, read_header
from unified_edit.model.loading_report import check_report, said
from unified_edit.model.notices import write_notices
from unified_edit.model.packages import package_with
from unified_edit.model.progress import loading, silent
from unified_edit.model.tensor_files import read_safetensors, write_safetensors

log = logging.getLogger(__name__)

FORMAT = "unified_edit.dequantised/1"
#: Copies above this many bytes are kept on request only.
LARGE = 2_000_000_000
#: What transformers leaves out of a GGUF file: how Llama 3.1 and its like stretch their positions.
_STRETCHED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


@dataclass(frozen=True)
class Dequantised:
    """A model as plain numbers: what a folder has that `save_pretrained` writes.

    weights: {name: tensor}. files: {name: text} of the configuration and the tokenizer. wanted:
    what it was made from, by which it is found. place: its file, if it was read from there.
    """

    weights: Mapping[str, Tensor]
    files: Mapping[str, str]
    wanted: Mapping[str, str]
    place: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(one.numel() * one.element_size() for one in self.weights.values())

    def open(self) -> tuple[PreTrainedModel, Tokenizer]:
        """A model with these very weights, nothing of which is quantised, and its tokenizer."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.files.items():
                (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config))
        with loading():
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=dict(self.weights),
                dtype=getattr(torch, self.wanted["dtype"]),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        check_report(self.wanted["file"], model, report)
        model.config.dequantised_from = origin(self.wanted)
        return model, tokenizer


def origin(wanted: Mapping[str, str]) -> str:
    """What stands in the configuration of a model, and in what is made from it."""
    parts = (wanted["file"], wanted["quantisation"], f"sha256 {wanted['sha256']}")
    more = (wanted["package"] and f"package {wanted['package']}", wanted["licence"])
    return ", ".join([*parts, *(one for one in more if one)])


def dequantised(path: Path, sha256: str, dtype: torch.dtype, folder: Path) -> Dequantised:
    """The model of a GGUF file with this SHA-256, from the copy below `folder` if there is one.

    A copy that was not read but made is not kept before `keep` is called.

    Raises ModelError for a file that cannot be read or is not whole, for a model that is of no
    known family, and where a package that is needed is missing.
    """
    kind = str(dtype).removeprefix("torch.")
    wanted = {"sha256": sha256, "dtype": kind, "transformers": version("transformers")}
    found = _read(_place(folder, wanted), wanted)
    if found is not None:
        return found
    header = read_header(path)
    _check_header(path, header)
    known = package_with(sha256)
    wanted |= {
        "file": known.file_name if known else path.name,
        "quantisation": header.quantisation(),
        "package": known.source if known else "",
        "licence": known.licence if known else str(header.metadata.get("general.license", "")),
        "model": str(header.metadata.get("general.name", "")),
        "author": str(header.metadata.get("general.organization", "")),
    }
    log.info("dequantising %s (%s) to %s", path, wanted["quantisation"], kind)
    return Dequantised(*_converted(path, dtype, header), wanted)


def keep(made: Dequantised, path: Path, folder: Path, cache: bool | None) -> None:
    """Write a copy of a model, with licence and notice beside it, unless it is there already.

    cache: True for a copy of any size, False for none, None for one of at most `LARGE` bytes.
    """
    if made.place is not None or cache is False:
        return
    if cache is None and made.nbytes > LARGE:
        log.warning(
            "the dequantised copy of %s would take %.1f GB and is not kept, so that the next time "
            "it is made again; load_model(..., cache=True) keeps it below %s",
            path, made.nbytes / 1e9, folder,
        )  # fmt: skip
        return
    place = _place(folder, made.wanted)
    description = {**made.wanted, "files": dict(made.files)}
    try:
        write_notices(place.parent, path, made.wanted)
        write_safetensors(place, dict(made.weights), FORMAT, description, ModelError)
    except ModelError as problem:
        log.warning("the model is used, but not kept for the next time: %s", problem)
        return
    log.info("a dequantised copy is kept for the next time: %s (%.0f MB)", place, made.nbytes / 1e6)


def _place(folder: Path, wanted: Mapping[str, str]) -> Path:
    """Where a copy is kept: a folder for each GGUF file, in it one for each type and version."""
    name = f"{wanted['dtype']}-transformers-{wanted['transformers']}.safetensors"
    return folder / "gguf" / wanted["sha256"][:20] / name


def _read(place: Path, wanted: Mapping[str, str]) -> Dequantised | None:
    """The copy at `place`; None if there is none, or, with a warning, if it is of no use."""
    if not place.exists():
        return None
    try:
        weights, found = read_safetensors(place, FORMAT, ModelError)
        files = found.pop("files", None)
        if not isinstance(files, dict) or not wanted.items() <= found.items():
            raise ModelError(f"{place} was made from something else")
    except ModelError as problem:
        log.warning("a dequantised copy is not used, and made again: %s", problem)
        return None
    return Dequantised(weights, files, found, place)


def _check_header(path: Path, header: Header) -> None:
    """Raise ModelError for what can be told from the header alone."""
    missing = [name for name in ("accelerate", "gguf") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"to read the GGUF file {path}, the {' and '.join(missing)} "
            f"package{'s are' if len(missing) > 1 else ' is'} needed: "
            "pip install 'unified_edit[gguf]'"
        )
    header.check_whole(path)
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model; join them first (llama-gguf-split "
            "--merge) and give the whole file"
        )
    words = header.metadata.get("tokenizer.ggml.tokens")
    embeddings = header.tensors.get("token_embd.weight")
    if not isinstance(words, int):
        raise ModelError(f"{path} holds no tokenizer; take a file that was converted with one")
    if embeddings is not None and words > embeddings.shape[0]:
        raise ModelError(
            f"the tokenizer of {path} has {words} tokens, but the model knows only "
            f"{embeddings.shape[0]}: it is the tokenizer of another model. Download the file again"
        )


def _converted(
    path: Path, dtype: torch.dtype, header: Header
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights, and files of configuration and tokenizer, of a GGUF file."""
    arguments: dict[str, Any] = {"gguf_file": str(path.absolute())}
    with tempfile.TemporaryDirectory() as empty, _quietly():  # no other file has a say
        try:
            config = AutoConfig.from_pretrained(empty, **arguments)
            _check_family(path, config.model_type)
            tokenizer = AutoTokenizer.from_pretrained(empty, **arguments)
            if hasattr(transformers, "GgufConfig"):  # else it may leave weights in their blocks
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                empty,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **arguments,
            )
        except ModelError:
            raise
        except Exception as problem:  # whatever its readers raise
            raise ModelError(
                f"{path} could not be loaded: transformers {version('transformers')} does not read "
                f"this GGUF file of architecture {header.architecture!r} ({said(problem)}). Take "
                "the original weights, from a folder or the Hub"
            ) from problem
    model: Any = loaded[0]
    check_report(str(path), model, loaded[1])
    saved = set(model.state_dict(keep_vars=True))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = {name: one.detach() for name, one in tensors if name in saved}
    _check_all_used(path, header, model, len(weights))
    for inert in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(inert, None)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {one.name: one.read_text(encoding="utf-8") for one in Path(folder).iterdir()}
    return weights, files


def _check_family(path: Path, family: str) -> None:
    """Raise ModelError for a family that cannot be edited, before hours go into its weights."""
    if reason := why_not(family):
        raise ModelError(f"{path} holds a model of the family {family!r}, which {reason}")


def _check_all_used(path: Path, header: Header, model: PreTrainedModel, used: int) -> None:
    """Raise ModelError if weights of the file are none of the model's: it is another one then."""
    if len(header.tensors) <= used:
        return
    import gguf

    kinds = [kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == header.architecture]
    if not kinds:
        return
    names = gguf.get_tensor_name_map(kinds[0], model.config.num_hidden_layers)
    ours = {
        f"{names.get_name(stem)}.{end}"
        for stem, _, end in (name.rpartition(".") for name in model.state_dict())
    }
    left = sorted(set(header.tensors) - ours)
    if set(left) - _STRETCHED:
        check_report(str(path), model, {"unexpected_keys": left})
    elif left:
        log.warning(
            "%s stretches positions by %s, which transformers does not read from GGUF: what the "
            "model says differs a little from what the file's own program says, most in long texts",
            path, left[0],
        )  # fmt: skip


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Bars of transformers, one of which it always shows, not where ours are silent."""
    with loading(), contextlib.ExitStack() as stack:
        if silent():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
