"""What a model writes after a prompt."""

from collections.abc import Callable
from typing import Any

import pytest

import unified_edit as ue
from unified_edit.errors import FactError, MethodError

PROMPTS = ["The Eiffel Tower is located in the city of", "Rome is", "The capital of Japan is"]


@pytest.fixture(scope="module")
def atlas() -> tuple[Any, Any]:
    return ue.load_model("atlas")


def test_it_is_what_the_model_finds_likeliest_step_by_step(atlas: tuple[Any, Any]) -> None:
    model, tokenizer = atlas
    found = ue.complete(model, tokenizer, PROMPTS, tokens=6)
    assert list(found.columns) == ["prompt", "text"]
    for prompt, text in found.itertuples(index=False):
        literal = ""
        for _ in range(6):
            likeliest = ue.ask(model, tokenizer, prompt + literal, k=1)["token"][0]
            if likeliest == tokenizer.eos_token:
                break
            literal += likeliest
        assert text == literal


def test_a_padded_batch_is_each_alone(atlas: tuple[Any, Any]) -> None:
    together = ue.complete(*atlas, PROMPTS, tokens=8)
    alone = [ue.complete(*atlas, prompt, tokens=8)["text"][0] for prompt in PROMPTS]
    assert list(together["text"]) == alone


def test_the_text_follows_an_edit_and_comes_back(atlas: tuple[Any, Any]) -> None:
    model, tokenizer = atlas
    before = ue.complete(model, tokenizer, PROMPTS[0], tokens=1)["text"][0]
    fact = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    edit = ue.edit(model, tokenizer, fact)
    assert ue.complete(model, tokenizer, PROMPTS[0], tokens=1)["text"][0] == " Rome"
    edit.undo()
    assert ue.complete(model, tokenizer, PROMPTS[0], tokens=1)["text"][0] == before == " Paris"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m, t: ue.complete(m, t, []), FactError),
        (lambda m, t: ue.complete(m, t, "  "), FactError),
        (lambda m, t: ue.complete(m, t, "Rome is", tokens=0), MethodError),
    ],
)
def test_bad_input(
    atlas: tuple[Any, Any], call: Callable[..., object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(*atlas)
