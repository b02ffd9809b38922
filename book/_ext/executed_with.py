"""Sphinx extension: the last line of each notebook's page says with what it was executed.

The line is made while rendering, from the packages that are installed then: `make book` renders
with the environment in which it has just executed the notebooks. Nothing is stored in them.
"""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PACKAGES = ("torch", "transformers", "unified_edit")


#: A page that opens one model whatever the book is made for, as those of Part III do.
OPENS = re.compile(r'load_model\(\\?"([\w-]+)\\?"\)')


def executed_with(source: str = "") -> str:
    """The sentence, with the versions of what matters for outputs.

    source: of the page's notebook, as it stands in its file.
    """
    named = OPENS.findall(source)
    model = named[0] if named else Path(os.environ.get("UNIFIED_EDIT_MODEL") or "atlas").name
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name).partition('+')[0]}" for name in PACKAGES]
    return f"Executed on {model} with {', '.join(versions[:-1])} and {versions[-1]}."


def add_line(app: Sphinx, document: nodes.document) -> None:
    """Put the sentence at the end of a page that comes from a notebook."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    sections = [node for node in document.children if isinstance(node, nodes.section)]
    line = nodes.paragraph("", executed_with(path.read_text("utf-8")), classes=["executed-with"])
    (sections[-1] if sections else document).append(line)


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    app.connect("doctree-read", add_line)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
