"""The reference held against itself, by routes it does not take.

The algebra: hand-worked numbers, a Karush-Kuhn-Tucker system, gradients, limits. The recipe: tiny
random GPT-2 and GPT-J in float64, character offsets for the tokens, and, for adding a vector at
one position, a weight edit that does nothing else. Tolerances are multiples of EPS = 2.2e-16 and
of the condition of what is inverted.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.gptj.modeling_gptj import GPTJAttention

EPS = torch.finfo(torch.float64).eps
# A forward pass through three narrow layers sums a few hundred products at a time; two routes to
# the same number differ by at most some thousand roundings.
CLOSE = 1e4 * EPS

TEXTS = [
    "The Eiffel Tower is located in the city of Paris. Marie Curie was born in Warsaw.",
    "The old man went home. Rome is the capital of Italy, and Paris is the capital of France.",
    "You never know what the city of Rome is like. The mother tongue of Marie Curie is Polish.",
]
CONTEXTS = ["{}", "The old man went. {}", "Because the city of Rome. {}"]
FACTS: list[ref.Fact] = [
    ("{} is located in the city of", "The Eiffel Tower", "Rome"),
    ("The mother tongue of {} is", "Marie Curie", "French"),
]


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
    """Relative to the largest entry of what is expected."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.2e}"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------- the objective

D_IN, D_OUT, E = 12, 7, 4


def problem(seed: int, condition: float = 1e3) -> tuple[Tensor, Tensor, Tensor, float]:
    """C0 of a chosen condition, keys, residuals, and the tolerance for any closed form of them.

    An explicit inverse of C0 loses cond(C0), that of the Gram matrix cond(G) on top.
    """
    Q = torch.linalg.qr(randn(D_IN, D_IN, seed=seed))[0]
    C0 = Q @ torch.diag(torch.logspace(0, math.log10(condition), D_IN, dtype=torch.float64)) @ Q.T
    C0 = (C0 + C0.T) / 2
    K, R = randn(D_IN, E, seed=seed + 1), randn(D_OUT, E, seed=seed + 2)
    gram = K.T @ torch.linalg.inv(C0) @ K
    return C0, K, R, D_IN * EPS * condition * torch.linalg.cond(gram).item()


