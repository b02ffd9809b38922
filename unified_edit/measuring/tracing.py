"""Causal tracing: which activations carry a fact from its subject to the answer.

Three sorts of runs are compared (ROME, arXiv 2202.05262, sec. 2). In the *clean* run the model
reads the prompt and gives the object the probability P. In a *corrupted* run noise is added to
the embeddings of the subject's tokens, and the object becomes less probable. In a *restored* run
the noise is the same, but one activation, at one token and layer, is put back to what it was in
the clean run: how much of the probability returns says how much of the fact passes through there.

The runs themselves are made in `unified_edit.measuring.traced_runs` and `restored_runs`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, real_number, whole_number
from unified_edit.errors import MethodError
from unified_edit.facts import Fact, check_items
from unified_edit.measuring.restored_runs import plan, restored, work
from unified_edit.measuring.traced_runs import KINDS, Prompt, Runs, read_prompt
from unified_edit.measuring.traces import Trace, TracedFact
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.likelihoods import next_token
from unified_edit.model.progress import Bar, progress
from unified_edit.model.prompts import Encoder, Row


def subject_sigma(
    model: PreTrainedModel, tokenizer: Tokenizer, facts: Iterable[Fact] | Fact
) -> float:
    """The standard deviation of the embeddings of subjects, :eq:`locate-sigma`.

    Taken over all entries of the token embeddings of all subject tokens in the facts' prompts (a
    token that occurs twice counts twice), as in the released code of ROME. They are what the
    embedding module gives, to which noise is added: Gemma's multiplies by the root of the width.

    Raises FactError for no facts, TokenizationError if the model cannot read them, ModelError for
    a model that `anatomy` refuses.
    """
    parts = anatomy(model)
    encoder = Encoder(tokenizer, parts)
    return _sigma(parts, [read_prompt(encoder, fact) for fact in check_items(facts)])


def locate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    *,
    noise: float = 3.0,
    samples: int = 8,
    window: int = 1,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    sigma: float | None = None,
    layers: Iterable[int] | None = None,
    windows: Mapping[str, int] | None = None,
) -> Trace:
    """Find where `model`, as it is now, keeps facts: causal tracing over tokens and layers.

    What is followed is the probability of `fact.target_true` after `fact.text`; where that is
    None, of the token that the model itself finds most probable. (`fact.target_new` plays no part.)
    The probability of an object of several tokens is the geometric mean over them, as in every
    score of this library. A fact that the model does not know gives effects close to zero.

    noise: of the Gaussian noise, :eq:`locate-corruption`, in units of sigma. The same noise is
        used for all restorations of a fact; it depends on `seed` and the fact's text alone, so
        that a fact is traced alike by itself and in a list, given the same sigma.
    samples: how many draws of it.
    window: how many neighbouring layers are restored together (an odd number), for MLP and
        attention; fewer at the first and last layer. The residual stream is restored at one layer,
        as in the released code of ROME.
    kinds: of `KINDS`.
    sigma: if not given, `subject_sigma` of the facts. For a single fact, that of a larger sample
        of facts is the better scale.
    layers: which layers to restore, all if not given: each as the middle of its window. The map
        is NaN at all others.
    windows: kind -> its own window, such as ``{"mlp": 5, "attention": 3}``, instead of `window`.
        A window of the residual stream is possible here too.

    A restoration costs more the lower it begins and the further left its token is; the progress bar
    counts restorations in that measure, so that the time it says is left holds from the start.

    The model's weights, hooks and flags are left as they are, also on an exception.

    Raises FactError for no facts or what are no facts, MethodError for a setting out of range,
    TokenizationError for a prompt or object that the model cannot read, and ModelError for a model
    that `anatomy` refuses, for layers that it does not have, or if its logits are NaN.
    """
    strength = real_number(noise, "noise", MethodError, above=0, advice="It is in units of sigma")
    draws_each = whole_number(samples, "samples", MethodError, least=1)
    width = _check_window(window, "window")
    first_seed = whole_number(seed, "seed", MethodError)
    if sigma is not None:
        sigma = real_number(sigma, "sigma", MethodError, above=0, advice="None measures it")
    chosen = _check_kinds(kinds)
    own = _check_windows(windows)
    widths = {kind: own.get(kind, 1 if kind == "state" else width) for kind in chosen}
    parts = anatomy(model)
    middles = parts.check_layers(range(parts.n_layers) if layers is None else layers)
    encoder, items = Encoder(tokenizer, parts), check_items(facts)
    prompts = [read_prompt(encoder, fact) for fact in items]
    asked = _objects(parts, encoder, items, prompts)
    scale = _sigma(parts, prompts) if sigma is None else sigma
    restorations = plan(parts.n_layers, middles, widths)
    costs = [work(parts.n_layers, prompt, restorations) for prompt in prompts]
    count = sum(len(restorations) * (len(prompt.ids) - prompt.subject[0]) for prompt in prompts)
    traced = []
    with torch.no_grad(), quiet(model), progress("tracing", count, "restoration") as bar:
        meter = _Meter(bar, count, sum(costs))
        for fact, prompt, (text, continuation) in zip(items, prompts, asked, strict=True):
            draws = strength * scale * _standard_noise(parts, fact, prompt, draws_each, first_seed)
            runs = Runs(parts, prompt, continuation, draws, chosen)
            traced.append(
                TracedFact(
                    fact=fact,
                    object=text,
                    tokens=prompt.tokens,
                    subject=prompt.subject,
                    clean=runs.clean,
                    corrupted_samples=runs.corrupted,
                    restored=restored(runs, prompt, restorations, meter.add),
                    noise=draws,
                )
            )
    return Trace(
        tuple(traced), chosen, width, strength, draws_each, first_seed, scale, own,
        None if layers is None else middles,
    )  # fmt: skip


class _Meter:
    """Tells a bar of restorations how much of all the work is done."""

    def __init__(self, bar: Bar, restorations: int, work: int) -> None:
        self.bar, self.restorations, self.work = bar, restorations, work
        self.done = self.shown = 0

    def add(self, work: int) -> None:
        self.done += work
        now = self.restorations * self.done // self.work
        self.bar.update(now - self.shown)
        self.shown = now


def _objects(
    parts: Anatomy, encoder: Encoder, facts: Sequence[Fact], prompts: Sequence[Prompt]
) -> list[tuple[str, Row]]:
    """The object of each fact as text, and the prompt with it."""
    own = [index for index, fact in enumerate(facts) if fact.target_true is None]
    rows = [Row(prompts[index].ids) for index in own]
    found = dict(zip(own, next_token(parts, rows), strict=True))
    objects = []
    for index, fact in enumerate(facts):
        if index in found:
            best = int(found[index].argmax())
            text = encoder.tokenizer.decode([best]).strip()
            objects.append((text, Row(prompts[index].ids, target=(best,))))
        else:
            text = cast(str, fact.target_true)
            objects.append((text, encoder.continuations([(fact.text, text)])[0]))
    return objects


def _sigma(parts: Anatomy, prompts: Sequence[Prompt]) -> float:
    ids = [i for one in prompts for i in one.ids[one.subject[0] : one.subject[1] + 1]]
    return float(parts.embedded(ids).cpu().double().std())


def _standard_noise(parts: Anatomy, fact: Fact, prompt: Prompt, samples: int, seed: int) -> Tensor:
    """Standard normal noise (samples x subject tokens x width), by seed and the fact's text."""
    mixed = zlib.crc32(f"{seed} {fact.text}".encode())
    count = prompt.subject[1] - prompt.subject[0] + 1
    return torch.randn(
        samples,
        count,
        parts.embeddings.shape[1],
        generator=torch.Generator().manual_seed(mixed),
        dtype=torch.float64,
    )


def _check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    each = tuple(as_list(kinds))
    if not each or not set(each) <= set(KINDS) or len(set(each)) < len(each):
        raise MethodError(f"kinds is {kinds!r}; choose one or more of {KINDS}, each once")
    return each


def _check_window(window: object, name: str) -> int:
    width = whole_number(window, name, MethodError, least=1)
    if width % 2 == 0:
        raise MethodError(
            f"{name} is {window!r}; give an odd number of layers, so that it has a middle"
        )
    return width


def _check_windows(windows: object) -> dict[str, int]:
    if windows is None:
        return {}
    if not isinstance(windows, Mapping) or not set(windows) <= set(KINDS):
        raise MethodError(
            f"windows is {windows!r}; give a dictionary from kinds, of {KINDS}, to odd numbers of "
            "layers; one number for MLP and attention is `window`"
        )
    return {kind: _check_window(width, f"windows[{kind!r}]") for kind, width in windows.items()}
