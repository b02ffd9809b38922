"""Other papers' methods, written out as their released code has them: float64, fact by fact.

As in `reference.py`, nothing comes from the library. Columns are facts; C0 is the *mean* of k k^T.
Names of variables are those of the code that is transcribed; where that stores the transpose of a
weight, so does this, up to the return value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from reference import (
    Fact,
    LayerEdit,
    Solver,
    Value,
    add_to_weight,
    delta_added,
    down_projection,
    edited,
    encode,
    filled_in,
    ids_with_target,
    key,
    logits_of,
    mlp_of,
    module_at_work,
    site_module,
    site_value,
    value,
    value_loss,
)
from torch import Tensor
from torch.linalg import inv


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


# --------------------------------------------------------------------------- AlphaEdit


def get_project(cov: Tensor, threshold: float) -> Tensor:
    """jianghoucheng/AlphaEdit f5248d3, experiments/evaluate.py: get_project."""
    U, S, _ = torch.linalg.svd(cov.double(), full_matrices=False)
    small_singular_indices = (threshold > S).nonzero(as_tuple=True)[0]
    return U[:, small_singular_indices] @ U[:, small_singular_indices].T


def alphaedit_delta(P: Tensor, cache_c: Tensor, K: Tensor, R: Tensor, L2: float) -> Tensor:
    """jianghoucheng/AlphaEdit f5248d3, AlphaEdit_main.py; cache_c is the sum of K_p K_p^T."""
    upd_matrix = torch.linalg.solve(P @ (K @ K.T + cache_c) + L2 * eye(len(K)), P @ K @ R.T)
    return upd_matrix.T


def alphaedit_as_printed(P: Tensor, Kp: Tensor, K: Tensor, R: Tensor, L2: float) -> Tensor:
    """arXiv 2410.02355, eq. 14, with L2 for its 1: R K^T P (Kp Kp^T P + K K^T P + L2 I)^-1."""
    return R @ K.T @ P @ inv(Kp @ Kp.T @ P + K @ K.T @ P + L2 * eye(len(K)))


def hard_hard_delta(P: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """min ||Delta||^2 with Delta = Delta P and Delta K = R: R (K^T P K)^-1 K^T P."""
    return R @ inv(K.T @ P @ K) @ K.T @ P


# --------------------------------------------------------------------------- ROME's three codes


def rome_code(
    model: Any, tokenizer: Any, fact: Fact, layer: int, C0: Tensor, contexts: Sequence[str],
    which: str, **loop: Any,
) -> Tensor:  # fmt: skip
    """Delta of one fact by kmeng01/rome 0874014 or scalable-model-editing/rebuilding-rome 4095d04.

    compute_u and compute_v. which: "original", "enable_random_prefix_keys" (r-ROME) or
    "enable_prompt_keys" (p-ROME).
    """
    template, subject, target_new = fact
    found = value(model, tokenizer, template, subject, target_new, contexts, layer, "mlp", **loop)
    target_init, delta = found.target_init, found.delta

    def repr_at_word(context: str) -> tuple[Tensor, Tensor]:
        """Input and output of the rewritten module at the subject's last token."""
        text, position = filled_in(tokenizer, template, subject, context)
        module = down_projection(model, layer)
        inputs, outputs = module_at_work(model, module, encode(tokenizer, text))
        return inputs[position], outputs[position]

    each = [repr_at_word(context) for context in contexts]
    cur_repr = (
        repr_at_word("{}")[0]
        if which == "enable_prompt_keys"
        else torch.stack([one[0] for one in each]).mean(0)
    )
    u = inv(C0.double()) @ cur_repr
    left_vector = u / u.norm()
    if which == "enable_random_prefix_keys":
        cur_input = torch.stack([one[0] for one in each]).mean(0)
        cur_output = torch.stack([one[1] for one in each]).mean(0)
        target = target_init + delta
    else:
        cur_input, cur_output = repr_at_word("{}")
        target = (target_init if which == "original" else cur_output) + delta
    right_vector = (target - cur_output) / torch.dot(cur_input, left_vector)
    return (left_vector.unsqueeze(1) @ right_vector.unsqueeze(0)).T


# --------------------------------------------------------------------------- forward replay


def replay_deltas(
    model: Any, tokenizer: Any, facts: Sequence[Fact], layers: Sequence[int],
    C0: Mapping[int, Tensor], solve: Solver, contexts: Sequence[str], **loop: Any,
) -> dict[int, LayerEdit]:  # fmt: skip
    """jugechengzi/FE 4de0dba: precompute_z.py "firstforward", then algs/memit/FE-memit_main.py."""
    site = "block"
    zs_all: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for template, subject, target in facts:
        found = value(
            model, tokenizer, template, subject, target, contexts, layers[0], site, **loop
        )
        zs_all[layers[0]].append(found.z)
        text, position = filled_in(tokenizer, template, subject, "{}")
        with delta_added(site_module(model, layers[0], site), position, found.delta):
            for layer in layers[1:]:
                module = site_module(model, layer, site)
                output = module_at_work(model, module, encode(tokenizer, text))[1]
                zs_all[layer].append(output[position].detach())
    edits: dict[int, LayerEdit] = {}
    with edited(model, {}, layers):
        for layer in layers:
            ks, rs = [], []
            for (template, subject, _), z in zip(facts, zs_all[layer], strict=True):
                ks.append(key(model, tokenizer, template, subject, contexts, layer, "typed"))
                rs.append(z - site_value(model, tokenizer, template, subject, layer, site))
            K, R = torch.stack(ks, dim=1), torch.stack(rs, dim=1)
            edits[layer] = LayerEdit(K, R, solve(C0[layer], K, R))
            add_to_weight(model, layer, edits[layer].delta)
    return edits