def test_imports_nothing_of_the_library() -> None:
    tree = ast.parse(Path(ref.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"__future__", "collections", "contextlib", "dataclasses", "math", "torch",
                        "typing"}  # fmt: skip


def test_closed_forms_by_hand() -> None:
    # C0 = diag(1, 4), k = (1, 2), r = 3:  C0^-1 k = (1, 1/2),  k^T C0^-1 k = 2.
    C0 = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    k, r = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    K, R = k[:, None], r[:, None]
    equality = torch.tensor([[1.5, 0.75]], dtype=torch.float64)  # 3 / 2 * (1, 1/2)
    close(ref.rome_delta(C0, k, r), equality, 4 * EPS)
    close(ref.emmet_delta(C0, K, R), equality, 4 * EPS)
    close(ref.emmet_released_delta(C0, K, R, w=1000.0), equality, 16 * EPS)  # E = 1: no ridge
    damped = torch.tensor([[1.0, 0.5]], dtype=torch.float64)  # 3 / (2 + 1) * (1, 1/2)
    close(ref.memit_delta(C0, K, R, lam=1.0), damped, 16 * EPS)
    assert ref.preservation(equality, C0.double()) == 4.5  # 1.5^2 + 4 * 0.75^2
    assert ref.memorization(damped, K.double(), R.double()) == 1.0  # (1 + 1 - 3)^2


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_equality_holds_and_is_the_stationary_point(condition: float) -> None:
    C0, K, R, tolerance = problem(10, condition)
    delta = ref.emmet_delta(C0, K, R)
    close(delta @ K, R, tolerance)
    close(delta, ref.lagrangian_delta(C0, K, R), tolerance)


def test_equality_is_the_cheapest_of_all_that_hold_it() -> None:
    C0, K, R, tolerance = problem(20)
    delta = ref.emmet_delta(C0, K, R)
    # Any other solution differs by rows orthogonal to the keys; the cross term must vanish.
    away = randn(D_OUT, D_IN, seed=21) @ (
        torch.eye(D_IN, dtype=torch.float64) - K @ torch.linalg.pinv(K)
    )
    close((delta + away) @ K, R, tolerance)
    cost = ref.preservation(delta + away, C0)
    close(cost, ref.preservation(delta, C0) + ref.preservation(away, C0), tolerance)


def test_rome_is_emmet_with_one_fact() -> None:
    C0, K, R, tolerance = problem(30)
    close(ref.rome_delta(C0, K[:, 0], R[:, 0]), ref.emmet_delta(C0, K[:, :1], R[:, :1]), tolerance)


@pytest.mark.parametrize("lam", [1e-3, 1.0, 1e3])
def test_push_through(lam: float) -> None:
    C0, K, R, _ = problem(40)
    identity = torch.eye(E, dtype=torch.float64)
    bridge = (
        R @ torch.linalg.inv(lam * identity + K.T @ torch.linalg.inv(C0) @ K) @ K.T
    ) @ torch.linalg.inv(C0)
    d_by_d = lam * C0 + K @ K.T
    tolerance = D_IN * EPS * (torch.linalg.cond(d_by_d) + torch.linalg.cond(C0)).item()
    close(ref.memit_delta(C0, K, R, lam), bridge, tolerance)


def test_least_squares_is_the_stationary_point() -> None:
    C0, K, R, _ = problem(50)
    lam = 0.7
    delta = ref.memit_delta(C0, K, R, lam).requires_grad_()
    cost = lam * torch.trace(delta @ C0 @ delta.T) + ((delta @ K - R) ** 2).sum()
    (gradient,) = torch.autograd.grad(cost, [delta])
    scale = (2 * R @ K.T).abs().max()  # the gradient at Delta = 0
    d_by_d = lam * C0 + K @ K.T
    assert gradient.abs().max() <= D_IN * EPS * torch.linalg.cond(d_by_d) * scale
    value = lam * ref.preservation(delta, C0) + ref.memorization(delta, K, R)
    close(value, cost.detach(), 8 * EPS)


@pytest.mark.parametrize("w", [1.0, 1000.0])
def test_released_emmet_is_memit_with_lam_alpha_w(w: float) -> None:
    C0, K, R, _ = problem(60)
    d_by_d = 0.1 * w * C0 + K @ K.T
    tolerance = D_IN * EPS * (torch.linalg.cond(d_by_d) + torch.linalg.cond(C0)).item()
    released = ref.emmet_released_delta(C0, K, R, w)
    close(released, ref.memit_delta(C0, K, R, lam=0.1 * w), tolerance)
    assert ref.memorization(released, K, R) > 1e-4  # so it does not hold the equality


def test_least_violation_at_full_rank_is_equality() -> None:
    C0, K, R, tolerance = problem(70)
    close(ref.least_violation_delta(C0, K, R), ref.emmet_delta(C0, K, R), tolerance)


@pytest.mark.parametrize("case", ["repeated key", "more facts than dimensions"])
def test_least_violation_is_the_limit_of_a_vanishing_ridge(case: str) -> None:
    C0, K, R, _ = problem(80, condition=10.0)
    if case == "repeated key":
        K = torch.cat([K, K[:, :1]], dim=1)
    else:
        K = randn(D_IN, D_IN + 3, seed=83)
    R = randn(D_OUT, K.shape[1], seed=84)
    delta = ref.least_violation_delta(C0, K, R)
    # The limit is approached in proportion to lam, by lam over the smallest eigenvalue of G that
    # is not zero; below that stands the noise of an inverse with condition largest / lam.
    lam = 1e-6
    eigenvalues = torch.linalg.eigvalsh(K.T @ torch.linalg.inv(C0) @ K)
    smallest = eigenvalues[eigenvalues > 1e-10 * eigenvalues.max()].min()
    noise = D_IN * EPS * torch.linalg.cond(lam * C0 + K @ K.T)
    near = ref.memit_delta(C0, K, R, lam)
    close(near, delta, (2 * lam / smallest + noise).item())
    # Least squares: what is left over is orthogonal to every row that Delta K could have.
    left_over = (delta @ K - R) @ K.T
    assert left_over.abs().max() <= 1e3 * EPS / smallest * (R @ K.T).abs().max()


# --------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE with GPT-2's splitting rule; its words break into several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(params=["gpt2", "gptj"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three layers, width 24, inner width 96, weights large enough for every part to matter."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 300, "n_positions": 96, "n_embd": 24}
    size |= {"n_layer": 3, "n_head": 2, "n_inner": 96, "initializer_range": 0.3}
    size |= {"bos_token_id": 0, "eos_token_id": 0}
    if request.param == "gpt2":
        net: Any = GPT2LMHeadModel(GPT2Config(**size))
    else:
        monkeypatch.setattr(GPTJAttention, "_attn", ref.attention_in_float64)
        net = GPTJForCausalLM(GPTJConfig(**size, rotary_dim=4))
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return net.double().eval()


def state(model: Any) -> tuple[dict[str, Tensor], list[bool], list[int], list[Any]]:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [parameter.grad for parameter in model.parameters()],
    )


