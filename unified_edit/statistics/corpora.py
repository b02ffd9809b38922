"""The text that key statistics are collected from: a model's own, files, and data sets of the Hub.

All give texts one by one, so that nothing is read, or downloaded, that is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby, islice
from pathlib import Path

from transformers import PreTrainedModel

from unified_edit.arguments import as_path
from unified_edit.atlas.corpus import texts
from unified_edit.atlas.knowledge import load_knowledge
from unified_edit.errors import StatisticsError, StatisticsFileError, brief
from unified_edit.model.anatomy import Anatomy, anatomy

#: Texts of WikiText and Wikipedia with fewer characters are headings and stubs, and no prose.
PROSE = 201
#: Tokens of a corpus for each entry of a key. Ten are enough for edits (arXiv 2506.04226); with
#: twenty, the two halves of the text agree as well as `convergence` asks.
TOKENS_PER_DIMENSION = 20


def wikitext_extract() -> list[str]:
    """188 paragraphs of WikiText-2's validation part, which come with the library (CC BY-SA 3.0).

    About 32,000 tokens: enough for keys of up to 1,500 entries, and for trying things without a
    network. `unified_edit/data/SOURCES.md` names the articles.
    """
    text = (files("unified_edit") / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    return text.splitlines()


#: Name of a model whose weights are always the same -> the texts that are its own.
_OWN: dict[str, Callable[[], Iterable[str]]] = {
    "atlas": lambda: texts(load_knowledge(), 4000),
    "smollm2": wikitext_extract,
}


def default_corpus(model: PreTrainedModel) -> Iterator[str]:
    """Texts of the kind the model was made for: atlas's own, WikiText-103 for all others.

    For "smollm2", whose weights are always the same, the text is always the same too, and there
    without a network: `wikitext_extract`.

    Raises StatisticsError where WikiText cannot be loaded from the Hugging Face Hub.
    """
    if (own := _OWN.get(str(model.config._name_or_path))) is not None:
        yield from own()
        return
    try:
        lines = dataset_texts("Salesforce/wikitext", "wikitext-103-raw-v1", shortest=PROSE)
        yield from (line.strip() for line in lines)
    except StatisticsError as problem:
        raise StatisticsError(
            "there are no key statistics for this model in the cache, and the default corpus "
            f"(WikiText-103 from the Hugging Face Hub) could not be loaded: {problem}. Install "
            "'unified_edit[hub]' and connect once, or collect them from your own texts: "
            "stats = KeyStatistics.collect(model, tokenizer, texts, layers=[...]) and "
            "edit(..., statistics=stats)"
        ) from problem


def enough_tokens(parts: Anatomy, layers: Sequence[int]) -> int:
    """How many tokens of a corpus C0 of these layers is collected from."""
    widths = [parts.weight(layer).d_in for layer in parts.check_layers(layers)]
    return TOKENS_PER_DIMENSION * max(widths)


def chosen_texts(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    files: Sequence[Path] = (),
    split: str | None = None,
    dataset: str | None = None,
    config: str | None = None,
    column: str = "text",
    tokens: int | None = None,
) -> tuple[Iterator[str], int | None]:
    """The texts that C0 of these layers is to be collected from, and how many tokens of them.

    One's own `files` (None: all of their tokens), else a `dataset` of the Hub, else the model's
    default corpus (`enough_tokens`). Raises StatisticsError for a data set besides files, and for
    `split` and `config` without what they are of; and what the texts themselves raise.
    """
    check_choice(files, split, dataset, config)
    if files:
        return file_texts(files, split), tokens
    enough = tokens or enough_tokens(anatomy(model), layers)
    if dataset is not None:
        return dataset_texts(dataset, config, column=column), enough
    return default_corpus(model), enough


def check_choice(
    files: Sequence[object], split: str | None, dataset: str | None, config: str | None
) -> None:
    """Raise StatisticsError unless these go together; see `chosen_texts`."""
    if files and dataset is not None:
        raise StatisticsError("texts are files, and dataset is of the Hub; give one of the two")
    if split is not None and not files:
        raise StatisticsError(f"split={split!r} is of use with files of texts only")
    if config is not None and dataset is None:
        raise StatisticsError(f"the configuration {config!r} is of use with a dataset only")


def wikipedia(language: str = "en", date: str = "20231101") -> Iterator[str]:
    """The articles of Wikipedia as of `date`, from the Hub, in the order of its files.

    What the released statistics of ROME and MEMIT were made from was the English one of 20200501,
    by a script that `datasets` does not run any more; this is its form as Parquet files. Raises
    what `dataset_texts` does.
    """
    yield from dataset_texts("wikimedia/wikipedia", f"{date}.{language}", shortest=PROSE)


def dataset_texts(
    name: str,
    config: str | None = None,
    *,
    split: str = "train",
    column: str = "text",
    shortest: int = 1,
    streaming: bool = True,
) -> Iterator[str]:
    """One column of a data set of the Hugging Face Hub, or of a local folder or script's name.

    shortest: texts with fewer characters are left out. streaming: records are loaded as they are
    read; otherwise all of the split is downloaded first.

    Raises StatisticsError, with the number of the record, for one that lacks the column or holds
    something that is no string there, and where the data set cannot be loaded.
    """
    place = f"{name} ({', '.join(filter(None, (config, split)))})"
    number = 0
    try:
        from datasets import load_dataset

        records = load_dataset(name, config, split=split, streaming=streaming)
        for number, record in enumerate(records):
            if len(text := _text_of(record, column, f"record {number} of {place}")) >= shortest:
                yield text
    except StatisticsError:
        raise
    except Exception as problem:  # datasets, network and Hub raise many kinds
        where = f"after record {number} of" if number else "from"
        raise StatisticsError(
            f"no more texts can be had {where} {place}: {type(problem).__name__}: {problem}"
        ) from problem


def _text_of(record: object, column: str, where: str) -> str:
    if not isinstance(record, Mapping):
        raise StatisticsError(f"{where} is {brief(record)}, not a record with named columns")
    if column not in record:
        raise StatisticsError(
            f"{where} has no column {column!r}, only {sorted(map(str, record))}; name the one that "
            "holds the texts: column=..."
        )
    if not isinstance(text := record[column], str):
        raise StatisticsError(
            f"{where} holds {brief(text)} in column {column!r}, which is not a text; leave such "
            "records out, or name another column"
        )
    return text


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; StatisticsFileError if it cannot be read."""
    number = 0
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        raise StatisticsFileError(
            f"{path}, line {number}: not UTF-8 (byte {problem.start + 1} of the line). "
            "Save the file as UTF-8"
        ) from problem
    except OSError as problem:
        raise StatisticsFileError(
            f"{path}: cannot be read ({problem.strerror}); give text files"
        ) from problem


