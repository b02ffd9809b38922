"""What the commands about sweeps are told; as `options`, whose docstrings are the help too."""

from __future__ import annotations

import argparse
import math

from unified_edit.command_line.options import _OTHERS, path_of, whole


def ridge_of(text: str) -> float | None:
    """A type for argparse: a number from 0, or "own"."""
    if text == "own":
        return None
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is neither a finite number from 0 nor 'own'")
    return value


ridge_of.__name__ = "lambda"  # what argparse calls it in its message


# fmt: off
def sweep(made: argparse.ArgumentParser) -> None:
    """Evaluate a grid of methods, batch sizes, lambdas, layers, histories and seeds, a cell once.

    Every cell is what evaluate does with --method: batches of records are edited into the unedited
    model, measured and undone. With --histories they follow each other into one model instead, and
    all facts are asked about after the last. Cells are kept in the folder --to as they come: killed
    and called again, with the same or another grid, it goes on. Each says what it was made from
    (model, records, method, version), and is refused where that is something else now.

    A grid in a file is a JSON object, or a list of them whose cells are run together; only methods
    are needed, and null is the method's own:
      {"methods": ["ROME", {"method": "MEMIT", "name": "MEMIT at 17", "layers": [17]}],
       "batch_sizes": [1, 10], "ridges": [null, 1], "layers": [null, [3, 4]], "seeds": [0],
       "histories": ["base", "blind"]}

    examples:
      python -m unified_edit sweep --methods EMMET MEMIT --batch-sizes 1 10 100 --to atlas_sizes
      python -m unified_edit sweep --ridges 0 0.1 1 10 --limit 20 --batch-sizes 20 --processes 2 \\
          --to atlas_ridges
      python -m unified_edit sweep --model gpt2-xl --records counterfact --limit 1000 \\
          --grid grid.json --statistics xl.safetensors --to xl --dry-run
      python -m unified_edit sweep --methods MEMIT --layers 0 --layers 1 --layers 0 1 --to layers
      python -m unified_edit sweep --methods MEMIT --batch-sizes 5 20 --histories blind soft hard \\
          --limit 100 --to atlas_histories
    """
    group = made.add_argument_group("the grid")
    group.add_argument("--methods", nargs="+", metavar="NAME",
                       help=f"EMMET (the default), ROME, MEMIT, {_OTHERS}")
    group.add_argument("--batch-sizes", type=whole(1), nargs="+", metavar="N",
                       help="records edited together (default: 1)")
    group.add_argument("--ridges", type=ridge_of, nargs="+", metavar="LAM",
                       help="lambda of the least-squares form, per mean C0; 0: equality; own: the "
                       "method's (the default)")
    group.add_argument("--layers", type=whole(0), nargs="+", action="append", metavar="N",
                       help="blocks that are edited together, ascending; once for each group to "
                       "try (default: the method's own for this model)")
    group.add_argument("--seeds", type=whole(0, 2**63 - 1), nargs="+", metavar="N",
                       help="of the prefixes and the intervals (default: 0)")
    group.add_argument("--histories", nargs="+", choices=("base", "blind", "soft", "hard"),
                       metavar="NAME",
                       help="what becomes of batches: base, edited into the unedited model and "
                       "undone (the default); or one after another, blind, or with a soft or hard "
                       "history")
    group.add_argument("--grid", type=path_of, metavar="FILE",
                       help="all of this from a JSON file instead")
    made.add_argument("--records", default="atlas", metavar="NAME", help="as of evaluate")
    made.add_argument("--limit", type=whole(1), metavar="N",
                      help="at most N records: the first ones, or with --sample a sample")
    made.add_argument("--sample", type=whole(0, 2**63 - 1), metavar="SEED",
                      help="draw the records of --limit with this seed")
    made.add_argument("--known-only", action="store_true",
                      help="leave out records whose true object the model does not prefer before")
    made.add_argument("--fluency", action="store_true",
                      help="have texts written too, and measure the score GE: a hundred tokens for "
                      "each generation prompt")
    made.add_argument("--to", type=path_of, required=True, metavar="FOLDER",
                      help="the cells, and at the end table.csv and table.json")
    made.add_argument("--processes", type=whole(1), default=1, metavar="N",
                      help="processes at work, each with a model of its own (default: 1)")
    made.add_argument("--threads", type=whole(1), metavar="N",
                      help="threads of each (default: those of the machine, shared out)")
    made.add_argument("--dry-run", action="store_true",
                      help="list the cells and where they stand; nothing is loaded or written")


def figures(made: argparse.ArgumentParser) -> None:
    """Draw what a sweep has found.

    Scores against the batch size, where it has several; scores against lambda and the frontier
    (what is missed of the new facts against what preserving the old ones costs), where it has
    several of those. A line is a method, whiskers are 95 % intervals.

    examples:
      python -m unified_edit figures atlas_sizes --to pictures
      python -m unified_edit figures atlas_ridges --to pictures --format png --scores ES NS
    """
    made.add_argument("folder", type=path_of, metavar="FOLDER", help="what sweep wrote --to")
    made.add_argument("--to", type=path_of, required=True, metavar="DIR", help="for the pictures")
    made.add_argument("--format", choices=("svg", "png", "pdf"), default="svg",
                      help="of the pictures (default: svg)")
    made.add_argument("--scores", nargs="+", choices=("ES", "PS", "NS", "S", "GS", "GE"),
                      default=("ES", "PS", "NS", "S"), metavar="NAME",
                      help="scores that are drawn (default: ES PS NS S)")


# fmt: on