# --------------------------------------------------------------------------- ENCORE


def encore_value(
    model: Any, tokenizer: Any, fact: Fact, contexts: Sequence[str], layer: int, prob_cutoff: float,
    site: str = "block", steps: int = 20, lr: float = 0.5, clamp: float = 0.75,
    weight_decay: float = 0.5, kl_weight: float = 0.0625, stop_loss: float = 0.05,
) -> Value:  # fmt: skip
    """scalable-model-editing/knowledge-editing-regularization 6e3ba9a, encore/compute_z.py."""
    template, subject, target_new = fact
    module = site_module(model, layer, site)
    target_init = site_value(model, tokenizer, template, subject, layer, site)
    delta = torch.zeros_like(target_init).requires_grad_()
    opt = torch.optim.Adam([delta], lr=lr)
    losses: list[float] = []
    correct_counter = 0
    for it in range(steps):
        terms = value_loss(
            model, tokenizer, template, subject, target_new, contexts, layer, site, delta,
            weight_decay, kl_weight,
        )  # fmt: skip
        loss = terms[0] + terms[1] + terms[2]
        losses.append(loss.item())

        num_correct, targets, probability = 0, 0, []
        for number, context in enumerate(contexts):
            text, position = filled_in(tokenizer, template, subject, context)
            ids, n_prompt = ids_with_target(tokenizer, text, target_new)
            with delta_added(module, position, delta.detach()), torch.no_grad():
                log_probs = logits_of(model, ids).log_softmax(dim=-1)
            nll = [-log_probs[i - 1, ids[i]] for i in range(n_prompt, len(ids))]
            probability.append(torch.exp(-torch.stack(nll).mean()))
            if number == 0:  # log_probs[1:], rewriting_targets[1:]
                continue
            for i in range(n_prompt, len(ids)):
                targets += 1
                num_correct += int(log_probs[i - 1].argmax() == ids[i])
        if prob_cutoff < 0 and num_correct == targets:
            correct_counter += 1
            if correct_counter == abs(prob_cutoff):
                break
        if prob_cutoff > 0 and torch.stack(probability).mean().item() > prob_cutoff:
            break
        if losses[-1] < stop_loss:
            break
        if it == steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        opt.step()
        with torch.no_grad():
            max_norm = clamp * target_init.norm()
            if delta.norm() > max_norm:
                delta[...] = delta * max_norm / delta.norm()
    return Value(delta.detach(), target_init, losses, len(losses))


def encore_delta(
    C0: Tensor, cache: Tensor, K: Tensor, R: Tensor, weight: float, update_norm_lambda: float
) -> Tensor:
    """The same, encore/encore_main.py; cache is the sum of the K K^T of earlier batches."""
    cov = C0.double() * weight
    cov = cov + update_norm_lambda * eye(len(cov)) + cache
    adj_k = torch.linalg.solve(cov + K @ K.T, K)
    return R @ adj_k.T


# --------------------------------------------------------------------------- norm anchors


def nas_delta(
    model: Any, tokenizer: Any, fact: Fact, layer: int, delta: Tensor, mean_norm: float
) -> Tensor:
    """What is added to the block instead of delta: SasyaTitech/NAS 5acab48, NAS/compute_z.py."""
    template, subject, _ = fact
    text, position = filled_in(tokenizer, template, subject, "{}")
    ids = encode(tokenizer, text)
    v0 = module_at_work(model, mlp_of(model, layer), ids)[1][position]
    target_init = site_value(model, tokenizer, template, subject, layer, "block")
    res_pre_mlp = target_init - v0
    v_star = delta + v0
    if mean_norm > 0 and v_star.norm().item() > 2 * mean_norm:
        v_star = v0
    else:
        v_star = v_star * (float(mean_norm) / (v_star.norm() + 1e-10))
    return (res_pre_mlp + v_star) - target_init


# --------------------------------------------------------------------------- LyapLock


