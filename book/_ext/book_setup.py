"""Sphinx extension with what `_config.yml` cannot say for this book."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

#: Extensions beside this file that come with it.
OTHERS = ("api_docs", "drawing", "executed_with", "living", "recall")
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def set_theme(app: Sphinx, config: Config) -> None:
    """Take the repository's address from its one place; the theme makes the buttons from it."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    config.html_theme_options.update(
        repository_url=project["urls"]["Repository"],
        use_repository_button=True,
        use_issues_button=True,
        navbar_persistent=[],  # its default adds a second search field above the page
    )
    config.release = config.version = project["version"]


def leave_some_scripts_alone(app: Sphinx, config: Config) -> None:
    """Jupyter Book puts every script below `_static` into every page; these come where needed."""
    apart = ("mathjax/", "living/")
    scripts = [name for name in config.html_js_files if not str(name).startswith(apart)]
    config.html_js_files = scripts


def mend_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Take out the scripts of Thebe, and give the entries of a bibliography their role.

    Thebe, which Jupyter Book adds, runs cells through a service on the network. It is not used
    here, and its script is added twice, which browsers complain of. The role that docutils gives
    to a citation may not stand in a list any more.
    """
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script} {getattr(script, 'attributes', {})}".lower()
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    for extension in OTHERS:
        app.setup_extension(extension)
    app.connect("html-page-context", mend_page, priority=900)
    app.connect("config-inited", set_theme)
    app.connect("config-inited", leave_some_scripts_alone)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
