"""Sphinx extension: the library's docstrings, which are plain text, as reStructuredText.

In a docstring `name` is code; lines of the form "name: what it is" are a list; indented lines, and
whatever stands between blank lines with them, are shown as they are written. Names that the
reference shows become links.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

from unified_edit import errors

REFERENCE = Path(__file__).resolve().parents[1] / "api.md"
SHOWN = re.compile(r"^\.\. auto\w+:: (unified_edit[\w.]*)", re.MULTILINE)

#: Classes that the library makes and a reader does not: how is of no interest.
MADE = {"Anatomy", "Edit", "KeyStatistics", "Trace", "TracedFact"}

ITEM = re.compile(r"^(?P<indent> *)(?:- )?(?P<names>[\w*]+(?:, [\w*]+)*): (?P<text>\S.*)$")
MARK = re.compile(r"(?::\w+)?(?::\w+:)?``?[^`]+``?")
ERROR = re.compile(r"\b[A-Z]\w*Error\b")
NAME = re.compile(r"`(?P<name>[\w.]+)`")


def targets() -> dict[str, str]:
    """Name in a docstring -> full name, for all that the reference shows."""
    names = [f"{errors.__name__}.{name}" for name in vars(errors) if ERROR.fullmatch(name)]
    names += shown()
    return {**{name: name for name in names}, **{name.rpartition(".")[2]: name for name in names}}


def shown() -> list[str]:
    """Full names that the reference shows, as it writes them."""
    return SHOWN.findall(REFERENCE.read_text(encoding="utf-8"))


def inline(text: str, links: dict[str, str]) -> str:
    """One paragraph's text: links, code, and nothing else that reStructuredText would read."""
    pieces, end = [], 0
    for mark in MARK.finditer(text):
        pieces.append(escaped(text[end : mark.start()], links))
        pieces.append(marked(mark.group(), links))
        end = mark.end()
    return "".join([*pieces, escaped(text[end:], links)])


def escaped(text: str, links: dict[str, str]) -> str:
    """Bars, and underscores at the end of a word, have no meaning here; errors become links."""
    text = re.sub(r"(?<=\w)_(?!\w)", r"\\_", text.replace("|", r"\|"))
    return ERROR.sub(lambda error: marked(f"`{error.group()}`", links), text)


def marked(text: str, links: dict[str, str]) -> str:
    """A role as it is; `name` as a link if the reference shows it, as code otherwise."""
    if text.startswith((":", "``")):
        return text
    name = NAME.fullmatch(text)
    if name and name["name"] in links:
        return f":py:obj:`{name['name']} <{links[name['name']]}>`"
    return f"`{text}`"


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def items(block: list[str]) -> list[tuple[int, str, str]] | None:
    """Indent, names and text of each item, or None for a block that is no list."""
    found: list[tuple[int, str, str]] = []
    for line in block:
        indent = len(line) - len(line.lstrip())
        match = ITEM.match(line)
        if match and (indent <= found[0][0] or found[-1][2][-1] not in ",;" if found else True):
            found.append((indent, match["names"], match["text"]))
        elif found and indent > found[0][0]:
            at, names, text = found[-1]
            found[-1] = (at, names, f"{text} {line.strip()}")
        else:
            return None
    return found or None


def converted(lines: list[str], links: dict[str, str]) -> list[str]:
    """A docstring's lines as reStructuredText."""
    out: list[str] = []
    for block in blocks(lines):
        indent = min(len(line) - len(line.lstrip()) for line in block)
        if block[0].lstrip().startswith((">>>", ".. ")):
            out += block
        elif found := items(block):
            depth = 0
            for at, names, text in found:
                if (new := int(at > found[0][0])) != depth:
                    out.append("")
                    depth = new
                bold = ", ".join(f"**{name}**" for name in names.split(", "))
                out.append(f"{'  ' * depth}- {bold}: {inline(text, links)}")
        elif indent > 0:
            out += [".. code-block:: none", "", *(f"   {line[indent:]}" for line in block)]
        elif block[0].startswith("- "):
            joined: list[str] = []
            for line in block:
                if line.startswith("- "):
                    joined.append(line)
                else:
                    joined[-1] += " " + line.strip()
            out += [f"- {inline(line[2:], links)}" for line in joined]
        else:
            out.append(inline(" ".join(line.strip() for line in block), links))
        out.append("")
    return out


def convert(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Called by autodoc for each docstring; changes the lines in place."""
    lines[:] = converted(lines, targets())


def sign(
    app: Sphinx, what: str, name: str, obj: object, options: object, arguments: str, result: str
) -> tuple[str, str] | None:
    """Called by autodoc for each signature; None leaves it as it is."""
    if inspect.isclass(obj) and obj.__name__ in MADE:
        return "", ""
    # How a dataclass shows a default that is made anew for each object is no Python.
    return (arguments.replace("<factory>", "..."), result) if arguments else None


def set_reference(app: Sphinx, config: Config) -> None:
    """How the library's docstrings are shown, and which names in signatures need no page."""
    config.html_domain_indices = config.html_use_index = False  # one page, and a search
    config.autodoc_member_order = "bysource"
    config.autodoc_typehints_format = "short"
    config.autodoc_preserve_defaults = True  # EMMET, and not all of its fields
    # Types of other libraries (their own pages cannot be looked up without a network), and those
    # of this one that users meet in signatures only, wherever they are defined.
    public = "|".join(re.escape(name.rpartition(".")[2]) for name in shown())
    config.nitpick_ignore_regex = [
        ("py:.*", r"(?!unified_edit\.).*"),
        ("py:class", rf"unified_edit\.(?:\w+\.)*(?!(?:{public})$)\w+"),
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("config-inited", set_reference)
    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", sign)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
