"""What the sources of the book say: directives, labels and code cells, read from the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checkout import ROOT

BOOK = ROOT / "book"
#: The chapters of each part, in the order of reading.
PARTS = (
    ("a_fact", "locating", "memory", "storage", "preserving", "judging"),
    ("objective", "rome", "memit", "emmet", "bridge", "values", "spreading"),
    ("real_model", "real_locating", "real_edits"),
    ("one_fact", "mass_editing", "batches", "hook_layers", "four_corners", "breaks", "big_models"),
    ("relations", "concepts", "where_this_goes"),
)

_OPEN = re.compile(r"^ {0,3}(?P<fence>`{3,}|~{3,}|:{3,})(?P<info>.*)$")
_DIRECTIVE = re.compile(r"^\{(?P<name>[\w:.-]+)\}\s*(?P<argument>.*)$")
_OPTION = re.compile(r"^:(?P<name>[\w-]+):\s*(?P<value>.*)$")
_LITERAL = ("math", "code", "code-block", "code-cell", "literalinclude")


@dataclass
class Block:
    """A fenced block: a directive (`name`, `argument`, `options`) or code (`name` is "")."""

    name: str
    argument: str
    body: str
    options: dict[str, str] = field(default_factory=dict)
    inside: tuple[Block, ...] = ()

    def walk(self) -> Iterator[Block]:
        """This block and all blocks in it."""
        yield self
        for block in self.inside:
            yield from block.walk()


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook; a Markdown page is one Markdown cell."""

    kind: str
    source: str
    number: int

    @property
    def blocks(self) -> list[Block]:
        """All fenced blocks of a Markdown cell, outer ones first."""
        if self.kind != "markdown":
            return []
        return [inner for block in fenced(self.source) for inner in block.walk()]


@dataclass(frozen=True)
class Page:
    """A chapter or page of the book."""

    name: str
    cells: tuple[Cell, ...]
    is_notebook: bool

    @property
    def code(self) -> list[Cell]:
        """Code cells."""
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def text(self) -> list[Cell]:
        """Markdown cells."""
        return [cell for cell in self.cells if cell.kind == "markdown"]

    def directives(self, name: str) -> list[Block]:
        """All directives of a name, in order."""
        return [block for cell in self.text for block in cell.blocks if block.name == name]


def fenced(text: str) -> tuple[Block, ...]:
    """Fenced blocks of a Markdown text; those inside a directive are its `inside`."""
    blocks = []
    lines = iter(text.splitlines())
    for line in lines:
        opened = _OPEN.match(line)
        if not opened:
            continue
        fence, info = opened["fence"], opened["info"].strip()
        closing = re.compile(rf"^ {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}\s*$")
        body: list[str] = []
        for inner in lines:
            if closing.match(inner):
                break
            body.append(inner)
        directive = _DIRECTIVE.match(info)
        if directive is None:
            blocks.append(Block("", info, "\n".join(body)))
            continue
        options: dict[str, str] = {}
        while body and (option := _OPTION.match(body[0].strip())):
            options[option["name"]] = option["value"].strip()
            body.pop(0)
        content = "\n".join(body).strip("\n")
        name = directive["name"]
        inside = () if name in _LITERAL else fenced(content)
        blocks.append(Block(name, directive["argument"].strip(), content, options, inside))
    return tuple(blocks)


def page(path: Path) -> Page:
    """A page from its file."""
    name = path.relative_to(BOOK).with_suffix("").as_posix()
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return Page(name, (Cell("markdown", content, 1),), is_notebook=False)
    cells = tuple(
        Cell(cell["cell_type"], "".join(cell["source"]), number)
        for number, cell in enumerate(json.loads(content)["cells"], start=1)
    )
    return Page(name, cells, is_notebook=True)


def pages() -> list[Page]:
    """Every page of the book that is not in a hidden folder or one of Sphinx's."""
    paths = sorted([*BOOK.rglob("*.ipynb"), *BOOK.rglob("*.md")])
    return [
        page(path)
        for path in paths
        if not any(part.startswith(("_", ".")) for part in path.relative_to(BOOK).parts)
    ]


def notebooks() -> list[Page]:
    """The chapters."""
    return [page for page in pages() if page.is_notebook]


def equation_labels(page: Page) -> list[str]:
    """Labels of displayed equations: of `{math}` directives, and of ``$$ ... $$ (label)``."""
    labels = [
        block.options.get("label", block.options.get("name", ""))
        for block in page.directives("math")
    ]
    for cell in page.text:
        labels += re.findall(r"\$\$ *\(([\w:-]+)\) *$", cell.source, re.MULTILINE)
    return [label for label in labels if label]
