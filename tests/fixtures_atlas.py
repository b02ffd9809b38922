"""Fixtures around the embedded model; `conftest.py` makes them known."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from recipe import TOLERANCE

import unified_edit as ue
from unified_edit.atlas.corpus import texts
from unified_edit.atlas.knowledge import load_knowledge


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Statistics are cached in a folder of this test run, shared by its workers if it has some.

    Never in the user's, and not in that of the run before: it may be another version's.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "unified_edit_cache"
    os.environ["UNIFIED_EDIT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def knowledge():
    return load_knowledge()


@pytest.fixture(scope="session")
def atlas_texts(knowledge):
    """The default corpus of atlas: what its key statistics are collected from."""
    return texts(knowledge, 4000)


@pytest.fixture(scope="session")
def _atlas():
    return ue.load_model("atlas")


@pytest.fixture
def atlas(_atlas):
    """(model, tokenizer) without edits, before and after the test."""
    ue.Editor(*_atlas).reset()
    yield _atlas
    ue.Editor(*_atlas).reset()


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["double", "single"])
def precise(request, _atlas):
    """(model in the type under test, its double, tokenizer, tolerance)."""
    model, tokenizer = _atlas
    tested = copy.deepcopy(model).to(request.param)
    return tested, copy.deepcopy(model).double(), tokenizer, TOLERANCE[request.param]
