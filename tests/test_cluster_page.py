"""The page *On a cluster*: what it shows is a program, what it computes is right."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from book_source import BOOK, page

from unified_edit.command_line import cli

PAGE = page(BOOK / "cluster.md")
BLOCKS = [block for cell in PAGE.text for block in cell.blocks if block.argument == "bash"]


def commands(block):
    """The words of each command of the program in a block of a shell."""
    for line in block.body.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:unified-edit|-m unified_edit) (.*)", line)
        if found and not line.startswith("#"):
            yield shlex.split(found[1])


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.body[:20].strip())
def test_what_the_page_shows_is_a_program(block):
    checked = subprocess.run(["bash", "-n"], input=block.body, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    told = [cli.build_parser().parse_args(words) for words in commands(block)]
    assert [one.command for one in told] in (["run"], ["status"])


def test_every_way_to_start_is_shown():
    text = "\n".join(block.body for block in BLOCKS)
    for way in ("torchrun", "accelerate launch", "#SBATCH --array", "srun", "--gather"):
        assert way in text


def test_the_table_of_scaling_is_what_its_formula_gives():
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.text[0].source, re.M)
    assert len(table) == 4
    values, tokens = 7.4, 44e6
    for processes, *hours in table:
        for text, told in zip((tokens, 163_840), hours, strict=True):
            found = (36 * text / tokens + values) / int(processes) + 0.1
            assert abs(found - float(told)) <= 0.05 + 1e-9
    d, width, facts = 16_384, 4_096, 10_000
    one = d**2 * facts + d * facts**2 + width * facts * (facts / 2 + d)
    assert 6 * one == pytest.approx(3e13, rel=0.1)
    assert values * 3600 / facts == pytest.approx(2.7, abs=0.05)
    assert 36 * 60 * 163_840 / tokens == pytest.approx(8, abs=0.5)
    told = r"(\d+) KiB a fact, (\d+) MiB for ten thousand.* (\d+) GiB in GPT-J.* are (\d+) GiB"
    (sizes,) = re.findall(told, PAGE.text[0].source)
    value, matrix = 2 * width * 8, d**2 * 8
    found = value / 2**10, value * facts / 2**20, matrix / 2**30, 8 * 6 * matrix / 2**30
    assert found == tuple(map(int, sizes))
