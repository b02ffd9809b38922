"""The data that comes with the library: what it is, and that it says where it is from."""

from importlib.resources import files
from types import SimpleNamespace

from transformers import GPT2Config

import unified_edit as ue
from unified_edit.statistics import default_corpus, wikitext_extract

SOURCES = (files("unified_edit") / "data" / "SOURCES.md").read_text(encoding="utf-8")


def test_every_file_has_its_source_and_licence() -> None:
    kept = {one.name for one in (files("unified_edit") / "data").iterdir()} - {"SOURCES.md"}
    assert kept == {"counterfact_250.json", "wikitext2_valid.txt"}
    for name in kept:
        assert f"## {name}" in SOURCES
    assert "MIT License" in SOURCES
    assert "Attribution-ShareAlike" in SOURCES


def test_counterfact_is_as_it_was_published() -> None:
    records = ue.load_records("counterfact-250")
    assert len(records) == 250
    assert len({record.case_id for record in records}) == 250
    for record in records:
        assert len(record.paraphrases) == 2
        assert len(record.neighbours) == 10
        assert len(record.generation_prompts) == 10
        assert record.fact.target_true is not None
    subjects = [record.fact.subject for record in records[:100]]
    twice = {one for one in subjects if subjects.count(one) > 1}
    assert twice == {"Nintendo Software Planning & Development"}


def test_the_corpus_is_long_enough_for_the_model_it_is_for() -> None:
    paragraphs = wikitext_extract()
    assert len(paragraphs) == 188
    assert all(len(one) > 200 for one in paragraphs)
    # a token of these models stands for about 4.4 characters of such text; ten keys an entry of
    # SmolLM2's 1,536 are the least that is asked for
    assert sum(map(len, paragraphs)) > 4.4 * 10 * 1536
    titles = SOURCES.split("under its title:")[1]
    assert titles.count(";") + 1 == 58


def test_smollm2_has_that_corpus_without_a_network() -> None:
    model = SimpleNamespace(config=GPT2Config(name_or_path="smollm2"))
    assert list(default_corpus(model)) == wikitext_extract()  # type: ignore[arg-type]
