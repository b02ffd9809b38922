"""What must hold for every family in `unified_edit.model.families`, on tiny random models.

A new family needs a row there and a configuration here; nothing else in this file names one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_tiny import assert_unchanged, own_seed, snapshot
from transformers import AutoConfig, AutoModelForCausalLM

import unified_edit as ue
from unified_edit.editing import Contexts, read_values
from unified_edit.model import FAMILIES, Encoder, anatomy, likelihoods

#: `config.model_type` -> a configuration of four layers whose keys are longer than its states.
#: The vocabulary is that of the fixtures' tokenizer.
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_layer": 4, "n_head": 2, "n_inner": 48, "n_positions": 128},
    "gptj": {
        "n_embd": 24, "n_layer": 4, "n_head": 2, "n_inner": 56, "n_positions": 128, "rotary_dim": 4,
        "tie_word_embeddings": False,
    },
    "llama": {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 12,
        "num_key_value_heads": 1, "intermediate_size": 56, "max_position_embeddings": 128,
    },
}  # fmt: skip

#: The models are float64, but some families make rotary tables or attention in float32 whatever the
#: type of their weights: 6e-8 a number.
SAME = 1e-6
WRITTEN = 1e-6

FACTS = [
    ue.Fact("The {} is in the city of", "old tower", "Rome", "Paris"),
    ue.Fact("I walked from the {} to the", "river", "market", "bridge"),
    ue.Fact("{} was born in", "Lisbon", "Oslo and Rome", "Dublin"),
]
#: One bare context: the key that an edit is made for is then the very key that the model meets.
METHOD = ue.EMMET.replace(layers=(1,), steps=6, contexts=Contexts(prefixes=["It is said. "]))


@pytest.fixture(scope="module", params=sorted(TINY))
def model(request: Any, tiny_tokenizer: Any) -> Any:
    """A model of the family in float64, with weights large enough for every path to matter."""
    config = AutoConfig.for_model(
        request.param,
        vocab_size=len(tiny_tokenizer),
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
        **TINY[request.param],
    )
    with own_seed(0):
        made = AutoModelForCausalLM.from_config(config)
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):  # zero ones hide where they are forgotten
                torch.nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


def test_every_family_has_a_tiny_model() -> None:
    assert sorted(TINY) == sorted(FAMILIES)


def test_an_update_moves_what_it_is_to_move(model: Any) -> None:
    parts = anatomy(model)
    assert parts.n_layers == 4
    for layer in range(parts.n_layers):
        weight = parts.weight(layer)
        assert weight.d_in > weight.d_out == parts.width
        assert parts.probe(weight, parts.mlp(layer)) <= 1e-8
        assert parts.probe(weight, parts.blocks[layer]) <= 1e-8
        assert parts.attention(layer) is not parts.mlp(layer)


def test_a_batch_gives_what_each_row_gives(model: Any, tiny_tokenizer: Any) -> None:
    parts = anatomy(model)
    rows = Encoder(tiny_tokenizer, parts).fact_rows(FACTS, ["", "I walked. "])
    each = [row for behind in rows.behind for row in behind]
    together = likelihoods(parts, each)
    for row, found in zip(each, together, strict=True):
        assert found.logp == pytest.approx(likelihoods(parts, [row])[0].logp, rel=SAME)
        ids = torch.tensor([[*row.ids, row.target[-1]]])
        logits = model(ids).logits[0, -len(row.target) - 1 : -1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(row.target)[:, None]).mean()
        assert found.logp == pytest.approx(wanted.item(), rel=SAME)


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_the_value_is_written_and_taken_out(
    model: Any, tiny_tokenizer: Any, tiny_texts: list[str], site: str
) -> None:
    parts, before = anatomy(model), snapshot(model)
    statistics = ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)
    bare = METHOD.replace(site=site, key_mean=lambda count: [1.0, *[0.0] * (count - 1)])
    values = ue.optimise_values(model, tiny_tokenizer, FACTS, bare)
    stood = read_values(parts, tiny_tokenizer, FACTS, 1, site)
    edit = ue.edit(model, tiny_tokenizer, FACTS, bare, statistics=statistics, values=values)
    stands = read_values(parts, tiny_tokenizer, FACTS, 1, site)
    assert (stands - stood - values.delta).norm() <= WRITTEN * values.delta.norm()
    assert sum(one.after for one in edit.outcomes) > sum(one.before for one in edit.outcomes)
    edit.undo()
    assert torch.equal(read_values(parts, tiny_tokenizer, FACTS, 1, site), stood)
    assert_unchanged(model, before)


def test_a_trace_runs_through_it(model: Any, tiny_tokenizer: Any) -> None:
    trace = ue.locate(model, tiny_tokenizer, FACTS[:1], samples=2, window=3)
    effects = torch.tensor(trace.effects("state").to_numpy())
    # behind the last block the last token's own state is all that there is to put back
    gained = trace.facts[0].total_effect
    assert effects[-1, -1] == pytest.approx(gained, rel=1e-6)