def assert_untouched(model: Any, before: tuple[Any, ...]) -> None:
    now = state(model)
    assert all(torch.equal(now[0][name], tensor) for name, tensor in before[0].items())
    assert now[1:] == before[1:]


def covariance(model: Any, layer: int) -> Tensor:
    """Any well-conditioned C0 will do here: too few tokens give none of full rank."""
    d_in = 96
    A = randn(d_in, 4 * d_in, seed=layer)
    return A @ A.T / (4 * d_in)


# --------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("template", "subject", "prefix", "suffix"),
    [
        ("{} is located in the city of", "The Eiffel Tower", "", ""),
        ("{} is located in the city of", "The Eiffel Tower", "The old man went. ", ""),
        ("The mother tongue of {} is", "Marie Curie", "", ""),
        ("The mother tongue of {}", "Marie Curie", "", ""),  # the subject ends the prompt
        ("{}'s mother tongue is", "Marie Curie", "", ""),
        ("{}, the city of", "Zürich", "", " and so on"),
        ("In {} one finds", "Malmö", "", ""),  # its last character is two tokens here
        ("In {}ö one finds", "Malmö", "", ""),  # the same character goes on
        ("{{}} and {0} near {}", "Rome", "", ""),  # braces that str.format would choke on
        ("{} is", "東京", "", ""),
        ("{}", "Rome", "", ""),
        ("{}", "Marie Curi", "", "e is"),  # what follows takes the last letters into one token
    ],
)
def test_subject_last_token_against_offsets(
    tokenizer: Any, template: str, subject: str, prefix: str, suffix: str
) -> None:
    if template.startswith("{{}}"):
        # The first "{}" counts, wherever it stands.
        expected_text = "{" + subject + "} and {0} near {}"
    else:
        expected_text = prefix + template.replace("{}", subject) + suffix
    start = expected_text.index(subject, len(prefix))
    offsets = tokenizer(expected_text, return_offsets_mapping=True)["offset_mapping"]
    overlapping = [
        i
        for i, (first, last) in enumerate(offsets)
        if first < start + len(subject) and last > start
    ]
    found = ref.subject_last_token(tokenizer, template, subject, prefix, suffix)
    assert found == overlapping[-1]
    text, position = ref.filled_in(tokenizer, template, subject, prefix + "{}" + suffix)
    assert (text, position) == (expected_text, found)


def test_target_is_a_suffix_of_the_tokens(tokenizer: Any) -> None:
    ids, n_prompt = ref.ids_with_target(tokenizer, "Rome is the capital of", "Italy")
    assert tokenizer.decode(ids[n_prompt:]) == " Italy"
    assert len(ids) - n_prompt > 1  # so a mean over target tokens is a mean
    with pytest.raises(ValueError, match="suffix"):
        ref.ids_with_target(lambda text: {"input_ids": [len(text)]}, "Rome is", "Italian")
    with pytest.raises(ValueError, match=r"no \{\}"):
        ref.filled_in(tokenizer, "Rome is", "Rome", "{}")
    with pytest.raises(ValueError, match=r"no \{\}"):
        ref.filled_in(tokenizer, "{} is", "Rome", "The old man.")


# --------------------------------------------------------------------------- keys, C0


