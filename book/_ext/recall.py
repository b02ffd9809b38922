"""Sphinx extension: `{recall}` shows a labelled equation again, with its own number.

A page that collects equations names their labels; what they say, and how they are numbered, comes
from the chapters, and cannot differ from them. On web pages the number stands beside the equation,
as it does in its chapter, and leads there; elsewhere it is a tag.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

log = logging.getLogger(__name__)


class Recalled(nodes.General, nodes.Element):
    """The place where the equation with this `label` is shown again."""


class Shown(nodes.General, nodes.Element):
    """On a web page: an equation (`latex`) with its `number`, and the `target` that leads to it."""


class Recall(SphinxDirective):
    """```{recall} label```"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A place that is filled in when all pages have been read."""
        place = Recalled(label=self.arguments[0])
        self.set_source_info(place)
        return [place]


def equations(env: BuildEnvironment) -> dict[str, dict[str, str]]:
    """Page -> label -> LaTeX of the equations read so far."""
    if not hasattr(env, "recallable"):
        env.recallable = {}  # type: ignore[attr-defined]
    found: dict[str, dict[str, str]] = env.recallable  # type: ignore[attr-defined]
    return found


def read(app: Sphinx, document: nodes.document) -> None:
    """Keep the labelled equations of a page."""
    equations(app.env)[app.env.docname] = {
        node["label"]: node.astext()
        for node in document.findall(nodes.math_block)
        if node.get("label")
    }


def purge(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """Forget a page that is read again."""
    equations(env).pop(page, None)


def merge(app: Sphinx, env: BuildEnvironment, pages: Any, other: BuildEnvironment) -> None:
    """Take over what another process has read."""
    equations(env).update({page: equations(other)[page] for page in pages})


def show(app: Sphinx, document: nodes.document, page: str) -> None:
    """Put the equations in; a label that is none is a warning, so the strict build fails."""
    for place in list(document.findall(Recalled)):
        label = place["label"]
        homes = [home for home, known in equations(app.env).items() if label in known]
        if not homes:
            log.warning("recall: no equation is labelled %r", label, location=place)
            place.parent.remove(place)
            continue
        (home,) = homes
        numbers = app.env.toc_fignumbers[home]["displaymath"][f"equation-{label}"]
        number = ".".join(map(str, numbers))
        latex = equations(app.env)[home][label]
        if app.builder.format == "html":
            target = f"{app.builder.get_relative_uri(page, home)}#equation-{label}"
            place.replace_self(Shown(latex=latex, number=number, target=target))
            continue
        tagged = f"{latex} \\tag{{{number}}}"
        shown = nodes.math_block(tagged, tagged, nowrap=False, number=None, label=None)
        shown["docname"] = page
        place.replace_self(shown)


def visit_shown(writer: HTML5Translator, node: Shown) -> None:
    """Write what Sphinx writes for an equation of the page, with a link in place of its anchor."""
    opening, closing = writer.builder.config.mathjax_display
    latex = writer.encode(node["latex"])
    if "\\\\" in latex:
        latex = f"\\begin{{split}}{latex}\\end{{split}}"
    writer.body.append(
        writer.starttag(node, "div", CLASS="math notranslate nohighlight recalled")
        + f'<span class="eqno"><a class="reference internal" href="{node["target"]}" '
        f'title="The equation in its chapter">({node["number"]})</a></span>'
        f"{opening}{latex}{closing}</div>\n"
    )
    raise nodes.SkipNode


def depart_shown(writer: HTML5Translator, node: Shown) -> None:
    """Nothing is left to write."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    app.add_node(Recalled)
    app.add_node(Shown, html=(visit_shown, depart_shown))
    app.add_directive("recall", Recall)
    app.connect("doctree-read", read)
    app.connect("env-purge-doc", purge)
    app.connect("env-merge-info", merge)
    app.connect("doctree-resolved", show)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
