"""What each command of the command line is told: a function for each, whose docstring is its help.

They are handed a parser of `cli`, and add to it what their command alone takes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from unified_edit.arguments import as_path
from unified_edit.errors import UnifiedEditError

_OTHERS = "EMMET_RELEASED, ROME_RELEASED, r-ROME, p-ROME, PMET, FE-MEMIT, AlphaEdit or ENCORE"


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A type for argparse: whole numbers between two bounds."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{value} is not {limits}")
        return value

    number.__name__ = "whole number"  # what argparse calls it in its message
    return number


def path_of(text: str) -> Path:
    """A type for argparse: paths."""
    try:
        return as_path(text, "the path", UnifiedEditError)
    except UnifiedEditError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


# fmt: off
def ask(made: argparse.ArgumentParser) -> None:
    """Show the most probable next tokens after a prompt.

    examples:
      python -m unified_edit ask "The Eiffel Tower is located in the city of" -k 3
      python -m unified_edit ask --edit rome.safetensors --json --prompt "Rome is in" "Paris is in"
    """
    made.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more prompts")
    made.add_argument("--prompt", nargs="+", action="extend", metavar="PROMPT", help="the same")
    made.add_argument("-k", type=whole(1), default=5, metavar="N",
                      help="how many tokens (default: 5)")
    made.add_argument("--edit", type=path_of, action="append", metavar="FILE",
                      help="apply this saved edit first; may be given several times, in order")


def edit(made: argparse.ArgumentParser) -> None:
    """Write facts into the model and save the edit.

    A file of facts holds one JSON object a line, or a JSON list of them:
      {"prompt": "{} is located in the city of", "subject": "The Eiffel Tower",
       "target_new": "Rome", "target_true": "Paris"}      (on one line; target_true may be left out)

    examples:
      python -m unified_edit edit --facts facts.jsonl --out edit.safetensors
      python -m unified_edit edit --method MEMIT --layers 3 4 --ridge 10 --facts facts.jsonl \\
          --out edit.safetensors --peft adapter/
      python -m unified_edit edit --prompt "{} is located in the city of" \\
          --subject "The Eiffel Tower" --target Rome --out rome.safetensors
    """
    made.add_argument("--method", default="EMMET", metavar="NAME",
                      help=f"ROME, EMMET (the default), MEMIT, {_OTHERS}")
    made.add_argument("--facts", type=path_of, metavar="FILE", help="JSON Lines or a JSON list")
    made.add_argument("--prompt", help="instead of a file: the prompt of one fact, {} for its "
                      "subject")
    made.add_argument("--subject", help="its subject")
    made.add_argument("--target", help="what the model shall say after the prompt")
    made.add_argument("--target-true", metavar="TARGET", help="what it says now (may be left out)")
    made.add_argument("--preserve", type=path_of, metavar="FILE",
                      help="facts whose subjects' values stay as they are, as in --facts")
    made.add_argument("--preserve-prompts", nargs="+", metavar="PROMPT",
                      help="prompts that the model is to read as it does now")
    made.add_argument("--preserve-weight", type=float, metavar="W",
                      help="what changing them costs, beside missing a fact by as much (default: "
                      "they do not change at all)")
    made.add_argument("--out", type=path_of, required=True, metavar="FILE", help="the edit")
    made.add_argument("--peft", type=path_of, metavar="FOLDER",
                      help="write the edit as a LoRA adapter too, to a new or empty folder")
    made.add_argument("--seed", type=whole(0, 2**63 - 1),
                      help="of the sampled prefixes (default: 0)")


def evaluate(made: argparse.ArgumentParser) -> None:
    """Measure what a method or a saved edit does to records.

    With --method each batch of records is edited into the unedited model, measured and undone.
    With --edit the model with these saved edits is measured. With neither, the model alone.

    examples:
      python -m unified_edit evaluate --records atlas --limit 20 --method MEMIT --batch-size 20
      python -m unified_edit evaluate --records records.jsonl --edit edit.safetensors \\
          --out report.json --table table.csv
      python -m unified_edit evaluate --model gpt2-xl --records counterfact --limit 100 --seed 0 \\
          --json
      python -m unified_edit evaluate --model gpt2-xl --records counterfact --method EMMET \\
          --known-only --to answers.jsonl
    """
    made.add_argument("--records", default="atlas", metavar="NAME",
                      help="atlas (the default), counterfact, zsre, or a file of records")
    made.add_argument("--limit", type=whole(1), metavar="N",
                      help="at most N records: the first ones, or with --seed a sample")
    made.add_argument("--seed", type=whole(0, 2**63 - 1),
                      help="of the sample, the prefixes and the intervals (default: 0; the first "
                      "records are taken then)")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--method", metavar="NAME",
                      help=f"edit the records by ROME, EMMET, MEMIT, {_OTHERS}")
    what.add_argument("--edit", type=path_of, action="append", metavar="FILE",
                      help="a saved edit; may be given several times, in order")
    made.add_argument("--batch-size", type=whole(1), metavar="N",
                      help="with --method: records edited together (default: 1)")
    made.add_argument("--known-only", action="store_true",
                      help="leave out records whose true object the model does not prefer before")
    made.add_argument("--to", type=path_of, metavar="FILE",
                      help="write the answers here as they come, as JSON Lines; the same command "
                      "goes on from there")
    made.add_argument("--out", type=path_of, metavar="FILE",
                      help="write the JSON document here too")
    made.add_argument("--table", type=path_of, metavar="FILE",
                      help="write one line a prompt and state here, as CSV")


def share(text: str) -> tuple[int, int]:
    """A type for argparse: I/N, share I (0 is the first) of N."""
    index, _, number = text.partition("/")
    part = int(index), int(number)
    if not 0 <= part[0] < part[1]:
        raise argparse.ArgumentTypeError(f"{text} is not a share: the first of four is 0/4")
    return part


def statistics(made: argparse.ArgumentParser) -> None:
    """Collect C0, the second moment of keys of ordinary text.

    Each text stands alone. In a file, blank lines stand between texts, which may go over several
    lines; in a file without blank lines between others, each line is a text. --split says which it
    is where that rule is wrong. Ten tokens for each entry of a key serve, twenty are the default;
    fewer than two are refused, unless --shrinkage is given. With --part, several machines count a
    share each; --join adds up what they have saved.

    examples:
      python -m unified_edit statistics --layers 0 1 2 --out atlas.safetensors
      python -m unified_edit statistics --model gpt2-xl --layers 17 --texts a.txt b.txt \\
          --tokens 64000 --checkpoint partial.safetensors --out gpt2-xl.safetensors
      python -m unified_edit statistics --model gpt2-xl --layers 17 --part 0/4 --tokens 128000 \\
          --dataset wikimedia/wikipedia --config 20231101.en --out share-0.safetensors
      python -m unified_edit statistics --join share-*.safetensors --out gpt2-xl.safetensors
      python -m unified_edit statistics --layers 0 --texts few.txt --shrinkage 1e-3 \\
          --out few.safetensors
    """
    made.add_argument("--layers", type=whole(0), nargs="+", metavar="N",
                      help="blocks, ascending; all are collected in one pass")
    made.add_argument("--join", type=path_of, nargs="+", metavar="FILE",
                      help="collect nothing: add up these statistics, or put layers together")
    made.add_argument("--texts", type=path_of, nargs="+", metavar="FILE",
                      help="UTF-8 text (default: the model's default corpus; WikiText-103 from "
                      "the Hub for all but atlas)")
    made.add_argument("--split", choices=("paragraphs", "lines"),
                      help="what one text is in these files")
    made.add_argument("--dataset", metavar="NAME",
                      help="the train split of a data set of the Hub, instead of --texts")
    made.add_argument("--config", metavar="NAME", help="which configuration of --dataset")
    made.add_argument("--column", default="text", metavar="NAME",
                      help="where the texts of --dataset stand (default: text)")
    made.add_argument("--part", type=share, default=(0, 1), metavar="I/N",
                      help="count share I (0 is the first) of N of the texts and of --tokens only")
    made.add_argument("--tokens", type=whole(1), metavar="N",
                      help="draw no more texts once N tokens were counted (default: all of "
                      "--texts; twenty for each entry of a key from the Hub)")
    made.add_argument("--shrinkage", type=float, default=0.0, metavar="EPS",
                      help="add EPS * tr(C0)/d_k * I, for few tokens (default: 0)")
    made.add_argument("--skip-start", action="store_true",
                      help="leave the first token of each text out of C0: edits may then move its "
                      "output, which every text holds")
    made.add_argument("--checkpoint", type=path_of, metavar="FILE",
                      help="keep the sums here meanwhile; the same command goes on from there")
    made.add_argument("--out", type=path_of, required=True, metavar="FILE", help="the statistics")


def suggest(made: argparse.ArgumentParser) -> None:
    """Find layers and a clamp for a method, on records that are not to be scored afterwards.

    --layers are those to try, each alone; by default a coarse grid, then what is around the best.

    examples:
      python -m unified_edit suggest --records atlas --layers 0 1 2 --clamps 1.25 --budget 600
      python -m unified_edit suggest --model smollm2 --records own.jsonl --to sweep.jsonl --json
    """
    made.add_argument("--method", default="EMMET", metavar="NAME", help="as of edit")
    made.add_argument("--records", default="atlas", metavar="NAME", help="as of evaluate")
    made.add_argument("--count", type=whole(1), default=8, metavar="N",
                      help="records to use, drawn with --seed (default: 8)")
    made.add_argument("--clamps", type=float, nargs="+", metavar="C",
                      help="to try (default: 0.75 2 4)")
    made.add_argument("--budget", type=float, metavar="S", help="begin nothing after S seconds")
    made.add_argument("--to", type=path_of, metavar="FILE",
                      help="keep each row here; the same command goes on from there")
    made.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="(default: 0)")


# fmt: on
