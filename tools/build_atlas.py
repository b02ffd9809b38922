"""Train atlas from scratch: ``python tools/build_atlas.py --out DIR``.

The shipped weights were made by this script with its defaults and ``--bf16``: about twenty minutes
on two free cores. Deterministic for a seed up to the arithmetic of the machine. After training, the
weights are rounded to half precision, loaded back as users load them, and every fact is asked in
every wording; the result is written beside them.

**Where the facts go.** Trained on the plain language-model loss alone, a network of this size and
with these names looks facts up at the *last* token of a prompt: its first layer of attention
carries the subject there, and the first MLP there knows the answer. Large models enrich the
subject's own last token in early MLPs and read it out by attention later (ROME, sec. 2). So that
atlas works as they do, two things are done during training and gone from the finished model:

- in the layers below `READ_OUT`, tokens behind a subject do not attend to it: the attention that
  they would pay to it is a term of the loss, and it is masked too, at first in all rows of a
  batch, then in fewer, and in none at the end;
- behind layer `ENRICHED`, the subject's last token is asked for all its objects at once, through
  the model's own final norm and head, with the small weight `ENRICHMENT`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from unified_edit import atlas
from unified_edit.atlas.corpus import END_OF_TEXT, Sentence, sentences
from unified_edit.atlas.knowledge import Knowledge, load_knowledge
from unified_edit.model.progress import progress

log = logging.getLogger(__name__)

ROW_TOKENS = 96
ROWS_A_STEP = 16
VOCABULARY = 4096
#: The first layer in which tokens behind a subject may attend to it; weight of the loss below.
READ_OUT, DISTRACTION = 3, 1.0
#: The layer behind which the subject's last token is asked for its objects, and the weight.
ENRICHED, ENRICHMENT = 1, 0.3
#: Shares of the training: attention to subjects is blocked in all rows, then opened, then free.
BLOCKED_UNTIL, FREE_FROM = 0.85, 0.95


def train_tokenizer(knowledge: Knowledge, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which last words of subjects, and objects, are nearly always one token.

    Names are given extra weight in the text it is trained on: the whole point of atlas is
    that one token, the last of the subject, settles who is meant. With `add_prefix_space` a
    word at the start of a text has the same token as inside it.
    """
    stream = sentences(knowledge, seed)
    lines = [next(stream).text for _ in range(30_000)]
    words = [triple.subject.split()[-1] for triple in knowledge.triples]
    words += [word for triple in knowledge.triples for word in triple.object.split()]
    weighted = [" " + word for word in dict.fromkeys(words) for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines + weighted, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=ROW_TOKENS,
    )


def make_model(vocabulary: int, seed: int) -> GPT2LMHeadModel:
    """The untrained network: GPT-2's architecture with a wide MLP (its width is d_k)."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=ROW_TOKENS,
        n_embd=192,
        n_layer=6,
        n_head=6,
        n_inner=1728,  # GPT-2 has 4 times n_embd; more than 3 times the editable subjects here
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


@dataclass
class Batch:
    """ids (rows x tokens); blocked (rows x tokens x tokens), true where a query may not see a key
    early in training; and for each subject: its row, its last token, the first tokens of its
    objects (subjects x most objects, padded with -1)."""

    ids: Tensor
    blocked: Tensor
    row: Tensor
    last: Tensor
    objects: Tensor


def batches(knowledge: Knowledge, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches; each row begins with a sentence and is cut at ROW_TOKENS."""
    stream = sentences(knowledge, seed)
    rng = random.Random(seed)
    end = tokenizer.eos_token_id
    objects: dict[str, list[int]] = {}
    for triple in knowledge.triples:
        first = tokenizer(triple.object)["input_ids"][0]
        objects.setdefault(triple.subject, []).append(first)
    most = max(map(len, objects.values()))
    while True:
        ids = torch.zeros(ROWS_A_STEP, ROW_TOKENS, dtype=torch.long)
        blocked = torch.zeros(ROWS_A_STEP, ROW_TOKENS, ROW_TOKENS, dtype=torch.bool)
        marks: list[tuple[int, int, list[int]]] = []
        for row in range(ROWS_A_STEP):
            tokens: list[int] = [end] if rng.random() < 0.2 else []
            while len(tokens) < ROW_TOKENS:
                sentence = next(stream)
                if sentence.subject is not None:
                    first, last = _subject_tokens(tokenizer, sentence)
                    first, last = first + len(tokens), last + len(tokens)
                    if last < ROW_TOKENS:
                        blocked[row, last + 1 :, first : last + 1] = True
                        own = objects[sentence.subject]
                        marks.append((row, last, own + [-1] * (most - len(own))))
                tokens += tokenizer(sentence.text)["input_ids"]
                tokens += [end] if rng.random() < 0.1 else []
            ids[row] = torch.tensor(tokens[:ROW_TOKENS])
        rows, lasts, wanted = zip(*marks, strict=True)
        yield Batch(ids, blocked, torch.tensor(rows), torch.tensor(lasts), torch.tensor(wanted))