def activation_outputs(model: Any, layer: int, ids: list[int]) -> Tensor:
    """The keys read where they arise, behind the MLP's nonlinearity."""
    seen: list[Tensor] = []
    handle = model.transformer.h[layer].mlp.act.register_forward_hook(
        lambda _, args, output: seen.append(output[0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def test_second_moment(model: Any, tokenizer: Any) -> None:
    before = state(model)
    texts = [TEXTS[0], "", TEXTS[1][:40]]
    encoded = [ids for text in texts if (ids := tokenizer(text)["input_ids"])]
    X = torch.cat([activation_outputs(model, 1, ids) for ids in encoded])
    close(ref.second_moment(model, tokenizer, texts, 1), X.T @ X / len(X), CLOSE)
    X = torch.cat([activation_outputs(model, 1, ids[:5]) for ids in encoded])
    assert len(X) == 10
    C0 = ref.second_moment(model, tokenizer, texts, 1, max_tokens_per_text=5)
    close(C0, X.T @ X / 10, CLOSE)
    assert_untouched(model, before)


def test_key_means(model: Any, tokenizer: Any) -> None:
    template, subject, _ = FACTS[0]
    singles = []
    for context in CONTEXTS:
        text = context.replace("{}", template.replace("{}", subject))
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        end = text.index(subject) + len(subject)
        position = max(i for i, (first, last) in enumerate(offsets) if first < end)
        singles.append(activation_outputs(model, 1, tokenizer(text)["input_ids"])[position])
    bare, one, other = singles

    def key(contexts: list[str], mean: str) -> Tensor:
        return ref.key(model, tokenizer, template, subject, contexts, 1, mean)

    close(key(CONTEXTS, "typed"), bare / 2 + (one + other) / 4, CLOSE)
    close(key(CONTEXTS, "plain"), (bare + one + other) / 3, CLOSE)
    close(key(["{}"], "typed"), bare, CLOSE)
    close(key(CONTEXTS[1:], "plain"), (one + other) / 2, CLOSE)
    assert (key(CONTEXTS, "typed") - key(CONTEXTS, "plain")).norm() > 1e-3 * bare.norm()
    with pytest.raises(ValueError, match="bare"):
        key(CONTEXTS[1:], "typed")


# --------------------------------------------------------------------------- adding delta


def delta_as_weights(
    model: Any, layer: int, ids: list[int], position: int, delta: Tensor
) -> Tensor:
    """A change of W0 that adds `delta` at one position of `ids` and nothing at the others.

    With as few tokens as inner dimensions, the keys of all positions are independent, so the
    change can be asked to be `delta` on one of them and zero on the rest.
    """
    K = activation_outputs(model, layer, ids).T
    R = torch.zeros(len(delta), len(ids), dtype=torch.float64)
    R[:, position] = delta
    return R @ torch.linalg.pinv(K)


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_delta_is_added_where_it_should_be_and_nowhere_else(
    model: Any, tokenizer: Any, site: str
) -> None:
    before = state(model)
    text, position = ref.filled_in(tokenizer, *FACTS[1][:2], CONTEXTS[1])
    ids = tokenizer(text)["input_ids"]
    assert 0 < position < len(ids) - 1
    module = ref.site_module(model, 1, site)
    delta = randn(24, seed=1)
    _, plain = ref.module_at_work(model, module, ids)
    with torch.no_grad():
        plain_logits = ref.logits_of(model, ids)
        with ref.delta_added(module, position, delta):
            _, moved = ref.module_at_work(model, module, ids)  # a later hook sees the sum
            moved_logits = ref.logits_of(model, ids)
        with ref.delta_added(module, position, torch.zeros_like(delta)):
            assert torch.equal(ref.logits_of(model, ids), plain_logits)
    expected = torch.zeros_like(plain)
    expected[position] = delta
    close(moved - plain, expected, CLOSE)
    assert torch.equal(moved[:position], plain[:position])
    assert torch.equal(moved[position + 1 :], plain[position + 1 :])
    assert torch.equal(moved_logits[:position], plain_logits[:position])
    assert ((moved_logits - plain_logits)[position:].abs().amax(dim=1) > 1e-6).all()
    assert_untouched(model, before)

    # The same through the weights, in the layout that the module itself multiplies by.
    Delta = delta_as_weights(model, 1, ids, position, delta)
    with ref.edited(model, {1: Delta}), torch.no_grad():
        condition = torch.linalg.cond(activation_outputs(model, 1, ids)).item()
        close(ref.logits_of(model, ids), moved_logits, CLOSE * condition)
    assert_untouched(model, before)


# --------------------------------------------------------------------------- values


def cross_entropy(model: Any, ids: list[int], n_prompt: int) -> float:
    """Mean over the tokens behind the prompt. (The model's own `loss` is computed in float32.)"""
    labels = torch.tensor(ids)
    labels[:n_prompt] = -100
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100).item()


def loss_by_another_route(
    model: Any, tokenizer: Any, fact: ref.Fact, layer: int, site: str, delta: Tensor
) -> tuple[float, float, float]:
    """The three terms, with delta written into the weights and PyTorch's losses."""
    template, subject, target = fact

    def edited_for(ids: list[int], position: int) -> Any:
        return ref.edited(model, {layer: delta_as_weights(model, layer, ids, position, delta)})

    losses = []
    for context in CONTEXTS:
        prompt = context.replace("{}", template.replace("{}", subject))
        position = ref.subject_last_token(tokenizer, template, subject, context.removesuffix("{}"))
        ids = tokenizer(f"{prompt} {target}")["input_ids"]
        with edited_for(ids, position):
            losses.append(cross_entropy(model, ids, len(tokenizer(prompt)["input_ids"])))

    ids = tokenizer(f"{subject} is a")["input_ids"]
    last = len(tokenizer(subject)["input_ids"]) - 1
    with torch.no_grad():
        initial = model(input_ids=torch.tensor([ids])).logits[0, last].softmax(0)
        with edited_for(ids, last):
            current = model(input_ids=torch.tensor([ids])).logits[0, last].softmax(0)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(current), torch.distributions.Categorical(initial)
    ).item()

    bare = tokenizer(template.replace("{}", subject))["input_ids"]
    position = ref.subject_last_token(tokenizer, template, subject)
    # In both families hidden_states[layer + 1] is the block's output, except after the last.
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([bare]), output_hidden_states=True).hidden_states
    init = hidden[layer + 1][0, position]
    if site == "mlp":
        projection = ref.down_projection(model, layer)
        weight = (
            projection.weight if isinstance(projection, torch.nn.Linear) else projection.weight.T
        )
        init = weight @ activation_outputs(model, layer, bare)[position] + projection.bias
    squared = (init**2).sum().item()
    return sum(losses) / 3, 0.0625 * divergence, 0.5 * math.sqrt((delta**2).sum()) / squared


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_loss_terms(model: Any, tokenizer: Any, site: str) -> None:
    delta = randn(24, seed=2)
    for fact in FACTS:
        terms = ref.value_loss(model, tokenizer, *fact, CONTEXTS, 1, site, delta)
        expected = loss_by_another_route(model, tokenizer, fact, 1, site, delta)
        assert min(expected) > 1e-4  # each term is there to be compared
        for term, by_route in zip(terms, expected, strict=True):
            # The keys of a few dozen tokens in 96 dimensions have conditions up to some 350.
            assert term.item() == pytest.approx(by_route, rel=1e3 * CLOSE)


