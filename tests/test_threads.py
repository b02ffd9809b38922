"""Several threads and one model: whoever asks gets the model's answer, before an edit or after it.

A demo with a queue, a training loop that is watched, a notebook with a background cell: none of
them locks the model, so the library does.
"""

from __future__ import annotations

import threading

import pytest
import torch
from fixtures_refusals import FACTS, ONE, SPREAD, TOWER, VIENNA, Interrupted, raising
from fixtures_tiny import assert_unchanged, snapshot

import unified_edit as ue
from unified_edit.editing import Editor
from unified_edit.model import (
    Encoder,
    anatomy,
    captured,
    likelihoods,
    quiet,
    replaced_output,
)
from unified_edit.model.hooks import logits_of, stubbed

WAIT = 60  # seconds; a thread that waits longer is held up for ever


class Threads:
    """Threads whose errors are raised where they are waited for."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def start(self, work) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        self.threads.append(thread)
        thread.start()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(WAIT)
            assert not thread.is_alive(), "a thread waits for ever"
        if self.errors:
            raise self.errors[0]


@pytest.fixture
def threads():
    return Threads()


def test_threads_that_ask_leave_every_flag(tiny, tiny_tokenizer, threads) -> None:
    """Each switches evaluation mode and gradients; the last must put back what the first found."""
    tiny.train()
    tiny.requires_grad_(True)
    before = snapshot(tiny)
    expected = ue.ask(tiny, tiny_tokenizer, TOWER.text)
    answers = []
    begin = threading.Barrier(4)

    def ask() -> None:
        begin.wait(WAIT)
        for _ in range(10):
            answers.append(ue.ask(tiny, tiny_tokenizer, TOWER.text))

    for _ in range(4):
        threads.start(ask)
    threads.wait()
    assert len(answers) == 40 and all(answer.equals(expected) for answer in answers)
    assert tiny.training and all(module.training for module in tiny.modules())
    assert_unchanged(tiny, before)


@pytest.mark.parametrize("method", [ONE, SPREAD], ids=lambda method: method.name)
def test_a_thread_that_asks_while_another_edits(
    tiny, tiny_tokenizer, tiny_statistics, threads, method
) -> None:
    """It sees the model before or after an edit, never one that is half made or tried."""
    expected = {"before": ue.ask(tiny, tiny_tokenizer, TOWER.text, k=1000)}
    made = ue.edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics)
    expected["after"] = ue.ask(tiny, tiny_tokenizer, TOWER.text, k=1000)
    assert not expected["after"].equals(expected["before"])
    made.undo()
    state = snapshot(tiny)
    seen, strange, done = [], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            found = ue.ask(tiny, tiny_tokenizer, TOWER.text, k=1000)
            of = [name for name, answer in expected.items() if answer.equals(found)]
            seen.extend(of)
            strange.extend([] if of else [found])

    def write() -> None:
        try:
            for _ in range(4):
                again = ue.edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics)
                assert again.id == made.id
                ue.ask(tiny, tiny_tokenizer, TOWER.text)
                again.undo()
        finally:
            done.set()

    for work in (ask, ask, write):
        threads.start(work)
    threads.wait()
    assert not strange
    assert seen
    assert_unchanged(tiny, state)


def test_threads_that_edit_one_model(tiny, tiny_tokenizer, tiny_statistics, threads) -> None:
    """One after the other, in whatever order; all edits are in force and can be undone."""
    before = snapshot(tiny)
    made = []

    def write(fact) -> None:
        made.append(ue.edit(tiny, tiny_tokenizer, [fact], ONE, statistics=tiny_statistics))

    for fact in FACTS:
        threads.start(lambda fact=fact: write(fact))
    threads.wait()
    assert {edit.id for edit in Editor(tiny, tiny_tokenizer).active} == {edit.id for edit in made}
    assert len(made) == 3
    for edit in made:
        threads.start(edit.undo)
    threads.wait()
    assert_unchanged(tiny, before)


def test_a_thread_that_fails_does_not_hold_up_others(
    tiny, tiny_tokenizer, tiny_statistics, threads, monkeypatch
) -> None:
    where = "unified_edit.editing.layer_loop.solve"
    monkeypatch.setattr(where, raising(Interrupted("stopped"), 1, print))
    threads.start(lambda: ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics))
    with pytest.raises(Interrupted):
        threads.wait()
    monkeypatch.undo()
    threads.errors.clear()
    threads.start(lambda: ue.edit(tiny, tiny_tokenizer, [VIENNA], ONE, statistics=tiny_statistics))
    threads.wait()


# --- a thread that runs the model itself, without the library ---


@pytest.fixture
def foreign(make_gpt2, tiny_tokenizer):
    """(a model, run, what run gives): run() is somebody else's forward in a thread of its own."""
    model = make_gpt2()
    ids = tiny_tokenizer(TOWER.text, return_tensors="pt")["input_ids"]

    def run():
        found = []

        def forward() -> None:
            with torch.no_grad():
                found.append(model(ids).logits)

        threads = Threads()
        threads.start(forward)
        try:
            threads.wait()
        except BaseException as error:  # one by which the library leaves a forward of its own
            raise AssertionError("a forward elsewhere was disturbed") from error
        return found[0]

    return model, ids, run, run()


