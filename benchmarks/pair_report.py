"""Measurements of the demo pair, and its model cards.

Argmax agreement and the overlap of distributions determine how many draft tokens a target accepts, greedy and sampled;
neither depends on a decoding engine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers
from python_corpus import Corpus
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from specdec.bench.loops import ends_in_loop


@torch.inference_mode()
def held_out_metrics(target: nn.Module, draft: nn.Module, rows: Tensor) -> dict[str, float]:
    """Compare the models on rows of held-out text, [num_rows, row_tokens] int64; losses in nats per token."""
    sums = torch.zeros(4, dtype=torch.float64, device=rows.device)
    for batch in rows.split(8):
        labels = batch[:, 1:, None]
        target_logprobs, draft_logprobs = (
            model(input_ids=batch[:, :-1], use_cache=False).logits.log_softmax(-1) for model in (target, draft)
        )
        sums[0] -= target_logprobs.gather(-1, labels).sum()
        sums[1] -= draft_logprobs.gather(-1, labels).sum()
        sums[2] += (target_logprobs.argmax(-1) == draft_logprobs.argmax(-1)).sum()
        sums[3] += torch.minimum(target_logprobs, draft_logprobs).exp().sum()
    names = ("target loss", "draft loss", "argmax agreement", "acceptance 1-TVD")
    num_predictions = rows[:, 1:].numel()
    means = (round(mean, 4) for mean in (sums / num_predictions).tolist())
    return dict(zip(names, means, strict=True)) | {"tokens": num_predictions}


def tokens_per_verification(agrees: Sequence[bool], num_draft_tokens: int) -> float:
    """Mean tokens per target pass in greedy speculative decoding, from where the draft agrees with the target.

    Up to its first error the draft sees the target's own text, so the agreements determine the run without running it.
    """
    position, num_passes = 0, 0
    while position < len(agrees):
        window = [*agrees[position : position + num_draft_tokens], False]
        position, num_passes = position + window.index(False) + 1, num_passes + 1
    return len(agrees) / num_passes


@torch.inference_mode()
def greedy_metrics(
    target: Qwen3ForCausalLM,
    draft: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    num_new_tokens: int,
) -> dict[str, float]:
    """Measure the draft on the target's greedy continuations of the held-out prompts."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(target.device)
    width = inputs.input_ids.shape[1]
    outputs = target.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=num_new_tokens, do_sample=False
    )
    agreements, lengths, num_loops = [], [], 0
    for output, mask in zip(outputs, inputs.attention_mask, strict=True):
        continuation = output[width:][output[width:] != tokenizer.pad_token_id]
        text = torch.cat([output[:width][mask.bool()], continuation])
        predicted = draft(input_ids=text[None, :-1], use_cache=False).logits[0, -len(continuation) :].argmax(-1)
        agrees = (predicted == continuation).tolist()
        agreements += agrees
        lengths.append(tokens_per_verification(agrees, num_draft_tokens=4))
        num_loops += ends_in_loop(continuation.tolist())
    return {
        "argmax agreement": round(sum(agreements) / len(agreements), 4),
        "tokens per target pass at K=4": round(sum(lengths) / len(lengths), 3),
        "share of continuations ending in a loop": round(num_loops / len(prompts), 3),
        "tokens": len(agreements),
    }


def environment(device: str) -> dict[str, str]:
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def corpus_size(corpus: Corpus) -> dict[str, int]:
    return {
        "training files": len(corpus.training),
        "training characters": sum(len(document.text) for document in corpus.training),
        "held-out files": len(corpus.held_out),
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# specdec demo pair: {role}

A Qwen3-type model of Python source with {parameters:,} parameters, one half of specdec's demo pair (a target and a
draft that share a byte-level BPE tokenizer). **Intended use: demonstrations and tests of speculative decoding only.**
It writes code that looks plausible and is rarely right. Small models fall into loops ({loops:.0%} of the target's
greedy continuations end in one, see below), which flatters every drafter.

## Recipe
{recipe}

Trained from random weights with fused AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices, gradients clipped at 1),
a warm-up and a cosine decay of the learning rate by elapsed time, bf16 autocast over float32 weights; stored in bf16.
The corpus is Python source: exact copies, vendored, generated, very large and non-UTF-8 files were left out.

"held-out text" is files of distributions that were not trained on; "greedy text" is the target's own continuations of
the prompts in `prompts.json`, which were drawn from these files by chance. Losses are nats per token, in float32.

```json
{record}
```

## Sources
The `.py` files of these installed distributions, chosen by the licence in their metadata. H: held out for evaluation
and prompts, not trained on; `prompts.json` quotes these, and their licences apply to the quotes.

| distribution | version | licence | |
|---|---|---|---|
{sources}
"""


RECIPES = {
    "target": "The target: next-token prediction on the corpus.",
    "draft": """The draft: distilled from the frozen target by forward KL. Half of the rows of a step come from the
corpus, half from the target's own greedy continuations of random pieces of it.""",
}


def write_card(folder: Path, role: Literal["target", "draft"], record: dict, corpus: Corpus) -> None:
    """Write a model card with the whole record of the run and every source's licence."""
    sources = (f"| {s.name} | {s.version} | {s.licence} | {'H' if s.held_out else ''} |" for s in corpus.sources)
    card = CARD.format(
        role=role,
        parameters=sum(weight.numel() for weight in load_file(folder / "model.safetensors").values()),
        loops=record["greedy text"]["share of continuations ending in a loop"],
        recipe=RECIPES[role],
        record=json.dumps(record, indent=1),
        sources="\n".join(sources),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