def lyaplock(
    W0: Tensor, C0: Tensor, batches: Sequence[tuple[Tensor, Tensor]], weight: float, alpha: float
) -> list[Tensor]:
    """The weights after each batch of (K, resid): wpwpwpyo/LyapLock c5e6186, lyaplock_main.py.

    With its own settings of Z, a and zmax (experiments/evaluate.py): '1sqrtD', '1_sqrtD', '1sqrtD'.
    """

    def compute_fro_by_trace(W: Tensor) -> float:
        return float((k0k0_T @ W.T @ W).trace() - 2 * (v0k0_T @ W.T).trace() + v0v0_T.trace())

    k0k0_T, v0k0_T, v0v0_T = C0, W0 @ C0, W0 @ C0 @ W0.T
    W, made = W0, []
    Z = a = zmax = D_base = None
    pre_v = torch.zeros_like(W0)
    pre_k = torch.zeros_like(C0)
    for cnt, (layer_ks, resid) in enumerate(batches):
        if cnt == 0:
            left = resid @ layer_ks.T + weight * (v0k0_T - W @ k0k0_T)
            A = layer_ks @ layer_ks.T + weight * k0k0_T
        else:
            left = resid @ layer_ks.T + a * Z * weight * (v0k0_T - W @ k0k0_T)
            left = left + (pre_v - W @ pre_k)
            A = layer_ks @ layer_ks.T + a * Z * weight * k0k0_T + pre_k
        W = W + left @ torch.linalg.solve(A, eye(len(A))).T
        if D_base is None:
            D_base = compute_fro_by_trace(W)
            a = 1.0 / (alpha * D_base) ** 0.5
            Z = zmax = (alpha * D_base) ** 0.5
        Z = max(Z + a * (compute_fro_by_trace(W) - alpha * D_base), zmax)
        pre_v = pre_v + W @ layer_ks @ layer_ks.T
        pre_k = pre_k + layer_ks @ layer_ks.T
        made.append(W)
    return made


# --------------------------------------------------------------------------- UltraEdit


class RunningMeanStd:
    """XiaojieGu/UltraEdit 0beb222, nets.py."""

    def __init__(self, size: int) -> None:
        self.n = torch.zeros(1, dtype=torch.float64)
        self.mean, self.var, self.std = (torch.zeros(size, dtype=torch.float64) for _ in range(3))

    def update(self, x: Tensor) -> None:
        n = self.n + x.shape[0]
        delta = x.mean(0) - self.mean
        self.mean = self.mean + x.shape[0] * delta / n
        self.var = self.var + x.shape[0] * x.var(0) + self.n * x.shape[0] * delta.pow(2) / n
        self.std = (self.var / (n - 1 + torch.finfo(x.dtype).eps)).sqrt()
        self.n = n

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.std + torch.finfo(x.dtype).eps)


def ultraedit_shift(
    normalizer: RunningMeanStd, hidden_states: Tensor, values_grad: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """param_shift^T (d_out x d_in), and v_feature: editor/ultraedit.py, predict_param_shifts.

    hidden_states (E x d_in), values_grad (E x d_out): rows are facts there. The keys that the
    system is solved with are as they were read; only those that scale the gradient are normalised.
    """
    d_in, d_out = hidden_states.shape[1], values_grad.shape[1]
    z_feature = normalizer(torch.cat((hidden_states, values_grad), -1))
    hidden_states_hat, pesudo_values_hat = z_feature.split([d_in, d_out], -1)
    coeffs = -lr * (hidden_states_hat * hidden_states_hat).sum(-1).unsqueeze(-1)
    v_feature = coeffs * pesudo_values_hat
    mat = hidden_states.T @ hidden_states + eye(d_in)
    return torch.linalg.solve(mat, hidden_states.T @ v_feature).T, v_feature


# --------------------------------------------------------------------------- UCE


def uce_weight(
    w_old: Tensor,
    edited: Sequence[tuple[Tensor, Tensor]],
    preserved: Sequence[Tensor],
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> Tensor:
    """rohitgandikota/unified-concept-editing 28c81ed, trainscripts/uce_sd_erase.py: UCE.

    w_old (d_out x d_text); edited: (c_i, v_i_star) of each concept, preserved: c_i. What a
    preserved concept gives is taken from the old weight there, as v_i_star.
    """
    w_old = w_old.double()
    mat1 = lamb * w_old
    mat2 = lamb * eye(w_old.shape[1])
    for c, v_star in edited:
        c_i, v_i_star = c.double()[:, None], v_star.double()[:, None]
        mat1 = mat1 + erase_scale * (v_i_star @ c_i.T)
        mat2 = mat2 + erase_scale * (c_i @ c_i.T)
    for c in preserved:
        c_i = c.double()[:, None]
        v_i_star = w_old @ c_i
        mat1 = mat1 + preserve_scale * (v_i_star @ c_i.T)
        mat2 = mat2 + preserve_scale * (c_i @ c_i.T)
    return mat1 @ inv(mat2)


def uce_debias_targets(
    w_old: Tensor, c: Tensor, attributes: Sequence[Tensor], direction_scales: Sequence[Tensor]
) -> Tensor:
    """uce_sd_debias.py: v_i_star of one concept, to which each round adds in place."""
    v_i_star = w_old.double() @ c.double()
    for direction_scale in direction_scales:
        for i, concept in enumerate(attributes):
            v_i_star = v_i_star + direction_scale[i] * (w_old.double() @ concept.double())
    return v_i_star
