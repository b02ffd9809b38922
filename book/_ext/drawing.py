"""Sphinx extension: `{drawing}` puts one of the library's line drawings into a page.

It is a figure like any other: it has a caption and a number, and its `:name:` can be referred to.
The drawing itself stands in the page as SVG, so that its lines follow the page's colours.
"""

from __future__ import annotations

from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from unified_edit.teaching.drawings import DRAWINGS


class DrawingFigure(SphinxDirective):
    """```{drawing} name```, with the caption as its content."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"name": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """The figure; an unknown name, or no caption, is an error that shows where it stands."""
        name = self.arguments[0]
        if name not in DRAWINGS:
            raise self.error(f"there is no drawing {name!r}; there are {', '.join(DRAWINGS)}")
        parsed = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, parsed)
        if not (parsed.children and isinstance(parsed.children[0], nodes.paragraph)):
            raise self.error(f"the drawing {name!r} has no caption")
        said, *more = parsed.children
        figure = nodes.figure("", nodes.raw("", DRAWINGS[name]()._repr_html_(), format="html"))
        figure["align"] = "default"
        figure += nodes.caption(said.rawsource, "", *said.children)
        if more:
            figure += nodes.legend("", *more)
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure]


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    app.add_directive("drawing", DrawingFigure)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