def test_reading_does_not_stop_a_forward_elsewhere(foreign) -> None:
    model, ids, run, expected = foreign
    parts = anatomy(model)
    with captured({"key": (parts.down(1), "input")}) as seen:
        assert torch.equal(run(), expected)
        assert not seen  # nor is what passes there taken for what was asked
        model(ids)
    assert seen["key"].shape == (1, ids.shape[1], 48)


def test_a_replaced_output_is_not_seen_elsewhere(foreign) -> None:
    model, ids, run, expected = foreign
    with replaced_output(model.transformer.h[1], lambda hidden: hidden + 1):
        assert torch.equal(run(), expected)
        with torch.no_grad():
            assert not torch.allclose(model(ids).logits, expected)


def test_stubbed_blocks_are_not_stubbed_elsewhere(foreign) -> None:
    model, ids, run, expected = foreign
    parts = anatomy(model)
    with torch.no_grad(), captured({"out": (parts.blocks[1], "output")}, stop=False) as seen:
        model(ids)
    with torch.no_grad(), stubbed(list(parts.blocks[:2]), 2 * seen["out"], as_tuple=False):
        assert torch.equal(run(), expected)
        assert not torch.allclose(model(ids).logits, expected)
    assert torch.equal(run(), expected)


def test_a_forward_elsewhere_while_logits_are_made(foreign) -> None:
    """For the model's own head its body is another one for a moment: in this thread."""
    model, _, run, expected = foreign
    own, during = threading.get_ident(), []
    hidden = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = logits_of(model, hidden)

    def look(_module, _args, _output):
        if threading.get_ident() == own:
            during.append(run())

    handle = model.lm_head.register_forward_hook(look)
    with torch.no_grad():
        found = logits_of(model, hidden)
    handle.remove()
    assert torch.equal(found, plain)
    assert len(during) == 1 and torch.equal(during[0], expected)


def test_a_forward_elsewhere_at_every_step_of_an_edit(
    foreign, tiny_tokenizer, tiny_statistics
) -> None:
    """Whenever the library runs the model, somebody else does too; neither disturbs the other.

    Weights that are tried are the model's for everybody, so this looks until the first is written.
    """
    model, _, run, expected = foreign
    own, answers = threading.get_ident(), []
    values = ue.optimise_values(model, tiny_tokenizer, FACTS, ONE)

    def look(*_) -> None:
        if threading.get_ident() == own:
            answers.append(run())

    handles = [
        module.register_forward_hook(look)
        for module in (model.transformer.h[1].attn, model.transformer.h[3], model.lm_head)
    ]
    again = ue.optimise_values(model, tiny_tokenizer, FACTS, ONE)
    asked = Encoder(tiny_tokenizer, anatomy(model)).continuations([(TOWER.text, "Rome")])
    found = likelihoods(anatomy(model), asked)
    traced = ue.locate(model, tiny_tokenizer, [TOWER], samples=1)
    for handle in handles:
        handle.remove()
    assert len(answers) > 20 and all(torch.equal(answer, expected) for answer in answers)
    assert torch.equal(again.delta, values.delta) and again.losses == values.losses
    assert found == likelihoods(anatomy(model), asked)
    plain = ue.locate(model, tiny_tokenizer, [TOWER], samples=1)
    assert all(
        torch.equal(plain.facts[0].restored[kind], one)
        for kind, one in traced.facts[0].restored.items()
    )


def test_a_thread_waits_its_turn(tiny, tiny_tokenizer, threads) -> None:
    """While one thread has the model in evaluation mode, another one's `quiet` does not begin."""
    began = threading.Event()

    def ask() -> None:
        began.set()
        ue.ask(tiny, tiny_tokenizer, TOWER.text)

    with quiet(tiny), quiet(tiny):  # the same thread may enter again
        threads.start(ask)
        assert began.wait(WAIT)
        threads.threads[0].join(0.2)
        assert threads.threads[0].is_alive()
    threads.wait()
