"""Fixtures that several test files share."""

from __future__ import annotations

pytest_plugins = ["fixtures_atlas", "fixtures_tiny", "fixtures_refusals"]
