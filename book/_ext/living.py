"""Sphinx extension: pages with a `data-living` element get the script that brings it to life.

Beside that script lie the pieces of the model, made anew with every build and in no repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import unified_edit as ue
from unified_edit.teaching import living

FOLDER = "_static/living"


def bring_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Put the script at the end of a page that has something living in it."""
    if "data-living" in context.get("body", ""):
        place = context["pathto"](f"{FOLDER}/living.js", resource=True)
        context["body"] += f'<script src="{place}"></script>'


def write_pieces(app: Sphinx, problem: Exception | None) -> None:
    """Write the model beside the script, as the scripts that a page may load."""
    if problem is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = ue.load_model("atlas")
    for number, script in enumerate(living.scripts(living.packed(model, tokenizer))):
        (folder / f"piece-{number:02}.js").write_text(script, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    app.connect("html-page-context", bring_script, priority=950)
    app.connect("build-finished", write_pieces)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