def test_loss_at_the_start(model: Any, tokenizer: Any) -> None:
    delta = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    target, kl, decay = ref.value_loss(model, tokenizer, *FACTS[0], CONTEXTS, 1, "block", delta)
    assert (kl.item(), decay.item()) == (0.0, 0.0)
    prompts = [c.replace("{}", "The Eiffel Tower is located in the city of") for c in CONTEXTS]
    logprobs = [ref.mean_target_logprob(model, tokenizer, p, "Rome") for p in prompts]
    assert target.item() == pytest.approx(-sum(logprobs) / 3, rel=CLOSE)
    (gradient,) = torch.autograd.grad(target + kl + decay, [delta])
    assert gradient.isfinite().all()  # ||delta|| has a kink at zero; its slope counts as 0 there


def adam_by_hand(
    gradient_at: Callable[[Tensor], Tensor], steps: int, lr: float, largest: float
) -> Tensor:
    """Kingma and Ba (2015), algorithm 1, with the projection after every step."""
    delta = torch.zeros(24, dtype=torch.float64)
    m, v = torch.zeros_like(delta), torch.zeros_like(delta)
    for t in range(1, steps + 1):
        g = gradient_at(delta)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        delta = delta - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        delta = delta * min(1.0, largest / delta.norm().item())
    return delta