def check_texts(paths: Sequence[Path]) -> None:
    """Raise StatisticsFileError for a file that cannot be opened, before any work."""
    for path in paths:
        next(_lines(path), None)


def _paragraphs(path: Path) -> Iterator[Iterable[str]]:
    """The lines between blank ones."""
    for filled, lines in groupby(_lines(path), key=lambda line: bool(line.strip())):
        if filled:
            yield lines


def file_texts(paths: str | Path | Sequence[str | Path], split: str | None = None) -> Iterator[str]:
    """The texts of UTF-8 files, in order, one file after another.

    split: "paragraphs": blank lines stand between texts; "lines": each line is a text; None: by
    lines for a file in which no blank line stands between others, else by paragraphs. Empty texts
    are left out. Raises StatisticsFileError with file and line for what is not UTF-8, and
    StatisticsError for another `split`.
    """
    if split not in (None, "lines", "paragraphs"):
        raise StatisticsError(f"split is {brief(split)}; choose 'lines', 'paragraphs' or None")
    several = [paths] if isinstance(paths, (str, Path)) else paths
    for path in [as_path(one, "a file of texts", StatisticsFileError) for one in several]:
        single = split is None and len(list(islice(_paragraphs(path), 2))) < 2
        for lines in _paragraphs(path):
            if single or split == "lines":
                yield from lines
            else:
                yield "\n".join(lines)
