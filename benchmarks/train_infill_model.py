"""Train an infilling model for the demo pair's tokenizer on one GPU in a fixed time.

    python benchmarks/train_infill_model.py --out infill_model

It learns the Python source found on this machine (see python_corpus.py) with the demo pair's tokenizer. The number of
steps is the number that fits into `--seconds` at the speed of a short trial, so it may differ between two runs.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pair_report import corpus_size, environment
from python_corpus import Corpus, encode_stream, load_corpus
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specdec.drafters.training.any_subset.recipe import AnySubsetLoss, AnySubsetStep, MaskRecipe, build_xlnet
from specdec.drafters.training.any_subset.run import AnySubsetRun
from specdec.drafters.training.data import TokenStream
from specdec.drafters.training.trainer import Step, TrainConfig, build_optimizer

TOKENIZER = Path(__file__).parent.parent / "specdec" / "assets" / "demo_pair" / "target"
TRIAL_STEPS = 40


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0, help="for training, without the trial and compilation")
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--d-inner", type=int, default=512)
    parser.add_argument("--batch-rows", type=int, default=96)
    parser.add_argument("--row-tokens", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="2.5e-3 has diverged after the warm-up")
    parser.add_argument("--draft-weight", type=float, default=0.5)
    parser.add_argument("--max-corpus-bytes", type=int, default=2_000_000_000)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_corpus(tokenizer: PreTrainedTokenizerFast, max_bytes: int, seed: int) -> tuple[np.ndarray, np.ndarray, Corpus]:
    """Training and held-out tokens, and their corpus."""
    corpus = load_corpus(max_bytes, seed)
    streams = (
        encode_stream(tokenizer, [document.text for document in documents], "cpu").numpy()
        for documents in (corpus.training, corpus.held_out)
    )
    training, held_out = streams
    return training, held_out, corpus


def seconds_per_step(run: AnySubsetRun, tokens: np.ndarray, device: torch.device) -> float:
    """Time of one optimiser step after compilation, on a copy of the model."""
    module = AnySubsetLoss(copy.deepcopy(run.model).to(device))
    if run.compile:
        module.compile()
    optimizer = build_optimizer(
        {name: p for name, p in module.named_parameters() if p.requires_grad}, replace(run.config, learning_rate=1e-6)
    )
    step = AnySubsetStep(TokenStream(tokens, run.row_tokens), run.batch_rows, run.recipe)
    started = time.perf_counter()
    for index in range(TRIAL_STEPS):
        if index == TRIAL_STEPS // 2:
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.config.bfloat16):
            loss = step(module, Step(index, 0, 1, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item() if (index + 1) % (TRIAL_STEPS // 2) == 0 else None
    return (time.perf_counter() - started) / (TRIAL_STEPS - TRIAL_STEPS // 2)


def main() -> None:
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    started = time.perf_counter()
    tokens, held_out, corpus = read_corpus(tokenizer, options.max_corpus_bytes, options.seed)
    print(f"corpus: {len(tokens)} + {len(held_out)} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    model = build_xlnet(
        tokenizer, options.d_model, options.layers, options.heads, options.d_inner, options.row_tokens, options.seed
    )
    config = TrainConfig(
        num_steps=1, learning_rate=options.learning_rate, warmup_share=0.05, bfloat16=device.type == "cuda",
        seed=options.seed,
    )  # fmt: skip
    recipe = MaskRecipe(draft_weight=options.draft_weight)
    run = AnySubsetRun(model, tokenizer, recipe, config, options.batch_rows, options.row_tokens, options.compile)
    started = time.perf_counter()
    seconds = seconds_per_step(run, tokens, device)
    num_steps = max(int(options.seconds / seconds), 1)
    print(
        f"{1000 * seconds:.0f} ms per step after {time.perf_counter() - started:.0f} s: {num_steps} steps", flush=True
    )
    run.config = replace(config, num_steps=num_steps)
    run.recipe = replace(recipe, ramp_steps=num_steps // 6)
    notes = {**environment(device.type), "corpus": corpus_size(corpus)}
    record = run.train(tokens, held_out, options.out, device, notes)
    append_sources(options.out / "README.md", corpus)
    print(record)


def append_sources(card: Path, corpus: Corpus) -> None:
    """Append every source's licence, with H if it was held out of training."""
    sources = (f"| {s.name} | {s.version} | {s.licence} | {'H' if s.held_out else ''} |" for s in corpus.sources)
    header = (
        "\nTrained on the Python source of these distributions (H: held out):\n\n| source | version | licence | |\n"
    )
    with card.open("a", encoding="utf-8") as file:
        file.write(header + "|---|---|---|---|\n" + "\n".join(sources) + "\n")


if __name__ == "__main__":
    main()