@pytest.mark.parametrize("clamp", [0.05, 50.0])
def test_value_loop(model: Any, tokenizer: Any, clamp: float) -> None:
    before = state(model)
    fact, decay = FACTS[0], 0.01  # in a random model the usual decay outweighs the target
    found = ref.value(
        model, tokenizer, *fact, CONTEXTS, 1, "block",
        steps=6, lr=0.5, clamp=clamp, weight_decay=decay, stop_loss=-1.0,
    )  # fmt: skip
    assert_untouched(model, before)
    init = ref.site_value(model, tokenizer, fact[0], fact[1], 1, "block")
    assert torch.equal(found.target_init, init)
    assert found.steps == len(found.losses) == 6
    assert torch.equal(found.z, init + found.delta)

    def loss_at(delta: Tensor) -> Tensor:
        return torch.stack(
            ref.value_loss(model, tokenizer, *fact, CONTEXTS, 1, "block", delta, decay)
        ).sum()

    def gradient_at(delta: Tensor) -> Tensor:
        delta = delta.clone().requires_grad_()
        return torch.autograd.grad(loss_at(delta), [delta])[0]

    # Six losses, five updates. A rounding in a small gradient is divided by that gradient.
    largest = clamp * init.norm().item()
    close(found.delta, adam_by_hand(gradient_at, 5, 0.5, largest), 1e3 * CLOSE)
    assert found.delta.norm() <= largest * (1 + 4 * EPS)
    held = found.delta.norm().item() >= largest * (1 - 4 * EPS)
    assert held == (clamp == 0.05)  # one case ends on the sphere, one inside
    assert loss_at(found.delta).item() == pytest.approx(found.losses[-1], rel=CLOSE)
    assert found.losses[-1] < found.losses[0]


def test_gradient_of_the_loss(model: Any, tokenizer: Any) -> None:
    delta, step = randn(24, seed=3).requires_grad_(), 1e-5

    def loss_at(delta: Tensor) -> Tensor:
        terms = ref.value_loss(model, tokenizer, *FACTS[0], CONTEXTS, 1, "block", delta)
        return torch.stack(terms).sum()

    (gradient,) = torch.autograd.grad(loss_at(delta), [delta])
    way = randn(24, seed=4)
    with torch.no_grad():
        slope = (loss_at(delta + step * way) - loss_at(delta - step * way)) / (2 * step)
    # A central difference misses by step^2 and by the roundings of the loss over the step.
    close(slope, gradient @ way, (step**2 + CLOSE / step) / abs(gradient @ way).item())


def test_value_stops(model: Any, tokenizer: Any) -> None:
    def run(**loop: Any) -> ref.Value:
        return ref.value(model, tokenizer, *FACTS[1], CONTEXTS[:1], 0, "mlp", lr=0.1, **loop)

    once = run(steps=1)
    assert (once.steps, once.delta.norm().item()) == (1, 0.0)  # no update after the last loss
    reference_run = run(steps=6, clamp=4.0, stop_loss=-1.0)
    # Just above the third loss: stops there, before its update; the total counts, not its parts.
    third = reference_run.losses[2]
    stopped = run(steps=6, clamp=4.0, stop_loss=third * (1 + 1e-9))
    assert stopped.losses == reference_run.losses[:3]
    assert not torch.equal(stopped.delta, reference_run.delta)
    assert torch.equal(stopped.delta, run(steps=3, clamp=4.0, stop_loss=-1.0).delta)
    strictly = run(steps=6, clamp=4.0, stop_loss=third)
    assert strictly.losses == reference_run.losses[:4]
    module = ref.site_module(model, 0, "mlp")
    text, position = ref.filled_in(tokenizer, *FACTS[1][:2], "{}")
    _, outputs = ref.module_at_work(model, module, tokenizer(text)["input_ids"])
    assert torch.equal(once.target_init, outputs[position])


def test_training_mode_is_refused(model: Any, tokenizer: Any) -> None:
    model.train()
    with pytest.raises(ValueError, match="evaluation"):
        ref.mean_target_logprob(model, tokenizer, "Rome is", "Italy")


# --------------------------------------------------------------------------- whole edits

LOOP: dict[str, Any] = {"steps": 3, "lr": 0.1}


