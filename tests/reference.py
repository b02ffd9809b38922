"""The equations and the recipe, written out slowly: what the library is held against.

Nothing here comes from the library. One fact at a time, whole sequences, no padding, no cache,
explicit inverses; whatever is not the model's own forward pass is in float64. Columns are facts:
C0 (d_in x d_in), K (d_in x E), R (d_out x E), Delta (d_out x d_in), added to the weight W0 of a
down-projection. C0 is the *mean* of k k^T, so that a preservation cost is a cost per token.

Sources: ROME (arXiv 2202.05262), MEMIT (arXiv 2210.07229), EMMET (arXiv 2403.14236), r-ROME
(arXiv 2403.07175) and the code released with them (github.com/kmeng01/rome, kmeng01/memit,
scalable-model-editing/unified-model-editing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import inv

# --------------------------------------------------------------------------- the objective


def preservation(delta: Tensor, C0: Tensor) -> float:
    """tr(Delta C0 Delta^T): mean squared change of a preserved key's value."""
    return torch.trace(delta @ C0 @ delta.T).item()


def memorization(delta: Tensor, K: Tensor, R: Tensor) -> float:
    """||Delta K - R||_F^2: how far the new facts are from being stored."""
    return ((delta @ K - R) ** 2).sum().item()


def rome_delta(C0: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """ROME, equality for one fact: r k^T C0^-1 / (k^T C0^-1 k).   k: (d_in,), r: (d_out,)."""
    C0, k, r = C0.double(), k.double(), r.double()
    return torch.outer(r, k) @ inv(C0) / (k @ inv(C0) @ k)


def emmet_delta(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """EMMET, equality for a batch: R (K^T C0^-1 K)^-1 K^T C0^-1."""
    C0, K, R = C0.double(), K.double(), R.double()
    return R @ inv(K.T @ inv(C0) @ K) @ K.T @ inv(C0)


def memit_delta(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """MEMIT, least squares: R K^T (lam C0 + K K^T)^-1.   lam multiplies the *mean* C0."""
    C0, K, R = C0.double(), K.double(), R.double()
    return R @ K.T @ inv(lam * C0 + K @ K.T)


def emmet_released_delta(C0: Tensor, K: Tensor, R: Tensor, w: float, alpha: float = 0.1) -> Tensor:
    """EMMET as its code was released: C = w C0, and alpha I on the Gram matrix when E > 1."""
    C, K, R = w * C0.double(), K.double(), R.double()
    E = K.shape[1]
    D = K.T @ inv(C) @ K
    if E > 1:
        D = D + alpha * torch.eye(E, dtype=torch.float64, device=D.device)
    return R @ inv(D) @ K.T @ inv(C)


def least_violation_delta(C0: Tensor, K: Tensor, R: Tensor, rtol: float = 1e-10) -> Tensor:
    """The limit of MEMIT for lam -> 0, whatever the rank of K: R G^+ K^T C0^-1, G = K^T C0^-1 K.

    Eigenvalues of G below `rtol` times the largest count as zero. G squares the condition of the
    whitened keys, so keys with a condition between 1e5 and 1e8 are neither here nor there.
    """
    C0, K, R = C0.double(), K.double(), R.double()
    G = K.T @ inv(C0) @ K
    return R @ torch.linalg.pinv(G, rtol=rtol, hermitian=True) @ K.T @ inv(C0)


def lagrangian_delta(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """min 1/2 tr(Delta C0 Delta^T) subject to Delta K = R, from its Karush-Kuhn-Tucker system.

    The Lagrangian's gradient in Delta is Delta C0 - M K^T, with multipliers M (d_out x E). Both
    conditions, transposed, are one linear system, solved for all rows of Delta at once:

        [ C0   -K ] [ Delta^T ]   [  0  ]
        [ K^T   0 ] [   M^T   ] = [ R^T ]
    """
    C0, K, R = C0.double(), K.double(), R.double()
    d_in, E = K.shape
    upper = torch.cat([C0, -K], dim=1)
    lower = torch.cat([K.T, torch.zeros(E, E, dtype=torch.float64)], dim=1)
    right_hand_side = torch.cat([torch.zeros(d_in, R.shape[0], dtype=torch.float64), R.T])
    return torch.linalg.solve(torch.cat([upper, lower]), right_hand_side)[:d_in].T


def preserving_delta(
    C0: Tensor, K: Tensor, R: Tensor, lam: float, Kp: Tensor, weight: float | str
) -> Tensor:
    """The update that preserves the values of the keys Kp (d_in x n) as well.

    A number: R K^T (lam C0 + weight Kp Kp^T + K K^T)^-1, or EMMET's with C0 + weight Kp Kp^T for
    lam = 0. "exact": subject to Delta Kp = 0, by its Karush-Kuhn-Tucker system,

        [ lam C0 + K K^T   -Kp ] [ Delta^T ]   [ K R^T ]
        [      Kp^T          0 ] [   M^T   ] = [   0   ]
    """
    C0, K, R, Kp = C0.double(), K.double(), R.double(), Kp.double()
    if isinstance(weight, float) and lam:
        return R @ K.T @ inv(lam * C0 + weight * Kp @ Kp.T + K @ K.T)
    if isinstance(weight, float):
        return emmet_delta(C0 + weight * Kp @ Kp.T, K, R)
    zeros = torch.zeros(len(R), Kp.shape[1], dtype=torch.float64)
    if not lam:
        return lagrangian_delta(C0, torch.cat([K, Kp], dim=1), torch.cat([R, zeros], dim=1))
    upper = torch.cat([lam * C0 + K @ K.T, -Kp], dim=1)
    lower = torch.cat([Kp.T, torch.zeros(Kp.shape[1], Kp.shape[1], dtype=torch.float64)], dim=1)
    return torch.linalg.solve(torch.cat([upper, lower]), torch.cat([K @ R.T, zeros.T]))[: len(C0)].T


# --------------------------------------------------------------------------- the model


#: What the second matrix of an MLP is called: in GPT-2 and GPT-Neo, GPT-J, Llama and most others,
#: GPT-NeoX and Falcon, Phi.
SECOND = ("c_proj", "fc_out", "down_proj", "dense_4h_to_h", "fc2")


def block_of(model: Any, layer: int) -> Any:
    """One block: the only list of modules in a model is that of its blocks."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)[layer]


def mlp_of(model: Any, layer: int) -> Any:
    """The MLP of a block. OPT has no module for it, so its last matrix stands for it."""
    block = block_of(model, layer)
    return block.mlp if hasattr(block, "mlp") else block.fc2


def down_projection(model: Any, layer: int) -> Any:
    """The second matrix of a block's MLP."""
    mlp = mlp_of(model, layer)
    return next((getattr(mlp, name) for name in SECOND if hasattr(mlp, name)), mlp)


def site_module(model: Any, layer: int, site: str) -> Any:
    """The module whose output is the value: the whole block (MEMIT, EMMET) or its MLP (ROME)."""
    return {"block": block_of, "mlp": mlp_of}[site](model, layer)


def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Logits (tokens x vocabulary) of one sequence on its own."""
    if model.training:
        raise ValueError("the model must be in evaluation mode: dropout would change every value")
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].double()


def hidden_of(output: Any) -> Tensor:
    """The hidden states (1 x tokens x d) in a module's output: blocks of GPT-J return tuples.

    OPT's MLPs are given the tokens without a dimension for rows.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden[None] if hidden.ndim == 2 else hidden


def module_at_work(model: Any, module: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """What goes into `module` and what comes out (tokens x width) while the model reads `ids`."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(
        # copies: what comes out of Falcon's MLP is changed in place later
        lambda _, args, output: seen.append(
            (hidden_of(args)[0].double().clone(), hidden_of(output)[0].double().clone())
        )
    )
    try:
        with torch.no_grad():
            logits_of(model, ids)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def delta_added(module: Any, position: int, delta: Tensor) -> Iterator[None]:
    """Inside, `delta` is added to what `module` puts out at one position of one sequence."""

    def add(_module: Any, _args: Any, output: Any) -> Any:
        hidden = hidden_of(output).clone()
        hidden[0, position] = hidden[0, position] + delta.to(hidden.dtype)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        return hidden.view(output.shape)

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def add_to_weight(model: Any, layer: int, delta: Tensor) -> None:
    """W0 + Delta. A Linear holds its weight as (out x in), GPT-2's Conv1D as (in x out)."""
    projection = down_projection(model, layer)
    oriented = delta if isinstance(projection, torch.nn.Linear) else delta.T
    with torch.no_grad():
        projection.weight.copy_(projection.weight.double() + oriented)


@contextmanager
def edited(model: Any, deltas: Mapping[int, Tensor], layers: Sequence[int] = ()) -> Iterator[None]:
    """Inside, the model carries `deltas` (layer -> Delta). Afterwards its weights there, and in
    any further `layers` that the caller edits inside, are what they were before."""
    weights = [down_projection(model, layer).weight for layer in {*deltas, *layers}]
    saved = [weight.detach().clone() for weight in weights]
    try:
        for layer, delta in deltas.items():
            add_to_weight(model, layer, delta)
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)


def attention_in_float64(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """What `GPTJAttention._attn` must be for comparisons below 1e-7.

    GPT-J computes its attention weights in float32, whatever its own type.
    """
    weights = (query @ key.transpose(-1, -2) / self.scale_attn + attention_mask).softmax(dim=-1)
    return weights @ value, weights


# --------------------------------------------------------------------------- text and tokens


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def subject_last_token(
    tokenizer: Any, prompt_template: str, subject: str, prefix: str = "", suffix: str = ""
) -> int:
    """Where the subject ends in prefix + filled-in prompt + suffix, counted in tokens.

    Found by decoding ever more tokens until they spell the text up to the subject's end. A token
    that ends within a character spells a replacement mark there, so it never counts too early.
    A tokenizer may put a blank in front of every text (as atlas's does); it is passed over.
    """
    head, _, tail = prompt_template.partition("{}")
    text, wanted = prefix + head + subject + tail + suffix, prefix + head + subject
    ids = encode(tokenizer, text)
    for count in range(1, len(ids) + 1):
        spelled = tokenizer.decode(
            ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if spelled.removeprefix(" ").startswith(wanted.removeprefix(" ")):
            return count - 1
    raise ValueError(f"the tokens of {text!r} do not spell it")


def filled_in(tokenizer: Any, template: str, subject: str, context: str) -> tuple[str, int]:
    """The prompt in its context, and the index of the subject's last token in it."""
    prefix, braces, suffix = context.partition("{}")
    head, template_braces, tail = template.partition("{}")
    if not (braces and template_braces):
        raise ValueError(f"no {{}} in the template {template!r} or in the context {context!r}")
    position = subject_last_token(tokenizer, template, subject, prefix, suffix)
    return prefix + head + subject + tail + suffix, position


def ids_with_target(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], int]:
    """Tokens of prompt + " " + target, encoded together, and how many of them are the prompt's."""
    prompt_ids, ids = encode(tokenizer, prompt), encode(tokenizer, prompt + " " + target)
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise ValueError(f"the target {target!r} is not a suffix of the tokens of {prompt!r}")
    return ids, len(prompt_ids)


# --------------------------------------------------------------------------- C0, k*, v*


def keys_of_text(model: Any, ids: list[int], layer: int) -> Tensor:
    """Inputs of the down-projection (tokens x d_in) for one sequence on its own."""
    return module_at_work(model, down_projection(model, layer), ids)[0]


def second_moment(
    model: Any, tokenizer: Any, texts: Sequence[str], layer: int,
    max_tokens_per_text: int | None = None, skip: int = 0,
) -> Tensor:  # fmt: skip
    """C0: mean of k k^T over every token of every text but the first `skip`, each read alone."""
    total, count = torch.tensor(0.0), 0
    for text in texts:
        ids = encode(tokenizer, text)[:max_tokens_per_text]
        for k in keys_of_text(model, ids, layer)[skip:] if ids else ():
            total, count = total + torch.outer(k, k), count + 1
    return total / count


def second_moment_behind_norm(
    model: Any, tokenizer: Any, texts: Sequence[str], layer: int
) -> Tensor:
    """Mean of k k^T / rms(W0 k)^2 over every token of every text: as a norm behind the MLP counts.

    rms(m)^2 is the mean square of the entries of m, and the small number that such a norm adds.
    """
    total, count = torch.tensor(0.0), 0
    for text in texts:
        ids = encode(tokenizer, text)
        keys, values = module_at_work(model, down_projection(model, layer), ids)
        for k, m in zip(keys, values, strict=True):
            rms_squared = (m**2).sum() / len(m) + model.config.rms_norm_eps
            total, count = total + torch.outer(k, k) / rms_squared, count + 1
    return total / count


def key(
    model: Any, tokenizer: Any, template: str, subject: str,
    contexts: Sequence[str], layer: int, mean: str = "typed",
) -> Tensor:  # fmt: skip
    """k* (d_in,): input of the down-projection at the subject's last token, averaged.

    "typed" (MEMIT, EMMET): the mean within the bare prompt and within the prefixed ones, then the
    mean of the two. "plain" (ROME): the mean over all contexts.
    """
    bare: list[Tensor] = []
    prefixed: list[Tensor] = []
    for context in contexts:
        text, position = filled_in(tokenizer, template, subject, context)
        k = keys_of_text(model, encode(tokenizer, text), layer)[position]
        (bare if context == "{}" else prefixed).append(k)
    if mean == "plain":
        return torch.stack(bare + prefixed).mean(dim=0)
    if mean != "typed" or len(bare) != 1:
        raise ValueError(f'mean="typed" takes the bare context once: {mean=}, {len(bare)} times')
    return bare[0] if not prefixed else 0.5 * bare[0] + 0.5 * torch.stack(prefixed).mean(dim=0)


def site_value(
    model: Any, tokenizer: Any, template: str, subject: str, layer: int, site: str
) -> Tensor:
    """h (d_out,): the site's output at the subject's last token of the bare prompt."""
    text, position = filled_in(tokenizer, template, subject, "{}")
    module = site_module(model, layer, site)
    return module_at_work(model, module, encode(tokenizer, text))[1][position]


def value_loss(
    model: Any, tokenizer: Any, template: str, subject: str, target: str,
    contexts: Sequence[str], layer: int, site: str, delta: Tensor,
    weight_decay: float = 0.5, kl_weight: float = 0.0625, kl_template: str = "{} is a",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The three terms of the loss at one `delta` (d_out,), each with its weight.

    `delta` is added at the subject's last token of every prompt, the KL prompt included.
    target: mean over contexts of the mean over target tokens of -log p.
    kl:     kl_weight * KL(current || initial) of the next token after the subject's last token of
            the KL prompt; initial = the model without delta.
    decay:  weight_decay * ||delta|| / ||target_init||^2, the first norm not squared.
    """
    module = site_module(model, layer, site)

    per_context = []
    for context in contexts:
        text, position = filled_in(tokenizer, template, subject, context)
        ids, n_prompt = ids_with_target(tokenizer, text, target)
        with delta_added(module, position, delta):
            # the last token is predicted, not read
            log_p = logits_of(model, ids[:-1]).log_softmax(dim=-1)
        per_token = [-log_p[i - 1, ids[i]] for i in range(n_prompt, len(ids))]
        per_context.append(torch.stack(per_token).mean())

    text, position = filled_in(tokenizer, kl_template, subject, "{}")
    ids = encode(tokenizer, text)
    initial = logits_of(model, ids)[position].detach().log_softmax(dim=-1)
    with delta_added(module, position, delta):
        current = logits_of(model, ids)[position].log_softmax(dim=-1)
    kl = (current.exp() * (current - initial)).sum()

    target_init = site_value(model, tokenizer, template, subject, layer, site)
    decay = delta.norm() / target_init.norm() ** 2
    return torch.stack(per_context).mean(), kl_weight * kl, weight_decay * decay


@dataclass(frozen=True)
class Value:
    """An optimised value: the site shall put out z = target_init + delta.

    `steps` losses were computed; each but the last was followed by an update of delta.
    """

    delta: Tensor
    target_init: Tensor
    losses: list[float]
    steps: int

    @property
    def z(self) -> Tensor:
        return self.target_init + self.delta


def value(
    model: Any, tokenizer: Any, template: str, subject: str, target: str,
    contexts: Sequence[str], layer: int, site: str = "block",
    steps: int = 20, lr: float = 0.5, clamp: float = 0.75, weight_decay: float = 0.5,
    kl_weight: float = 0.0625, stop_loss: float = 0.05, kl_template: str = "{} is a",
) -> Value:  # fmt: skip
    """v* by the released loop: loss, stop?, Adam, projection onto the ball around target_init.

    `steps` losses are computed at most, so `steps - 1` updates are made at most. Defaults are
    those of MEMIT and EMMET for GPT-2 XL; ROME has site "mlp" and clamp 4.
    """
    target_init = site_value(model, tokenizer, template, subject, layer, site)

    def loss_of(delta: Tensor) -> Tensor:
        terms = value_loss(
            model, tokenizer, template, subject, target, contexts, layer, site, delta,
            weight_decay, kl_weight, kl_template,
        )  # fmt: skip
        return terms[0] + terms[1] + terms[2]

    return descended(loss_of, target_init, steps, lr, clamp, stop_loss)


def descended(
    loss_of: Callable[[Tensor], Tensor], target_init: Tensor,
    steps: int, lr: float, clamp: float, stop_loss: float,
) -> Value:  # fmt: skip
    """The released loop for any loss of delta, as `value` describes it."""
    delta = torch.zeros_like(target_init).requires_grad_()
    adam = torch.optim.Adam([delta], lr=lr)
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of(delta)
        losses.append(loss.item())
        if losses[-1] < stop_loss:
            break
        if step == steps - 1:
            break
        # Only delta gets a gradient: the model's parameters stay untouched.
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
        with torch.no_grad():
            largest = clamp * target_init.norm()
            if delta.norm() > largest:
                delta.mul_(largest / delta.norm())
    return Value(delta.detach(), target_init, losses, len(losses))


def merged_value(
    model: Any, tokenizer: Any, facts: Sequence[tuple[str, str, str]],
    contexts: Sequence[str], layer: int, site: str = "block",
    steps: int = 20, lr: float = 0.5, clamp: float = 0.75, weight_decay: float = 0.5,
    kl_weight: float = 0.0625, stop_loss: float = 0.05,
) -> Value:  # fmt: skip
    """One v* for all facts (template, subject, target) of a subject (MEMIT-Merge, 2502.07322).

    One delta, by the loop of `value`: its loss is the mean of the facts' target terms, the KL term
    (one subject has one KL prompt) and the decay. target_init is the mean of the facts'.
    """
    inits = [site_value(model, tokenizer, template, subject, layer, site)
             for template, subject, _ in facts]  # fmt: skip
    target_init = torch.stack(inits).mean(dim=0)

    def loss_of(delta: Tensor) -> Tensor:
        targets, kls = [], []
        for template, subject, target in facts:
            terms = value_loss(
                model, tokenizer, template, subject, target, contexts, layer, site, delta,
                weight_decay, kl_weight,
            )  # fmt: skip
            targets.append(terms[0])
            kls.append(terms[1])
        decay = weight_decay * delta.norm() / target_init.norm() ** 2
        return torch.stack(targets).mean() + kls[0] + decay

    return descended(loss_of, target_init, steps, lr, clamp, stop_loss)


# --------------------------------------------------------------------------- whole edits

Fact = tuple[str, str, str]  # template with {}, subject, target without its leading blank
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # (C0, K, R) -> Delta


@dataclass(frozen=True)
class LayerEdit:
    """What was solved at one layer. R is this layer's share of the residual."""

    K: Tensor
    R: Tensor
    delta: Tensor


def edit_deltas_multi_layer(
    model: Any, tokenizer: Any, facts: Sequence[Fact], layers: Sequence[int],
    C0: Mapping[int, Tensor], solve: Solver, contexts: Sequence[str],
    mean: str = "typed", site: str = "block", divisor: Callable[[int], float] = float, **loop: Any,
) -> dict[int, LayerEdit]:  # fmt: skip
    """One batch over several layers, ascending; the model is left as it was found.

    z is optimised once, at the last layer, on the model as given (`loop`: settings of `value`).
    At each layer the keys and the residual z - h (h at the *last* layer, bare prompt) are read off
    the model as edited so far. The share is the residual over `divisor(layers left, this one
    included)`; MEMIT divides by that number itself.
    """
    layers = sorted(layers)
    last = layers[-1]
    zs = [
        value(model, tokenizer, template, subject, target, contexts, last, site, **loop).z
        for template, subject, target in facts
    ]
    edits: dict[int, LayerEdit] = {}
    with edited(model, {}, layers):
        for i, layer in enumerate(layers):
            ks, rs = [], []
            for (template, subject, _), z in zip(facts, zs, strict=True):
                ks.append(key(model, tokenizer, template, subject, contexts, layer, mean))
                rs.append(z - site_value(model, tokenizer, template, subject, last, site))
            K = torch.stack(ks, dim=1)
            R = torch.stack(rs, dim=1) / divisor(len(layers) - i)
            edits[layer] = LayerEdit(K, R, solve(C0[layer], K, R))
            add_to_weight(model, layer, edits[layer].delta)
    return edits


def edit_deltas_merged(
    model: Any, tokenizer: Any, groups: Sequence[Sequence[Fact]], layers: Sequence[int],
    C0: Mapping[int, Tensor], solve: Solver, contexts: Sequence[str],
    mean: str = "typed", site: str = "block", divisor: Callable[[int], float] = float, **loop: Any,
) -> dict[int, LayerEdit]:  # fmt: skip
    """`edit_deltas_multi_layer` with one value, one key and one residual for each of the groups.

    The key of a group is the mean of its facts' keys, its residual z minus the mean of their h.
    """
    layers = sorted(layers)
    last = layers[-1]
    zs = [merged_value(model, tokenizer, group, contexts, last, site, **loop).z for group in groups]
    edits: dict[int, LayerEdit] = {}
    with edited(model, {}, layers):
        for i, layer in enumerate(layers):
            columns_of_K, columns_of_R = [], []
            for group, z in zip(groups, zs, strict=True):
                ks, hs = [], []
                for template, subject, _ in group:
                    ks.append(key(model, tokenizer, template, subject, contexts, layer, mean))
                    hs.append(site_value(model, tokenizer, template, subject, last, site))
                columns_of_K.append(sum(ks) / len(group))
                columns_of_R.append(z - sum(hs) / len(group))
            K = torch.stack(columns_of_K, dim=1)
            R = torch.stack(columns_of_R, dim=1) / divisor(len(layers) - i)
            edits[layer] = LayerEdit(K, R, solve(C0[layer], K, R))
            add_to_weight(model, layer, edits[layer].delta)
    return edits


def edit_delta_single_layer(
    model: Any, tokenizer: Any, facts: Sequence[Fact], layer: int,
    C0: Tensor, solve: Solver, contexts: Sequence[str], *args: Any, **kwargs: Any,
) -> LayerEdit:  # fmt: skip
    """One batch at one layer: the same with a single layer, where R is delta itself."""
    return edit_deltas_multi_layer(
        model, tokenizer, facts, [layer], {layer: C0}, solve, contexts, *args, **kwargs
    )[layer]


def edit_deltas_one_by_one(
    model: Any, tokenizer: Any, facts: Sequence[Fact], layer: int, *args: Any, **kwargs: Any
) -> list[LayerEdit]:
    """ROME with several facts: each is edited into the model that carries those before it.

    C0 stays the base model's. Further arguments are those of `edit_delta_single_layer`; the
    model is left as it was found, and the sum of the Deltas is the whole edit.
    """
    edits: list[LayerEdit] = []
    with edited(model, {}, [layer]):
        for fact in facts:
            edits.append(edit_delta_single_layer(model, tokenizer, [fact], layer, *args, **kwargs))
            add_to_weight(model, layer, edits[-1].delta)
    return edits


# --------------------------------------------------------------------------- fine-tuning


def fine_tuned(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], layer: int,
    *, norm: float | None, lr: float, steps: int, weight_decay: float = 0.0, batch: int = 128,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """Delta of the released fine-tuning (kmeng01/rome, baselines/ft), and the loss of each pass.

    Adam on the weight itself, cut to norm around what it was, a batch below 1e-2 passed over. The
    target's tokens are predicted one behind the other. The model is left changed.
    """
    weight = down_projection(model, layer).weight
    before = weight.detach().clone()
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = parameter is weight
    optimizer = torch.optim.Adam([weight], lr=lr, weight_decay=weight_decay)
    history = []
    for _ in range(steps):
        of_pass = []
        for first in range(0, len(pairs), batch):
            optimizer.zero_grad()
            chosen = pairs[first : first + batch]
            losses = []
            for prompt, target in chosen:
                ids, start = ids_with_target(tokenizer, prompt, target)
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                each = torch.stack([log_p[i - 1, ids[i]] for i in range(start, len(ids))])
                losses.append(-each.mean())
            loss = torch.stack(losses).mean()
            of_pass += [one.item() for one in losses]
            if loss.item() >= 1e-2:
                loss.backward()
                optimizer.step()
            if norm is not None:
                with torch.no_grad():
                    weight[...] = torch.clamp(weight, min=before - norm, max=before + norm)
        history.append(sum(of_pass) / len(of_pass))
        if history[-1] < 1e-2:
            break
    delta = (weight - before).detach()
    return (
        delta if isinstance(down_projection(model, layer), torch.nn.Linear) else delta.T
    ), history


# --------------------------------------------------------------------------- the metrics


def mean_target_logprob(model: Any, tokenizer: Any, prompt: str, target: str) -> float:
    """Mean over the target's tokens of log p(token | prompt, the target's tokens before it)."""
    ids, n_prompt = ids_with_target(tokenizer, prompt, target)
    with torch.no_grad():
        log_p = logits_of(model, ids).log_softmax(dim=-1)
    return torch.stack([log_p[i - 1, ids[i]] for i in range(n_prompt, len(ids))]).mean().item()


Pair = tuple[float, float]  # mean log-probability of the new object, of the true object


def efficacy(pairs: Sequence[Pair]) -> float:
    """ES over rewrite prompts, PS over paraphrases: share with P[new] > P[true]; a tie fails."""
    return sum(new > true for new, true in pairs) / len(pairs)


def neighbourhood(pairs: Sequence[Pair]) -> float:
    """NS over neighbours: share with P[true] > P[new]; a tie fails."""
    return sum(true > new for new, true in pairs) / len(pairs)


def efficacy_magnitude(pairs: Sequence[Pair]) -> float:
    """EM, PM: mean of P[new] - P[true], P = exp(mean log-probability). NM is its negative."""
    return sum(math.exp(new) - math.exp(true) for new, true in pairs) / len(pairs)


def by_record(records: Sequence[Sequence[Pair]], score: Callable[[Sequence[Pair]], float]) -> float:
    """A score as the papers average it: within each record, then over records."""
    return sum(score(pairs) for pairs in records) / len(records)


def harmonic_mean(*scores: float) -> float:
    """S = HM(ES, PS, NS); 0 if any of them is 0."""
    if any(score == 0 for score in scores):
        return 0.0
    return len(scores) / sum(1 / score for score in scores)


# --------------------------------------------------------------------------- hook layers


@dataclass
class Hook:
    """One hook layer of COMEBA-HK (arXiv 2403.05330; Syon-Li/CoachHook at 0f741a9).

    W_h (d_out x d_in), C_accu = lam C0 + sum of K K^T, the threshold, and how it acts: "validated"
    (W_h x where the gate opens), "temporary" (always W_h x), or "off".
    """

    W_h: Tensor
    C_accu: Tensor
    threshold: float
    acts: str = "off"


def moved_by(hook: Hook, W0: Tensor, x: Tensor) -> Tensor:
    """M (tokens): how far W_h x is from W0 x."""
    return torch.stack([(hook.W_h @ k - W0 @ k).norm() for k in x.double()])


def z_scores(M: Tensor) -> Tensor:
    """(M - mean) / std over the tokens of the sequence."""
    return (M - M.mean()) / M.std()


@contextmanager
def hooked(model: Any, hooks: Mapping[int, Hook], gate: str) -> Iterator[None]:
    """Inside, one sequence at a time is read with the hooks as they are then."""

    def act(layer: int) -> Callable[..., Any]:
        W0 = weight_of(model, layer)

        def hook(_module: Any, args: Any, output: Tensor) -> Tensor:
            one, x = hooks[layer], args[0][0]
            scores = moved_by(one, W0, x)
            if gate == "published":
                scores = z_scores(scores)
            new = output.clone()
            for token in range(len(x)):
                opens = one.acts == "temporary" or scores[token] >= one.threshold
                if one.acts != "off" and opens:
                    new[0, token] = output[0, token] + (one.W_h - W0) @ x[token].double()
            return new

        return hook

    handles = [down_projection(model, i).register_forward_hook(act(i)) for i in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weight_of(model: Any, layer: int) -> Tensor:
    """W (d_out x d_in)."""
    projection = down_projection(model, layer)
    weight = projection.weight.detach().double()
    return weight.clone() if isinstance(projection, torch.nn.Linear) else weight.T.clone()


def hook_batch(
    model: Any, tokenizer: Any, facts: Sequence[Fact], hooks: dict[int, Hook], gate: str,
    contexts: Sequence[str], preserved: Mapping[int, Tensor], q: float, **loop: Any,
) -> None:  # fmt: skip
    """One batch of COMEBA-HK, into `hooks` ({layer: Hook}, W_h = W0 and C_accu = lam C0 at first).

    gate: "published", or "causal" with the 1 - q quantile of M over `preserved` keys
    ({layer: (tokens x d_in)}) as the threshold, made anew when W_h changes.
    """
    layers = sorted(hooks)
    last = layers[-1]
    with hooked(model, hooks, gate):
        for hook in hooks.values():
            hook.acts = "validated"
        zs = [
            value(model, tokenizer, template, subject, target, contexts, last, **loop).z
            for template, subject, target in facts
        ]
        for hook in hooks.values():
            hook.acts = "temporary"
        for i, layer in enumerate(layers):
            hook, ks, rs = hooks[layer], [], []
            for (template, subject, _), z in zip(facts, zs, strict=True):
                ks.append(key(model, tokenizer, template, subject, contexts, layer))
                rs.append(z - site_value(model, tokenizer, template, subject, last, "block"))
            K, R = torch.stack(ks, dim=1), torch.stack(rs, dim=1) / (len(layers) - i)
            hook.W_h = hook.W_h + R @ K.T @ inv(hook.C_accu + K @ K.T)
            hook.C_accu = hook.C_accu + K @ K.T
            if gate == "causal":
                M = moved_by(hook, weight_of(model, layer), preserved[layer])
                hook.threshold = torch.quantile(M, 1 - q).item()
            hook.acts = "validated"
        for hook in hooks.values():
            hook.acts = "off"
    if gate == "published":
        for layer, hook in hooks.items():
            for template, subject, _ in facts:
                text, _ = filled_in(tokenizer, template, subject, "{}")
                x = keys_of_text(model, encode(tokenizer, text), layer)
                best = z_scores(moved_by(hook, weight_of(model, layer), x)).max().item()
                hook.threshold = min(hook.threshold, best)
