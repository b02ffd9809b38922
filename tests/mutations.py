"""Planted faults: each must turn a test red.

    python tests/mutations.py                 # all, two at a time
    python tests/mutations.py 3 7             # some
    python tests/mutations.py --chapters 3 7  # against chapters of the book instead of tests

Every fault is one replacement in one module of a copy of the package; the tests named beside it
are run on the copy and must fail. A fault that survives is a hole in the tests. With `--chapters`
it is the chapters about what the fault breaks that are run, without any cache, and one of their
cells must fail or show something else. Either takes many minutes and is not part of `make test`;
`test_mutations.py`, which is, sees to it that every fault still fits the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """In `module`, `right` (which occurs once) becomes `wrong`; one of `tests` must notice."""

    what: str
    module: str
    right: str
    wrong: str
    tests: tuple[str, ...]


OBJECTIVE = ("tests/test_objective.py",)
METRICS = ("tests/test_metrics.py",)
KEYS = ("tests/test_recipe.py", "-k", "test_keys and not atlas")
BEGINNINGS = ("tests/test_tokenizers.py", "-k", "sampled or separator or from_nothing or at_a_sink")
VALUES = ("tests/test_values.py", "-k", "test_values and not atlas")
WHOLE = ("tests/test_recipe.py", "-k", "test_whole_edits and not atlas")
EDITS = ("tests/test_edits.py",)
FINGERPRINTS = ("tests/test_fingerprints.py", "tests/test_ledger.py")
STATISTICS = (
    "tests/test_key_statistics.py",
    "-k",
    "second_moment or interrupted or batching or first_token",
)
BEHIND_NORM = ("tests/test_behind_norm.py",)
EVALUATION = ("tests/test_evaluation.py",)
STREAMED = ("tests/test_streamed.py", "-k", "file or interrupted or known or refused")
GENERATION = ("tests/test_generation.py",)
BAD_INPUT = ("tests/test_bad_files.py", "tests/test_bad_statistics.py")
GGUF = ("tests/test_gguf.py", "-k", "one_file_only or something_else or left_over")
TUNING = ("tests/test_fine_tuning.py", "-k", "released or stops or norm")
SUGGESTING = ("tests/test_suggesting.py", "-k", "not atlas")
GRIDS = ("tests/test_grid.py", "-k", "not shell and not killed")
TRACING = ("tests/test_tracing.py", "-k", "one_restoration or noise or averages or some_layers")
FAMILIES = ("tests/test_families.py", "-k", "reference or restoration or noise")
SHARED = ("tests/test_shared_subjects.py",)
HELD = ("tests/test_held.py",)
PAST = ("tests/test_histories.py",)
NAMED = ("tests/test_named.py",)
READ = ("tests/test_facts.py", "-k", "multi_hop or leads_to")
BATCHES = ("tests/test_batches.py",)
REFERENCES = ("tests/test_references.py",)
FORMULAS = ("tests/test_formulas.py",)
PRESETS = ("tests/test_presets.py",)
HOOKS = ("tests/test_hook_layers.py", "-k", "three_batches or by_hand or falls or failed_batch")
HOOKED = ("tests/test_hook_layers.py", "-k", "sample or never_written or in_and_out or false_opens")
RELATIONS = ("tests/test_relations.py", "-k", "not every_family or (every_family and gpt2)")

#: The chapters about what those tests test. How files are damaged, or a model is told from another,
#: is nothing for a book.
CHAPTERS = {
    OBJECTIVE: ("emmet", "memit", "bridge"),
    METRICS: (),
    NAMED: (),
    READ: (),
    KEYS: ("rome", "first_edit"),
    BEGINNINGS: (),
    VALUES: ("values",),
    WHOLE: ("spreading",),
    EDITS: ("first_edit", "rome"),
    FINGERPRINTS: (),
    STATISTICS: ("preserving",),
    BEHIND_NORM: (),
    EVALUATION: ("judging",),
    STREAMED: (),
    GENERATION: (),
    BAD_INPUT: (),
    GGUF: (),
    TRACING: ("locating",),
    TUNING: (),
    SUGGESTING: (),
    GRIDS: (),
    FAMILIES: (),
    SHARED: (),
    HELD: (),
    PAST: (),
    BATCHES: (),
    REFERENCES: (),
    FORMULAS: (),
    PRESETS: (),
    HOOKS: (),
    HOOKED: (),
    RELATIONS: (),
}

FAULTS = (
    Fault("a sign in the residual correction", "objective/solver.py",
          "left = left + times_inverse(R - matmul(left, matmul(right, K)))",
          "left = left - times_inverse(R - matmul(left, matmul(right, K)))", OBJECTIVE),
    Fault("rounding of large batches is not looked at", "objective/solver.py",
          "return _EPS * float(size.norm()) <= _ROUNDING * float(R.norm())", "return True",
          OBJECTIVE),
    Fault("ridge not added", "objective/solver.py",
          "factor = torch.linalg.cholesky(_plus_diagonal(A.mT @ A, lam))",
          "factor = torch.linalg.cholesky(_plus_diagonal(A.mT @ A, 1e-9 * lam))", OBJECTIVE),
    Fault("a transpose in the metric", "objective/metric.py",
          "product: Tensor = solve_triangular(self.factor, rows, upper=False, left=False)",
          "product: Tensor = solve_triangular(self.factor.mT, rows, upper=True, left=False)",
          OBJECTIVE),
    Fault("singular directions kept in the limit", "objective/solver.py",
          "U, s, V = U[:, :rank], s[:rank], Vh[:rank].mT",
          "U, s, V = U, s, Vh.mT", OBJECTIVE),
    Fault("rounding passed on by a tiny ridge", "objective/solver.py",
          "keep = s > rounding", "keep = s > 0", OBJECTIVE),
    Fault("the rank of a batch from d_in, not from the whitened keys", "objective/feasibility.py",
          "tall = n >= E", "tall = d_in >= E", METRICS),
    Fault("keys in dead coordinates go unnoticed", "objective/metric.py",
          "if K.count_nonzero() != whole.count_nonzero():", "if False:", METRICS),
    Fault("dead coordinates of an update out of order", "objective/metric.py",
          "index_copy_(1, self.alive, product)",
          "index_copy_(1, self.alive.flip(0), product)", METRICS),
    Fault("a history weighs its root", "objective/metric.py",
          "K = math.sqrt(weight) * self._own", "K = weight * self._own", METRICS),
    Fault("what a history reaches stays dead", "objective/metric.py",
          "reached = (K != 0).any(dim=1).index_fill_(0, self.alive, True)",
          "reached = (K != K).any(dim=1).index_fill_(0, self.alive, True)", METRICS),
    Fault("plain for typed key mean", "editing/keys.py",
          '"typed": Choice("typed", _typed),',
          '"typed": Choice("typed", lambda count: torch.ones(count).double() / count),', KEYS),
    Fault("bare prompt weighs too much", "editing/keys.py",
          "weights[0] = 0.5 if count > 1 else 1.0",
          "weights[0] = 0.6 if count > 1 else 1.0", KEYS),
    Fault("subject token off by one", "model/prompts.py",
          "subject = _covered(head, prefix + fact.text, start, end)[-1]",
          "subject = max(_covered(head, prefix + fact.text, start, end)[-1] - 1, 0)", KEYS),
    Fault("texts sampled from a bare first word", "model/prompts.py",
          "return (separator,)", "return self.before", BEGINNINGS),
    Fault("the start of a chat for the separator", "model/prompts.py",
          "added[name] for name in SEPARATORS if name in added), first)",
          "added[name] for name in SEPARATORS if name in self.before), first)", BEGINNINGS),
    Fault("a subject at a sink goes unsaid", "editing/sinks.py",
          "if row.subject == 0]", "if row.subject < 0]", BEGINNINGS),
    Fault("the bare prompt is compared with itself", "editing/sinks.py",
          "keys[:, 1:].mean(dim=1)", "keys.mean(dim=1)", BEGINNINGS),
    Fault("what texts are sampled behind is counted", "editing/prefixes.py",
          "len(front) + length - rows.shape[1]", "length - rows.shape[1]", BEGINNINGS),
    Fault("a text from nothing begins with anything", "editing/prefixes.py",
          "not start and missing == length", "not start and missing < 0", BEGINNINGS),
    Fault("first instead of last subject token", "model/prompts.py",
          "subject = _covered(head, prefix + fact.text, start, end)[-1]",
          "subject = _covered(head, prefix + fact.text, start, end)[0]", KEYS),
    Fault("positions not passed from the mask", "model/batching.py",
          "positions = (mask.cumsum(-1) - 1).clamp(min=0)",
          "positions = torch.arange(width).expand(len(rows), width)", KEYS),
    Fault("KL the other way round", "editing/values.py",
          "(current.exp() * (current - initial)).sum(-1)",
          "(initial.exp() * (initial - current)).sum(-1)", VALUES),
    Fault("KL left out", "editing/values.py",
          "method.kl_weight * divergence", "0.0 * divergence", VALUES),
    Fault("norm of delta squared in the decay", "editing/values.py",
          "decay = torch.linalg.vector_norm(delta, dim=1) / batch",
          "decay = delta.square().sum(1) / batch", VALUES),
    Fault("clamp dropped", "editing/values.py",
          "torch.where(size > limit, limit / size, 1.0)",
          "torch.where(size > limit, 1.0, 1.0).expand(len(size))", VALUES),
    Fault("clamp relative to 1", "editing/values.py",
          "limit = method.clamp * batch.target_init.norm(dim=1)",
          "limit = method.clamp * batch.target_init.norm(dim=1) ** 0", VALUES),
    Fault("one update too many", "editing/values.py",
          "if step == method.steps - 1 or not keep:", "if step == method.steps or not keep:",
          VALUES),
    Fault("finished facts go on moving", "editing/values.py",
          "deltas[index].grad = None", "pass", VALUES),
    Fault("no early stop", "editing/values.py",
          "if value >= method.stop_loss and often", "if value >= -1.0 and often", VALUES),
    Fault("sum instead of mean over target tokens", "editing/prepared.py",
          "target_weight.append(1.0 / (len(row.target) * prompts))",
          "target_weight.append(1.0 / prompts)", VALUES),
    Fault("delta at the second suffix token", "editing/values.py",
          "torch.cat([batch.hidden[:, :1] + added[:, None], batch.hidden[:, 1:]], dim=1)",
          "torch.cat([batch.hidden[:, :1], batch.hidden[:, 1:] + added[:, None]], dim=1)",
          VALUES),
    Fault("padding of the prefixes not masked in the cache", "editing/prepared.py",
          '[prefix["attention_mask"].cpu(), (torch.arange(width) < lengths[:, None]).long()]',
          '[torch.ones_like(prefix["attention_mask"].cpu()), '
          "(torch.arange(width) < lengths[:, None]).long()]", VALUES),
    Fault("keys not recomputed at later layers", "editing/layer_loop.py",
          "keys = keys_of(parts, rows, [weight.layer], method.key_mean)[weight.layer]",
          "keys = first_keys", WHOLE),
    Fault("residual not recomputed at later layers", "editing/layer_loop.py",
          "residual = values.delta if is_delta else missing(parts, plan, goal)",
          "residual = values.delta", WHOLE),
    Fault("every layer takes the whole residual", "editing/layer_loop.py",
          "share * residual", "residual", WHOLE),
    Fault("a missing bias: value read without it", "editing/keys.py",
          '{"site": (module, "output")})["site"].double().cpu()\n',
          '{"site": (module, "output")})["site"].double().cpu()\n'
          "    found = found - parts.down(layer).bias.detach().double().cpu()\n", WHOLE),
    Fault("weight orientation", "model/anatomy.py",
          "return delta.T if self.transposed else delta",
          "return delta if self.transposed else delta.T", EDITS),
    Fault("undo by subtraction", "model/ledger.py",
          "new = {weight: self.with_edits(weight, edits) for weight in weights}",
          "new = {one: (self.with_edits(one, edits).double() + 1e-9).to(one.parameter.dtype)"
          " for one in weights}", EDITS),
    Fault("edits summed from the edited weight", "model/ledger.py",
          "        total = self.base_weight(weight).cpu().double()\n        for edit in edits:\n",
          "        total = weight.parameter.detach().cpu().double()\n"
          "        for edit in edits:\n", EDITS),
    Fault("changes by others not noticed", "model/ledger.py",
          "elif tensor_hash(weight) != expected:", "elif False:", EDITS),
    Fault("a model's fingerprint taken from its edited weights", "model/ledger.py",
          "found = model_fingerprint(self.model, self._base)",
          "found = model_fingerprint(self.model, {})", FINGERPRINTS),
    Fault("adapter not marked as transposed", "editing/peft_export.py",
          "fan_in_fan_out=fan_in_fan_out", "fan_in_fan_out=not fan_in_fan_out", EDITS),
    Fault("C0 counts padding", "statistics/collect.py",
          'real = inputs["attention_mask"].bool()',
          'real = torch.ones_like(inputs["attention_mask"]).bool()', STATISTICS),
    Fault("the first word of short texts stays in C0", "statistics/collect.py",
          'real = inputs["position_ids"] > 0',
          "real[:, 0] = False", STATISTICS),
    Fault("one checkpoint for C0 with and without sinks", "statistics/collect.py",
          '"skip_start": self.skip_start,', '"skip_start": False,', STATISTICS),
    Fault("C0 is a sum, not a mean", "statistics/sums.py",
          "first.add_(second).div_(count)", "first.add_(second)", STATISTICS),
    Fault("behind a norm all tokens count alike", "statistics/weighting.py",
          "return keys * gain[:, None].to(keys.dtype)", "return keys", BEHIND_NORM),
    Fault("a token counts by the norm's factor, not by its square", "model/anatomy.py",
          "return torch.rsqrt(mean + self.model.config.rms_norm_eps)",
          "return torch.rsqrt(mean + self.model.config.rms_norm_eps).sqrt()", BEHIND_NORM),
    Fault("statistics that weigh tokens are taken from the cache", "statistics/cache.py",
          'if loaded.source.weighting != "tokens":', "if False:", BEHIND_NORM),
    Fault("a run with one weighting goes on with another", "statistics/collect.py",
          '"weighting": self.weighting,', '"weighting": "tokens",', BEHIND_NORM),
    Fault("statistics do not say how tokens count", "statistics/collect.py",
          "weighting=job.weighting,", 'weighting="tokens",', BEHIND_NORM),
    Fault("a resumed run counts texts twice", "statistics/collect.py",
          "            if done is not None and number < skipped:\n",
          "            if done is not None and number < skipped - 1:\n", STATISTICS),
    Fault("a tie counts as a success", "measuring/questions.py",
          "success = right.logp > wrong.logp", "success = right.logp >= wrong.logp", EVALUATION),
    Fault("neighbours judged like paraphrases", "measuring/questions.py",
          "right, wrong = (true, new) if kind == NEIGHBOUR else (new, true)",
          "right, wrong = (new, true)", EVALUATION),
    Fault("a target read at the end of a longer row", "model/likelihoods.py",
          "end = width - len(hosts[place]) + len(asked[index].ids)", "end = width", EVALUATION),
    Fault("a row read off one that begins otherwise", "model/likelihoods.py",
          "if above[: len(row)] == row else row", "if len(above) > len(row) else row", EVALUATION),
    Fault("half a line stays in a file that is gone on with", "measuring/answer_lines.py",
          "handle.truncate(_whole(path))", "pass", STREAMED),
    Fault("a file of something else is gone on with", "measuring/answer_lines.py",
          "if theirs.get(name) != ours.get(name)", "if name not in theirs", STREAMED),
    Fault("only what is missing is asked again", "measuring/answering.py",
          "for place, (number, _) in enumerate(given)\n",
          "for place, (number, _) in enumerate(given) if not self.lines.has(number, when)\n",
          STREAMED),
    Fault("known facts left out instead of unknown ones", "measuring/answering.py",
          'elif not asked["logp_true"] > asked["logp_new"]:',
          'elif asked["logp_true"] > asked["logp_new"]:', STREAMED),
    Fault("states read from a file that has only one of them", "measuring/report.py",
          "for of in rows.values() for number in of if number in last for row in of[number]",
          "for of in rows.values() for number in of for row in of[number]",
          STREAMED),
    Fault("weights of bigrams and trigrams exchanged", "measuring/generation.py",
          "NGRAMS = {2: 2 / 3, 3: 4 / 3}", "NGRAMS = {2: 4 / 3, 3: 2 / 3}", GENERATION),
    Fault("tokens drawn uniformly", "measuring/generation.py",
          "best = (top.values.double() + gumbel", "best = (0 * top.values.double() + gumbel",
          GENERATION),
    Fault("what follows the end of a text is shown", "measuring/generation.py",
          "found[index] = ids[: min(end, tokens[index])]", "found[index] = ids[: tokens[index]]",
          GENERATION),
    Fault("a model's own penalties count", "measuring/generation.py",
          "model.generation_config = GenerationConfig()", "pass", GENERATION),
    Fault("checksums not compared", "model/tensor_files.py",
          'if metadata.get("sha256") != _checksum(tensors, text):', "if False:", BAD_INPUT),
    Fault("another file taken for the packaged one", "model/packages.py",
          "if sha256 != PACKAGED[name].sha256:", "if False:", GGUF),
    Fault("a copy of another file taken for this one's", "model/dequantised.py",
          "not wanted.items() <= found.items()", "not found", GGUF),
    Fault("weights of a file that are left over go unnoticed", "model/dequantised.py",
          "if set(left) - _STRETCHED:", "if set(left) - _STRETCHED - set(left):", GGUF),
    Fault("a run that begins one block too high", "measuring/restored_runs.py",
          "self.runs.states[one.first][:, self.token :].clone()",
          "self.runs.states[min(one.first + 1, self.parts.n_layers - 1)][:, self.token :].clone()",
          TRACING),
    Fault("a window that begins at its layer", "measuring/restored_runs.py",
          "max(0, layer - width // 2),", "layer,", TRACING),
    Fault("the keys of another draw of the noise", "measuring/restored_runs.py",
          ".repeat(rows // samples, 1, 1, 1)",
          ".repeat_interleave(rows // samples, dim=0)", TRACING),
    Fault("the keys of the clean run left of the token", "measuring/traced_runs.py",
          "one.keys[own].clone()", "one.keys[:1].repeat(samples, 1, 1, 1)", TRACING),
    Fault("what one block restored enters the next", "measuring/traced_runs.py",
          "                    by_row[place] = own", "                    pass", TRACING),
    Fault("a block of its own window left out", "measuring/restored_runs.py",
          "one.first < layer <= one.last", "one.first < layer < one.last", TRACING),
    Fault("kept keys cut to the window in tracing", "measuring/traced_runs.py",
          "made = DynamicCache()  # all tokens",
          "made = DynamicCache(config=parts.model.config)  #", FAMILIES),
    Fault("a place counted by the first layer alone", "measuring/traces.py",
          "~np.isnan(each).all(axis=2)", "~np.isnan(each[:, :, 0])", TRACING),
    Fault("noise in units of one, not of sigma", "measuring/tracing.py",
          "draws = strength * scale * _standard_noise", "draws = strength * _standard_noise",
          TRACING),
    Fault("intervals of single facts instead of their mean", "measuring/traces.py",
          "means = have[drawn].mean(axis=1)", "means = have[drawn[:, 0]]", TRACING),
    Fault("fine-tuning without its bound", "editing/tuning.py",
          "change.clamp_(-how.norm, how.norm)", "pass", TUNING),
    Fault("decay of Delta instead of the weight", "editing/tuning.py",
          "gradient.add(start + change, alpha", "gradient.add(change, alpha", TUNING),
    Fault("a batch that is learnt goes on moving", "editing/tuning.py",
          "if sum(found) / len(found) >= how.stop_loss:", "if found:", TUNING),
    Fault("of equal scores the larger update", "measuring/sweep_order.py",
          'return -row["score"], row["size"], place', 'return -row["score"], -row["size"], place',
          SUGGESTING),
    Fault("a sweep goes on from one with another seed", "measuring/sweep_files.py",
          '"seed": seed,', '"seed": 0,', SUGGESTING),
    Fault("a trace read at the layer of its largest effect alone", "measuring/sweep_order.py",
          'table["effect"].max() / 2, "layer"]', 'table["effect"].max(), "layer"]', SUGGESTING),
    Fault("a sweep runs over its budget", "measuring/suggesting.py",
          "if begun and time.monotonic() - began > budget:", "if False:", SUGGESTING),
    Fault("a cell of a grid that somebody else works on is taken", "measuring/grid_files.py",
          "yield False", "yield True", GRIDS),
    Fault("cells of another model stand beside each other", "measuring/grid_runs.py",
          'check_same(folder / name / CELL, common, known["common"])', "pass", GRIDS),
    Fault("a cell of another method is gone on with", "measuring/grid_files.py",
          'check_same(self.folder / CELL, self.own, found["own"])', "pass", GRIDS),
    Fault("what is done is done again", "measuring/grid_runs.py",
          'if ours and known["state"] != DONE and not failed:', "if ours and not failed:", GRIDS),
    Fault("a cell that fails ends the sweep", "measuring/grid_runs.py",
          "except Exception as problem:", "except ArithmeticError as problem:", GRIDS),
    Fault("edits that an interrupted run made are forgotten", "measuring/grid_files.py",
          '                self.by_id[one["id"]] = one', "                pass", GRIDS),
    Fault("the cost of a batch without its last layer", "measuring/grid_files.py",
          "math.fsum(each.preservation_error for each in found)",
          "math.fsum(each.preservation_error for each in found[:-1])", GRIDS),
    Fault("the equality drawn at one", "measuring/grid_figures.py",
          "return min(positive) / 10 if positive else 1.0", "return 1.0", GRIDS),
    Fault("intervals of the seeds' mean, not of all seeds", "measuring/grid_figures.py",
          'high=(f"{score}_high", "max")', 'high=(f"{score}_high", "mean")', GRIDS),
    Fault("a model finds the settings of one with other keys", "editing/settings.py",
          "(kind, layers, width, key)):", "(kind, layers, width, 11008)):", SUGGESTING),
    Fault("kept keys cut to the window", "editing/prepared.py",
          "made = DynamicCache()  # all tokens",
          "made = DynamicCache(config=parts.model.config)  #", FAMILIES),
    Fault("delta passes by the norm behind the MLP", "model/anatomy.py",
          "moved: Tensor = norm(value + delta) - norm(value)", "moved = delta", FAMILIES),
    Fault("the multiplier of a block forgotten", "editing/layer_loop.py",
          "residual = residual / parts.gain(", "residual = residual / 1.0 ** parts.gain(",
          FAMILIES),
    Fault("what is changed in place is read too late", "model/hooks.py",
          'hidden.clone() if side == "output" else hidden', "hidden", FAMILIES),
    Fault("noise measured in the table of embeddings", "measuring/tracing.py",
          "parts.embedded(ids)", "parts.embeddings.detach()[ids]", FAMILIES),
    Fault("a subject's key is that of its first fact", "editing/keys.py",
          "of_facts[:, one].mean(dim=1) if len(one) > 1", "of_facts[:, one[0]] if len(one) > 1",
          SHARED),
    Fault("a subject's value begins where its first fact's does", "editing/prepared.py",
          "for index in range(last + 1 - len(of_value), last, contexts)",
          "for index in range(last + 1 - len(of_value), last, len(of_value))", SHARED),
    Fault("a subject's value is that of its last fact", "editing/values.py",
          "row for i in one for row in rows.behind[i]",
          "row for i in one for row in rows.behind[one[-1]]", SHARED),
    Fault("a value is taken for only some of its facts", "editing/values.py",
          "            if left_out:\n", "            if False:\n", SHARED),
    Fault("values of facts are taken for those of subjects", "editing/plans.py",
          "if found.columns != plan.columns:", "if False:", SHARED),
    Fault("keys in the order of the batches, not of the facts", "editing/layer_loop.py",
          "order = sorted(range(len(written)), key=written.__getitem__)",
          "order = list(range(len(written)))", SHARED),
    Fault("outcomes in the order of the batches", "editing/layer_loop.py",
          "after = dict(zip(asked, made.after, strict=True))",
          "after = dict(enumerate(made.after))", SHARED),
    Fault("what never took is said to be lost", "editing/layer_loop.py",
          "if took and not after.greedy", "if took", SHARED),
    Fault("facts of a subject in one batch", "facts/batches.py",
          "batch_of[place] = texts[facts[place].text]",
          "batch_of[place] = 0 * texts[facts[place].text]", SHARED),
    Fault("the first of contradicting facts wins", "facts/batches.py",
          "index for index, fact in enumerate(items)}",
          "index for index, fact in reversed(list(enumerate(items)))}", SHARED),
    Fault("only the last batch is held", "objective/held.py",
          "self.basis = torch.cat([self.basis, Q], dim=1)", "self.basis = Q", HELD),
    Fault("an update that is not kept off the past", "objective/held.py",
          "self.inner.unwhiten(_without(self.basis, rows.to(self.basis.dtype).mT).mT)",
          "self.inner.unwhiten(rows + self.basis[:, :1].mT)", HELD),
    Fault("a key without room is written", "objective/held.py",
          "return rest.masked_fill_(full, 0.0) if bool(full.any()) else rest", "return rest", HELD),
    Fault("the past weighed by lam instead of its inverse", "editing/histories.py",
          "metric.plus(K, 1 / lam)", "metric.plus(K, lam)", PAST),
    Fault("a fact that was written anew is held as it was", "editing/histories.py",
          "frozenset(column for edit in active for column in edit.provenance.replaces)",
          "frozenset()", PAST),
    Fault("turns of one edit know nothing of each other", "editing/layer_loop.py",
          "past = past.and_then(batch, turn.facts)", "pass", PAST),
    Fault("what a weight was to give, without earlier turns", "editing/layer_loop.py",
          "written = [*updates_at(weight, ledger.active), *made.updates.get(weight.name, [])]",
          "written = updates_at(weight, ledger.active)", PAST),
    Fault("a fact that is overruled comes back with its subject", "editing/histories.py",
          "next((one for one in same if one.text == known.text), same[0])", "same[-1]", PAST),
    Fault("a replay that minds the edit that is gone", "editing/consecutive.py",
          "new = _solved_again(editor, others, [*earlier, *made], edit, replaces)",
          "new = _solved_again(editor, others, [*earlier, *later[:1]], edit, replaces)", PAST),
    Fault("a name weighed by lam times its weight", "editing/named.py",
          "weight / ridge if ridge else weight", "weight * ridge if ridge else weight", NAMED),
    Fault("names beside a history forget it", "editing/named.py",
          "return metric.holding(K) if isinstance(metric, Held) else Held(metric, K)",
          "return Held(metric.inner if isinstance(metric, Held) else metric, K)", NAMED),
    Fault("a prompt of which the last token counts alone", "editing/named.py",
          "for place in range(len(row.ids)):\n            what",
          "for place in range(len(row.ids) - 1, len(row.ids)):\n            what", NAMED),
    Fault("a beginning of two prompts counts twice", "editing/named.py",
          "what = row.ids[: place + 1] if causal else (number, place)",
          "what = (number, place)", NAMED),
    Fault("keys of names as the unedited model has them", "editing/layer_loop.py",
          "    made.preserved[weight.name] = kept\n",
          "    kept = made.preserved.setdefault(plan.weights[0].name, kept)\n"
          "    made.preserved[weight.name] = kept\n", NAMED),
    Fault("a fact without room is left out with a ridge", "editing/named.py",
          "if left == 0.0 and not may:", "if False:", NAMED),
    Fault("a replay that forgets the names", "editing/consecutive.py",
          "if recorded.preserve is not None:", "if False:", NAMED),
    Fault("what a name said is looked up behind the edit", "editing/layer_loop.py",
          "said_behind(parts, named.encoder, named.asked, tokens)",
          "said_behind(parts, named.encoder, named.asked)", NAMED),
    Fault("how far a name moved, beside all of W0", "editing/kept.py",
          "value[:, list(own)].norm()", "value.norm()", NAMED),
    Fault("a name of an edited subject is held", "editing/named.py",
          "if given.weight == \"exact\":\n            raise SharedSubjectError(",
          "if given.weight == 0:\n            raise SharedSubjectError(", NAMED),
    Fault("portability of one group only", "measuring/scores.py",
          '"portability(: .*)?"', '"portability: .*"', EVALUATION),
    Fault("the answer before the edit counts as its consequence", "facts/readers.py",
          "Probe(question, new, foil)", "Probe(question, foil or new)", READ),
    Fault("a run goes on as another", "measuring/batches.py",
          "if found.get(name) != wanted[name]", "if name not in found", BATCHES),
    Fault("all facts taken for the first batch", "measuring/batches.py",
          'asked = asked[asked["record"] < self.batch_size]', "pass", BATCHES),
    Fault("a null space of the large eigenvalues", "objective/null_space.py",
          "vectors[:, :count].contiguous()", "vectors[:, -count:].contiguous()", FORMULAS),
    Fault("a threshold relative to the smallest", "objective/null_space.py",
          "float(values[-1]) if relative", "float(values[0]) if relative", FORMULAS),
    Fault("a history beside the null space", "objective/null_space.py",
          "past.plus(self.basis.mT @ K, weight)", "past.plus(self.basis.mT @ K, weight**2)",
          FORMULAS),
    Fault("what leaks is counted twice", "objective/null_space.py",
          "- float((left @ inside).square().sum())", "- 0.0", FORMULAS),
    Fault("divided by the other key's own length", "objective/divided.py",
          "torch.linalg.solve_ex(A.mT @ B", "torch.linalg.solve_ex(B.mT @ B", FORMULAS),
    Fault("a budget that forgives", "objective/budget.py",
          "max(1.0, self.queue + spent", "max(0.1, self.queue + spent", FORMULAS),
    Fault("values beyond twice the anchor are cut", "editing/anchors.py",
          "torch.where(size > 2 * anchor,", "torch.where(size > 2e9 * anchor,", FORMULAS),
    Fault("the shortest values do not count in an anchor", "editing/anchors.py",
          "sizes[: len(sizes) - dropped]", "sizes[dropped:]", FORMULAS),
    Fault("the update's own key divides it", "editing/residuals.py",
          "    if mean is None:\n", "    if True:\n", PRESETS),
    Fault("what stands there now is read at the bare prompt", "editing/residuals.py",
          "method.site, method.output_mean)", "method.site)", PRESETS),
    Fault("targets of later layers with nothing added", "editing/residuals.py",
          "added[batch].to(hidden)", "0 * added[batch].to(hidden)", PRESETS),
    Fault("replayed values set at the last layer", "editing/methods.py",
          "self.layers[0 if has_own_targets(self.distribution) else -1]", "self.layers[-1]",
          PRESETS),
    Fault("a null space of another threshold", "editing/preservations.py",
          "basis=kept.get(self.given)", "basis=next(iter(kept.values()), None)", PRESETS),
    Fault("the norm of Delta costs nothing", "editing/preservations.py",
          "metric.plus(every, norm_weight)", "metric.plus(every, 0.0)", PRESETS),
    Fault("a target that is there once is enough", "editing/early_stop.py",
          "return -cutoff if cutoff < 0", "return 1 if cutoff < 0", PRESETS),
    Fault("the bare prompt is asked too", "editing/prepared.py",
          "unprefixed = set(bare) if contexts > 1 else set()", "unprefixed = set()", PRESETS),
    Fault("values of other settings are taken for these", "editing/plans.py",
          "*settings, *used))", "*settings))", PRESETS),
    Fault("all files of edits get new fields", "editing/methods.py",
          "!= field.default or field.name not in _LATER", "is not None or True", PRESETS),
    Fault("rare words weigh no more than others", "measuring/references.py",
          "1 + math.log((1 + count) / (1 + number))", "1.0", REFERENCES),
    Fault("records without references count as 0", "measuring/references.py",
          "else math.nan", "else 0.0", REFERENCES),
    Fault("texts go on behind the last position", "measuring/generation.py",
          "if parts.positions is None or most + max(", "if True or most + max(", GENERATION),
    Fault("keys of earlier batches are not accumulated", "editing/hook_writing.py",
          "hooks.put(weight.layer, hook.preserving(keys, 1 / plan.ridge))",
          "hooks.put(weight.layer, hook)", HOOKS),
    Fault("accumulated keys weigh lam instead of 1 / lam", "editing/hook_writing.py",
          "hook.preserving(keys, 1 / plan.ridge)", "hook.preserving(keys, plan.ridge)", HOOKS),
    Fault("keys and residual are read with validated hooks", "editing/hook_writing.py",
          "replace(one, temporary=True)", "replace(one, temporary=False)", HOOKS),
    Fault("what temporary hooks change is not missing", "editing/hook_writing.py",
          "missing = replace(values, delta=values.z - now, target_init=now)",
          "missing = values", HOOKS),
    Fault("the published gate sees no further than the subject", "editing/hook_writing.py",
          "parts = replace(parts, causal=hooks.gate.causal)", "parts = replace(parts, causal=True)",
          HOOKS),
    Fault("edited subjects count as preserved", "editing/hook_measures.py",
          "kept = torch.cat(scores)[self.used]", "kept = torch.cat(scores)", HOOKS),
    Fault("a biased standard deviation", "editing/hook_gates.py",
          "/ (size.shape[-1] - 1)", "/ size.shape[-1]", HOOKS),
    Fault("a published threshold that rises", "editing/hook_gates.py",
          "return min([before, *(one for one in best if one == one)])",
          "return max([before, *(one for one in best if one == one)])", HOOKS),
    Fault("a failed batch leaves hook layers half written", "editing/hook_gates.py",
          "        except BaseException:\n            self.layers = before\n            raise",
          "        except BaseException:\n            raise", HOOKS),
    Fault("a sample of the first keys", "statistics/key_sample.py",
          "torch.where(now < count, now, drawn.long())",
          "torch.where(now < count, now, count)", HOOKED),
    Fault("hooks stay when they are taken out", "model/ledger.py",
          "            entry.leave()", "            pass", HOOKED),
    Fault("edited subjects count as false opens", "editing/hook_measures.py",
          "chosen = (one.subject == at_subjects).nonzero().squeeze(1)",
          "chosen = (one.subject | ~one.subject).nonzero().squeeze(1)", HOOKED),
    Fault(
        "the Jacobian is transposed",
        "relations/jacobian.py",
        "whole[start : start + at_once] = grad[:, 0]",
        "whole[:, start : start + at_once] = grad[:, 0].T",
        RELATIONS,
    ),
    Fault(
        "the lowest block of several is the one below",
        "relations/jacobian.py",
        "return torch.cat([s[:, None], hidden[:, 1:]], dim=1)",
        "return torch.cat([s[:, None].detach(), hidden[:, 1:]], dim=1)",
        RELATIONS,
    ),
    Fault(
        "the bias takes the mean of o alone",
        "relations/estimating.py",
        "bias = o - jacobian @ s",
        "bias = o",
        RELATIONS,
    ),
    Fault(
        "W is a sum over the examples",
        "relations/estimating.py",
        "jacobian / len(rows)",
        "jacobian",
        RELATIONS,
    ),
    Fault(
        "an example is asked behind itself",
        "relations/prompts.py",
        "            if pair.subject != subject\n",
        "            if pair\n",
        RELATIONS,
    ),
    Fault(
        "s is read at the subject's first token",
        'relations/prompts.py',
        'len(front) + places[-1], own',
        'len(front) + places[0], own',
        RELATIONS,
    ),
    Fault(
        "beta scales b too",
        "relations/relation.py",
        "return self.beta * s.to(weight.dtype) @ weight.T + self.bias.to(s.device)",
        "return self.beta * (s.to(weight.dtype) @ weight.T + self.bias.to(s.device))",
        RELATIONS,
    ),
    Fault(
        "the inverse takes the smallest singular values",
        "relations/inverse.py",
        "right = self.right[:chosen].T / self.sizes[:chosen]",
        "right = self.right[-chosen:].T / self.sizes[-chosen:]",
        RELATIONS,
    ),
    Fault(
        "an edit goes the wrong way",
        "relations/relation.py",
        "move = (there.o - here.o)",
        "move = (here.o - there.o)",
        RELATIONS,
    ),
    Fault(
        "settings are chosen on the fold that they are scored on",
        "relations/scores.py",
        "if other is not fold) or (fold,)",
        "if other is fold) or (fold,)",
        RELATIONS,
    ),
    Fault(
        "an interval from two subjects on",
        "relations/scores.py",
        "LEAST_FOR_INTERVAL = 20",
        "LEAST_FOR_INTERVAL = 2",
        RELATIONS,
    ),
    Fault(
        "a fold's own subjects are examples",
        'relations/validation.py',
        '            rest = [pair for pair in pairs if pair not in dealt[number]]',
        '            rest = [pair for pair in pairs if pair in dealt[number]]',
        RELATIONS,
    ),
    Fault(
        "scores of other settings are gone on with",
        "relations/validation.py",
        "if kind != KIND or conditions != self.conditions:",
        "if kind != KIND:",
        RELATIONS,
    ),
    Fault(
        "o is read behind the longest prompt",
        "relations/states.py",
        "(ids, mask, positions, subject, lengths - 1)",
        "(ids, mask, positions, subject, torch.full_like(lengths, width - 1))",
        RELATIONS,
    ),
)  # fmt: skip


def survives(fault: Fault, in_chapters: bool = False) -> str | None:
    """Plant the fault in a copy and run its tests; None if they fail, a complaint otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("unified_edit", "tests", "book"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        module = copy / "unified_edit" / fault.module
        source = module.read_text(encoding="utf-8")
        if source.count(fault.right) != 1:
            return f"{fault.what}: the text to replace occurs {source.count(fault.right)} times"
        module.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": folder,
            "OMP_NUM_THREADS": "1",
            "UNIFIED_EDIT_PROGRESS": "0",
            "UNIFIED_EDIT_CACHE": str(copy / "cache"),
        }
        chapters = [f"book/{name}.ipynb" for name in CHAPTERS[fault.tests]]
        tests = ["--nbval", *chapters] if in_chapters else fault.tests
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True
        )
        if run.returncode == 1:
            return None
        last = (run.stdout.strip().splitlines() or ["no output"])[-1]
        return f"{fault.what}: pytest exited with {run.returncode} ({last})"


def main(arguments: Sequence[str]) -> int:
    """Run the chosen faults; the exit code is 1 if one survives."""
    parser = argparse.ArgumentParser(description="Plant faults in copies; each must be noticed.")
    parser.add_argument("numbers", nargs="*", type=int, help="of faults, from 0; all by default")
    parser.add_argument("--chapters", action="store_true", help="run chapters instead of tests")
    parser.add_argument("--list", action="store_true", help="show the faults and their numbers")
    given = parser.parse_args(arguments)
    if given.list:
        for number, fault in enumerate(FAULTS):
            print(f"{number:3}  {fault.module:32} {fault.what}")
        return 0
    chosen = [FAULTS[number] for number in given.numbers] or list(FAULTS)
    if given.chapters:
        chosen = [fault for fault in chosen if CHAPTERS[fault.tests]]
    with ThreadPoolExecutor(2) as pool:
        complaints = []
        found = pool.map(lambda fault: survives(fault, given.chapters), chosen)
        for fault, complaint in zip(chosen, found, strict=True):
            print(f"{'SURVIVES' if complaint else 'caught':9} {fault.what}", flush=True)
            complaints += [complaint] if complaint else []
    print("\n".join(complaints) or f"all {len(chosen)} faults were caught")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