def block_outputs(model: Any, tokenizer: Any, layer: int) -> Tensor:
    """h of both facts' bare prompts (d_out x 2), as the model stands."""
    columns = [ref.site_value(model, tokenizer, t, s, layer, "block") for t, s, _ in FACTS]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_single_layer_edit(model: Any, tokenizer: Any, site: str) -> None:
    before = state(model)
    C0 = covariance(model, 1)
    edit = ref.edit_delta_single_layer(
        model, tokenizer, FACTS, 1, C0, ref.emmet_delta, CONTEXTS, site=site, **LOOP
    )
    assert_untouched(model, before)
    for column, (template, subject, target) in enumerate(FACTS):
        v = ref.value(model, tokenizer, template, subject, target, CONTEXTS, 1, site, **LOOP)
        close(edit.R[:, column], v.delta, CLOSE)  # z - h is delta itself
        k = ref.key(model, tokenizer, template, subject, CONTEXTS, 1, "typed")
        assert torch.equal(edit.K[:, column], k)
    assert torch.equal(edit.delta, ref.emmet_delta(C0, edit.K, edit.R))
    # Written into the weights, whichever way round they lie, it moves k*'s value by R.
    projection = ref.down_projection(model, 1)
    with torch.no_grad():
        old = projection(edit.K.T.unsqueeze(0))[0].T
        with ref.edited(model, {1: edit.delta}):
            new = projection(edit.K.T.unsqueeze(0))[0].T
    condition = torch.linalg.cond(C0) * torch.linalg.cond(edit.K.T @ torch.linalg.inv(C0) @ edit.K)
    close(new - old, edit.R, CLOSE * condition.item())


def test_edited_model_puts_out_z(model: Any, tokenizer: Any) -> None:
    # With the bare context alone, k* is the very key the edited model meets.
    old = block_outputs(model, tokenizer, 1)
    edit = ref.edit_delta_single_layer(
        model, tokenizer, FACTS, 1, covariance(model, 1), ref.emmet_delta, ["{}"], **LOOP
    )
    old_logprob = ref.mean_target_logprob(
        model, tokenizer, "The Eiffel Tower is located in the city of", "Rome"
    )
    with ref.edited(model, {1: edit.delta}):
        close(block_outputs(model, tokenizer, 1), old + edit.R, 1e3 * CLOSE)
        assert old_logprob < ref.mean_target_logprob(
            model, tokenizer, "The Eiffel Tower is located in the city of", "Rome"
        )


def test_multi_layer_edit(model: Any, tokenizer: Any) -> None:
    before = state(model)
    layers = [0, 1, 2]
    C0 = {layer: covariance(model, layer) for layer in layers}
    edits = ref.edit_deltas_multi_layer(
        model, tokenizer, FACTS, [2, 0, 1], C0, ref.emmet_delta, ["{}"], **LOOP
    )
    assert_untouched(model, before)
    assert list(edits) == layers
    zs = [ref.value(model, tokenizer, *fact, ["{}"], 2, "block", **LOOP).z for fact in FACTS]
    Z = torch.stack(zs, dim=1)
    applied: dict[int, Tensor] = {}
    for layers_left, layer in zip((3, 2, 1), layers, strict=True):
        with ref.edited(model, applied):
            K = torch.stack(
                [ref.key(model, tokenizer, t, s, ["{}"], layer) for t, s, _ in FACTS], dim=1
            )
            residual = Z - block_outputs(model, tokenizer, 2)
        assert torch.equal(edits[layer].K, K)
        close(edits[layer].R, residual / layers_left, CLOSE)
        if layer:  # recomputed: keys moved with the layers below, which hold less than asked
            base = [ref.key(model, tokenizer, t, s, ["{}"], layer) for t, s, _ in FACTS]
            assert (K - torch.stack(base, dim=1)).norm() > 1e-3 * K.norm()
        applied[layer] = edits[layer].delta
    # Equality for the last share, which is all that is left: the last block puts out z.
    with ref.edited(model, applied):
        close(block_outputs(model, tokenizer, 2), Z, 1e3 * CLOSE)
    assert_untouched(model, before)


