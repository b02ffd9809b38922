"""Sphinx extension with what `_config.yml` cannot say for this book."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

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


def leave_mathjax_alone(app: Sphinx, config: Config) -> None:
    """Jupyter Book puts every script below `_static` into every page; MathJax loads its own."""
    scripts = [name for name in config.html_js_files if not str(name).startswith("mathjax/")]
    config.html_js_files = scripts


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point that Sphinx calls."""
    app.connect("config-inited", set_theme)
    app.connect("config-inited", leave_mathjax_alone)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