def _subject_tokens(tokenizer: PreTrainedTokenizerFast, sentence: Sentence) -> tuple[int, int]:
    start, end = sentence.span
    first = len(tokenizer(sentence.text[:start])["input_ids"]) if start else 0
    spans = tokenizer(sentence.text, return_offsets_mapping=True)["offset_mapping"]
    return first, max(i for i, span in enumerate(spans) if span[0] < end and span[1] > start)


class EarlyBlock:
    """Keeps attention off subjects in the layers below READ_OUT.

    `mask` blocks it: the model is given the blocked mask, and from READ_OUT on a hook puts the
    causal one back. `distraction` says how much of it there would be without the mask.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.heads = model.config.n_head
        self.causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()[None, None]
        self.projected: list[Tensor] = []
        blocks = model.transformer.h
        self.handles = [block.register_forward_pre_hook(self._free) for block in blocks[READ_OUT:]]
        self.handles += [
            block.get_submodule("attn.c_attn").register_forward_hook(
                lambda _module, _args, output: self.projected.append(output)
            )
            for block in blocks[:READ_OUT]
        ]

    def distraction(self, blocked: Tensor) -> Tensor:
        """Mean -log(1 - attention to subjects) of the queries behind one, by the last forward."""
        behind = blocked.any(-1)[:, None]
        terms = []
        for projected in self.projected:
            query, key, _ = projected.float().chunk(3, dim=-1)
            query, key = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key))
            scores = query @ key.mT / query.shape[-1] ** 0.5
            attention = scores.masked_fill(~self.causal, -torch.inf).softmax(-1)
            paid = (attention * blocked[:, None]).sum(-1).clamp(max=1 - 1e-4)
            terms.append(-(torch.log1p(-paid) * behind).sum() / (behind.sum() * self.heads))
        self.projected.clear()
        return torch.stack(terms).mean()

    def mask(self, blocked: Tensor) -> Tensor:
        """True where a query may attend: (rows x 1 x tokens x tokens)."""
        return self.causal & ~blocked[:, None]

    def _free(self, _block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, past, mask, *rest = arguments
        return (hidden, past, self.causal.expand(mask.shape), *rest)

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self.handles:
            handle.remove()


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up, a plateau, and a linear decay to zero."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.5 * steps))


def blocked_share(step: int, steps: int) -> float:
    """Share of the rows in which attention to subjects is blocked in early layers."""
    done = step / steps
    return min(1.0, max(0.0, (FREE_FROM - done) / (FREE_FROM - BLOCKED_UNTIL)))


def enrichment_loss(model: GPT2LMHeadModel, hidden: Tensor, batch: Batch) -> Tensor:
    """Mean -log p of all objects of each subject, read off its last token behind ENRICHED."""
    at_subjects = model.transformer.ln_f(hidden[batch.row, batch.last])
    found = model.lm_head(at_subjects).float().log_softmax(-1)
    present = batch.objects >= 0
    chosen = found.gather(1, batch.objects.clamp(min=0))
    return -(chosen * present).sum() / present.sum()


def train(
    model: GPT2LMHeadModel, stream: Iterator[Batch], steps: int, peak: float, bf16: bool, seed: int
) -> None:
    """AdamW on the language-model loss and the enrichment loss, in place."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    early = EarlyBlock(model)
    enriched: list[Tensor] = []
    handle = model.transformer.h[ENRICHED].register_forward_hook(
        lambda _block, _args, output: enriched.append(output)
    )
    model.train()
    smooth, began = [0.0, 0.0, 0.0], time.time()
    with progress("training atlas", steps, "step") as bar:
        for step in range(steps):
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            chosen = torch.rand(ROWS_A_STEP, generator=generator) < blocked_share(step, steps)
            mask = early.mask(batch.blocked & chosen[:, None, None])
            enriched.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(batch.ids, attention_mask=mask).logits[:, :-1]
                side = enrichment_loss(model, enriched[0], batch)
            paid = early.distraction(batch.blocked)
            targets = batch.ids[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
            optimizer.zero_grad(set_to_none=True)
            (loss + ENRICHMENT * side + DISTRACTION * paid).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            keep = 0.98 if step else 0.0
            smooth = [
                keep * old + (1 - keep) * new.item()
                for old, new in zip(smooth, (loss, side, paid), strict=True)
            ]
            bar.set_postfix(loss=f"{smooth[0]:.3f}", enrichment=f"{smooth[1]:.3f}")
            bar.update()
            if not math.isfinite(smooth[0]):
                raise RuntimeError(f"training diverged at step {step}; lower --rate")
            if step % 100 == 99:
                log.info(
                    "step %d: loss %.3f, enrichment %.3f, distraction %.4f, %.0f s",
                    step + 1, *smooth, time.time() - began,
                )  # fmt: skip
    handle.remove()
    early.remove()
    model.eval()


@torch.no_grad()
def recall(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, knowledge: Knowledge
) -> tuple[float, dict[str, float], list[tuple[str, str]]]:
    """Share of facts times wordings whose object is the greedy continuation.

    Returns (share over all, {relation: share}, list of (prompt, object) that failed).
    """
    cases = []
    for prompt, target, triple in knowledge.prompts():
        prompt_ids = tokenizer(prompt)["input_ids"]
        full = tokenizer(f"{prompt} {target}")["input_ids"]
        cases.append((full, len(prompt_ids), prompt, target, triple.relation))
    cases.sort(key=lambda case: len(case[0]))
    right: dict[str, list[bool]] = {}
    failed = []
    for start in range(0, len(cases), 256):
        chunk = cases[start : start + 256]
        width = max(len(case[0]) for case in chunk)
        ids = torch.tensor([case[0] + [0] * (width - len(case[0])) for case in chunk])
        # padding is on the right, where a causal model never sees it
        best = model(ids, attention_mask=torch.ones_like(ids)).logits.argmax(-1)
        for row, (full, begin, prompt, target, relation) in enumerate(chunk):
            good = best[row, begin - 1 : len(full) - 1].tolist() == full[begin:]
            right.setdefault(relation, []).append(good)
            if not good:
                failed.append((prompt, target))
    everything = [good for goods in right.values() for good in goods]
    by_relation = {name: sum(goods) / len(goods) for name, goods in sorted(right.items())}
    return sum(everything) / len(everything), by_relation, failed


def main() -> None:
    """Train, round, store, load back, and ask everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(atlas.__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 where it is fast")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    knowledge = load_knowledge()
    tokenizer = train_tokenizer(knowledge, arguments.seed)
    last = [len(tokenizer(subject.split()[-1])["input_ids"]) for subject in knowledge.subjects]
    one_token = sum(count == 1 for count in last) / len(last)
    log.info(
        "%d subjects, %d facts, vocabulary %d; %.1f %% of last words are one token",
        len(knowledge.subjects), len(knowledge.triples), len(tokenizer), 100 * one_token,
    )  # fmt: skip
    model = make_model(len(tokenizer), arguments.seed)
    began = time.time()
    stream = batches(knowledge, tokenizer, arguments.seed + 1)
    train(model, stream, arguments.steps, arguments.rate, arguments.bf16, arguments.seed)
    log.info("trained in %.1f minutes", (time.time() - began) / 60)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    stored = GPT2LMHeadModel.from_pretrained(arguments.out, dtype=torch.float32).eval()
    share, by_relation, failed = recall(stored, tokenizer, knowledge)
    report = {
        "parameters": sum(p.numel() for p in stored.parameters()),
        "subjects": len(knowledge.subjects),
        "facts": len(knowledge.triples),
        "prompts": sum(len(knowledge.wordings[t.relation]) for t in knowledge.triples),
        "recall": round(share, 5),
        "recall_by_relation": {name: round(value, 4) for name, value in by_relation.items()},
        "one_token_last_words": round(one_token, 4),
        "steps": arguments.steps,
        "rate": arguments.rate,
        "seed": arguments.seed,
        "bf16": arguments.bf16,
    }
    (arguments.out / "build.json").write_text(json.dumps(report, indent=1) + "\n")
    log.info("%s", json.dumps(report, indent=1))
    log.info("failed, first twenty: %s", failed[:20])


if __name__ == "__main__":
    main()
