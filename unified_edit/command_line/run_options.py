"""What the commands about runs are told; as `options`, whose docstrings are the help too."""

from __future__ import annotations

import argparse

from unified_edit.command_line.options import _OTHERS, path_of, whole


# fmt: off
def run(made: argparse.ArgumentParser) -> None:
    """Edit many facts, by any number of processes that share a folder.

    The work is cut into pieces: values a few facts at a time, key statistics by share of the text.
    Each process computes pieces that are missing, and the one that finds all of them there solves
    and writes FOLDER/edit.safetensors. Start as many as you like, with torchrun, accelerate launch,
    a job array or by hand. Whatever ends them: start again, with any number. A folder that was
    begun goes on by itself, so that only its name has to be given.

    examples:
      python -m unified_edit run FOLDER --facts facts.jsonl
      python -m unified_edit run FOLDER --model gpt2-xl --records counterfact --limit 1000 \\
          --method MEMIT --device cuda
      python -m unified_edit run FOLDER
      python -m unified_edit run FOLDER --gather
    """
    made.add_argument("folder", type=path_of, metavar="FOLDER", help="a new one, or one to go on "
                      "with")
    group = made.add_argument_group("what is edited")
    group.add_argument("--facts", type=path_of, metavar="FILE", help="as of edit")
    group.add_argument("--records", metavar="NAME", help="as of evaluate: edit the facts of these "
                       "records, or --facts, and judge the edit by them")
    group.add_argument("--limit", type=whole(1), metavar="N",
                       help="at most N records: the first ones, or with --sample a sample")
    group.add_argument("--sample", type=whole(0, 2**63 - 1), metavar="SEED",
                       help="draw the records of --limit with this seed")
    group.add_argument("--method", metavar="NAME",
                       help=f"EMMET (the default), MEMIT, {_OTHERS}: one that writes all facts "
                       "together")
    group.add_argument("--seed", type=whole(0, 2**63 - 1),
                       help="of the sampled prefixes (default: 0)")
    group = made.add_argument_group("key statistics, where --statistics is not given")
    group.add_argument("--texts", type=path_of, nargs="+", metavar="FILE", help="as of statistics")
    group.add_argument("--split", choices=("paragraphs", "lines"), help="as of statistics")
    group.add_argument("--dataset", metavar="NAME", help="as of statistics")
    group.add_argument("--config", dest="dataset_config", metavar="NAME", help="as of statistics")
    group.add_argument("--column", metavar="NAME", help="as of statistics")
    group.add_argument("--tokens", type=whole(1), metavar="N", help="as of statistics")
    group.add_argument("--shrinkage", type=float, metavar="EPS", help="as of statistics")
    group.add_argument("--shares", type=whole(1), metavar="N",
                       help="count the text in N shares, each a file (default: 8)")
    group = made.add_argument_group("pieces")
    group.add_argument("--piece", type=whole(1), metavar="N",
                       help="facts of a piece: what a kill costs at most (default: 16)")
    last = group.add_mutually_exclusive_group()
    last.add_argument("--gather", action="store_true",
                      help="all pieces are there: solve and write the edit, nothing else")
    last.add_argument("--pieces-only", action="store_true",
                      help="compute pieces and leave the last step to a later --gather")
    group.add_argument("--accept-changes", action="store_true",
                       help="go on though settings, model or versions are not those that the "
                       "folder was begun with; pieces that do not fit are computed anew")


def status(made: argparse.ArgumentParser) -> None:
    """Show where a run stands: what is done and missing, who works on it, how long it will take.

    Only the folder is read; no model is opened.

    examples:
      python -m unified_edit status FOLDER
      python -m unified_edit status FOLDER --json
    """
    made.add_argument("folder", type=path_of, metavar="FOLDER", help="of run")


# fmt: on