def test_other_divisors_and_solvers(model: Any, tokenizer: Any) -> None:
    C0 = {layer: covariance(model, layer) for layer in (0, 1)}

    def first_layer(**how: Any) -> ref.LayerEdit:
        def solve(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
            return ref.memit_delta(C0, K, R, lam=2.0)

        return ref.edit_deltas_multi_layer(
            model, tokenizer, FACTS, [0, 1], C0, solve, CONTEXTS, **how, **LOOP
        )[0]

    linear, root = first_layer(), first_layer(divisor=math.sqrt)
    close(root.R, linear.R * math.sqrt(2), 4 * EPS)
    assert torch.equal(linear.delta, ref.memit_delta(C0[0], linear.K, linear.R, lam=2.0))


def test_one_by_one(model: Any, tokenizer: Any) -> None:
    before = state(model)
    how: dict[str, Any] = {"mean": "plain", "site": "mlp", "clamp": 4.0} | LOOP
    C0 = covariance(model, 1)
    args = (1, C0, ref.emmet_delta, CONTEXTS)
    first, second = ref.edit_deltas_one_by_one(model, tokenizer, FACTS, *args, **how)
    assert_untouched(model, before)
    assert torch.equal(first.delta, ref.edit_delta_single_layer(
        model, tokenizer, FACTS[:1], *args, **how).delta)  # fmt: skip
    close(first.delta, ref.rome_delta(C0, first.K[:, 0], first.R[:, 0]), CLOSE)
    with ref.edited(model, {1: first.delta}):
        again = ref.edit_delta_single_layer(model, tokenizer, FACTS[1:], *args, **how)
    assert torch.equal(second.delta, again.delta)
    alone = ref.edit_delta_single_layer(model, tokenizer, FACTS[1:], *args, **how)
    assert (second.delta - alone.delta).norm() > 1e-3 * alone.delta.norm()


def test_weights_come_back_after_a_failure(model: Any, tokenizer: Any) -> None:
    before = state(model)
    calls = []

    def fails_at_the_second_layer(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no solution")
        return ref.emmet_delta(C0, K, R)

    C0 = {layer: covariance(model, layer) for layer in (0, 1)}
    with pytest.raises(RuntimeError, match="no solution"):
        ref.edit_deltas_multi_layer(
            model, tokenizer, FACTS, [0, 1], C0, fails_at_the_second_layer, ["{}"], **LOOP
        )
    assert_untouched(model, before)


def test_runs_in_float32_and_rounds_the_weight_once(model: Any, tokenizer: Any) -> None:
    model.float()
    C0 = covariance(model, 1)
    edit = ref.edit_delta_single_layer(
        model, tokenizer, FACTS, 1, C0, ref.emmet_delta, CONTEXTS, **LOOP
    )
    assert edit.delta.dtype == torch.float64
    weight = ref.down_projection(model, 1).weight
    old = weight.detach().clone()
    oriented = edit.delta if isinstance(model, GPTJForCausalLM) else edit.delta.T
    with ref.edited(model, {1: edit.delta}):
        assert torch.equal(weight, (old.double() + oriented).float())
    assert torch.equal(weight, old)


# --------------------------------------------------------------------------- metrics


def test_mean_target_logprob(model: Any, tokenizer: Any) -> None:
    prompt, target = "Rome is the capital of", "Italy"
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    loss = cross_entropy(model, ids, len(tokenizer(prompt)["input_ids"]))
    found = ref.mean_target_logprob(model, tokenizer, prompt, target)
    assert found == pytest.approx(-loss, rel=CLOSE)


def test_scores_by_hand() -> None:
    pairs = [(-1.0, -2.0), (-2.0, -2.0), (-3.0, -2.0), (-0.5, -0.6)]  # won, tied, lost, won
    assert ref.efficacy(pairs) == 0.5
    assert ref.neighbourhood(pairs) == 0.25  # the tie fails here too
    probabilities = [(math.log(0.6), math.log(0.2)), (math.log(0.1), math.log(0.3))]
    assert ref.efficacy_magnitude(probabilities) == pytest.approx(0.1, rel=4 * EPS)
    # Two records of different size: 1 and 1/3 average to 2/3, not to 2/4.
    records = [[(-1.0, -2.0)], [(-1.0, -2.0), (-2.0, -1.0), (-2.0, -1.0)]]
    assert ref.by_record(records, ref.efficacy) == pytest.approx(2 / 3, rel=4 * EPS)
    assert ref.harmonic_mean(1.0, 0.5, 0.25) == pytest.approx(3 / 7, rel=4 * EPS)
    assert ref.harmonic_mean(1.0, 1.0, 0.0) == 0.0
    # MEMIT's published row for 10,000 edits of GPT-J (arXiv 2210.07229): S = 85.8.
    assert round(ref.harmonic_mean(98.9, 88.6, 73.7), 1) == 85.8
