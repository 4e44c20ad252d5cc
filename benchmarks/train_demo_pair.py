"""Train the demo pair (target, draft, tokenizer, held-out prompts) on one GPU in a fixed time.

    python benchmarks/train_demo_pair.py --out demo_pair

The target learns the Python source found on this machine (see python_corpus.py). The draft is then distilled from the
frozen target (forward KL), half on the corpus and half on the target's own greedy continuations, because greedy
speculative decoding only ever asks the draft about the target's own text (DistillSpec, arXiv:2310.08461).

Learning rates follow the elapsed share of each phase's time, so the budget holds on any hardware; in return two runs
differ by the number of steps they reach. The final measurements are of the models as written to disk.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pair_report import corpus_size, environment, greedy_metrics, held_out_metrics, write_card
from python_corpus import (
    EOS_ID,
    PAD_ID,
    Corpus,
    encode_stream,
    evenly_spaced_rows,
    load_corpus,
    sample_rows,
    select_prompts,
    train_tokenizer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Shape:
    """The part of a shape in which the models differ; all heads have 64 dimensions and there is one key/value head."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on, except the packages installed on its machine."""

    out: Path
    target_seconds: float = 270.0
    draft_seconds: float = 130.0
    own_text_seconds: float = 25.0
    draft_layers: tuple[int, ...] = (2,)
    compile: bool = True
    seed: int = 0
    vocab_size: int = 2048
    max_positions: int = 2048
    tokenizer_chars: int = 40_000_000
    max_corpus_bytes: int = 2_000_000_000
    batch_rows: int = 64
    row_tokens: int = 1024
    own_text_rows: int = 4096
    own_text_tokens: int = 256
    peak_learning_rate: float = 3e-3
    num_prompts: int = 120
    continuation_tokens: int = 96
    held_out_rows: int = 512


TARGET_SHAPE = Shape(hidden_size=192, num_layers=8, num_heads=3, intermediate_size=512)


def draft_shape(num_layers: int) -> Shape:
    """Return the draft's shape; its width is fixed and the run chooses its depth.

    At least two layers are needed to copy the text after an earlier occurrence of a token, and code repeats itself: on
    the target's greedy text a draft of one layer agreed with 63 % of the tokens and one of two layers with 87 %.
    """
    return Shape(hidden_size=128, num_layers=num_layers, num_heads=2, intermediate_size=384)


def smoke(config: TrainConfig) -> TrainConfig:
    """Shrink a run to about a minute: it tries every step but gives useless models."""
    on_gpu = torch.cuda.is_available()
    return replace(
        config,
        target_seconds=20.0,
        draft_seconds=15.0,
        own_text_seconds=3.0,
        max_corpus_bytes=30_000_000 if on_gpu else 3_000_000,
        tokenizer_chars=1_000_000,
        batch_rows=config.batch_rows if on_gpu else 2,
        row_tokens=config.row_tokens if on_gpu else 256,
        own_text_rows=config.own_text_rows if on_gpu else 16,
        num_prompts=16,
        continuation_tokens=24,
        held_out_rows=8,
    )


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    parser = argparse.ArgumentParser(description="Train the demo pair.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target-seconds", type=float, default=TrainConfig.target_seconds)
    parser.add_argument("--draft-seconds", type=float, default=TrainConfig.draft_seconds)
    parser.add_argument(
        "--draft-layers",
        type=int,
        nargs="+",
        default=TrainConfig.draft_layers,
        help="depths to train side by side; the last is written to draft/, the others to draft_<depth>_layers/",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--smoke", action="store_true", help="a short trial of every step, also without a GPU")
    options = vars(parser.parse_args(arguments))
    wants_smoke = options.pop("smoke")
    config = TrainConfig(**{**options, "draft_layers": tuple(options["draft_layers"])})
    return smoke(config) if wants_smoke else config


def build_model(shape: Shape, config: TrainConfig, device: str) -> Qwen3ForCausalLM:
    model_config = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        use_sliding_window=False,
    )
    model = Qwen3ForCausalLM(model_config)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    return model.to(device)


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model in bf16. Only parameters are rounded: RoPE's frequency buffer must stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype, device: str) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)


def learning_rate(progress: float, peak: float) -> float:
    """Warm up over the first 3 % of the time, then a cosine down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(progress / 0.03, 1.0) * cosine


def causal_logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Run a model over full rows.

    The ready-made mask None means plain causal attention. When compiling, transformers would build a dense mask
    instead, which would rule out flash attention.
    """
    return model(input_ids=rows, attention_mask={"full_attention": None}, use_cache=False).logits


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = causal_logits(model, rows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def distillation_loss(teacher: nn.Module, drafts: nn.ModuleList, rows: Tensor) -> Tensor:
    """Sum over the drafts of the cross-entropy with the teacher's distribution: forward KL up to a constant.

    The drafts share no parameters, so training on the sum trains each alone, with one teacher pass for all.
    """
    with torch.no_grad():
        target_probs = causal_logits(teacher, rows).float().softmax(-1)
    total = torch.zeros((), device=rows.device)
    for draft in drafts:
        with torch.autocast(rows.device.type, torch.bfloat16):
            logits = causal_logits(draft, rows)
        total = total - (target_probs * logits.float().log_softmax(-1)).sum(-1).mean()
    return total


def optimise(
    modules: Iterable[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    next_rows: Callable[[], Tensor],
    seconds: float,
    config: TrainConfig,
) -> dict[str, float]:
    """Minimise `loss_of(next_rows())` for `seconds`, including the first call's compilation.

    Gradients are clipped per module, so that modules trained together train as they would alone.
    """
    started = time.perf_counter()
    groups = [list(module.parameters()) for module in modules]
    parameters = [parameter for group in groups for parameter in group]
    decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    loss_of(next_rows()).backward()
    optimizer.zero_grad()
    compiled = time.perf_counter()
    available = max(started + seconds - compiled, 1.0)
    num_steps, num_tokens, progress = 0, 0, 0.0
    while progress < 1.0:
        for options in optimizer.param_groups:
            options["lr"] = learning_rate(max(progress, 1e-3), config.peak_learning_rate)
        rows = next_rows()
        loss = loss_of(rows)
        loss.backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_steps, num_tokens = num_steps + 1, num_tokens + rows.numel()
        if num_steps % 20 == 0:
            loss.item()  # waits for the device, else the clock would run ahead of it
        if num_steps % 500 == 0:
            print(f"  step {num_steps}  {progress:.0%}  loss {loss.item():.4f}", flush=True)
        progress = (time.perf_counter() - compiled) / available
    final_loss = loss.item()
    return {
        "steps": num_steps,
        "tokens": num_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "of which compilation": round(compiled - started, 1),
        "last training loss": round(final_loss, 4),
    }


def generate_own_text(
    teacher: Qwen3ForCausalLM, stream: Tensor, config: TrainConfig, generator: torch.Generator
) -> Tensor:
    """Let the target continue pieces of the corpus greedily until the time is up; one stream, as from `encode_stream`.

    Each piece begins with EOS, which marked the start of a document in training, so the target reads pieces packed into
    a row as separate texts. Prompt lengths vary as real ones do.
    """
    end = time.perf_counter() + config.own_text_seconds
    parts: list[Tensor] = []
    while time.perf_counter() < end:
        num_prompt_tokens = (32, 64, 96, 160)[len(parts) % 4]
        prompts = sample_rows(stream, config.own_text_rows, num_prompt_tokens, generator)
        prompts[:, 0] = EOS_ID
        rows = teacher.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=config.own_text_tokens - num_prompt_tokens,
            do_sample=False,
        )
        parts.append(rows[rows != PAD_ID].int())
    return torch.cat(parts)


@dataclass(frozen=True)
class Data:
    """The corpus in the forms that training and evaluation read."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    training: Tensor  # [tokens] int32, on the device
    held_out: Tensor  # [tokens] int32, on the device
    prompts: list[str]


def prepare_data(config: TrainConfig, device: str) -> Data:
    corpus = load_corpus(config.max_corpus_bytes, config.seed)
    texts = [document.text for document in corpus.training]
    tokenizer = train_tokenizer(texts, config.vocab_size, config.tokenizer_chars, config.max_positions)
    training = encode_stream(tokenizer, texts, device)
    held_out = encode_stream(tokenizer, [document.text for document in corpus.held_out], device)
    prompts = select_prompts(
        corpus.held_out, lambda text: len(tokenizer(text).input_ids), config.num_prompts, config.seed
    )
    (config.out / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    print(f"corpus: {len(texts)} files, {len(training)} + {len(held_out)} tokens", flush=True)
    return Data(corpus, tokenizer, training, held_out, prompts)


def train_target(data: Data, config: TrainConfig, device: str, generator: torch.Generator) -> dict[str, float]:
    model = build_model(TARGET_SHAPE, config, device)
    loss = torch.compile(next_token_loss) if config.compile else next_token_loss
    record = optimise(
        [model],
        lambda rows: loss(model, rows),
        lambda: sample_rows(data.training, config.batch_rows, config.row_tokens + 1, generator),
        config.target_seconds,
        config,
    )
    save_model(model, data.tokenizer, config.out / "target")
    return record


def draft_folders(config: TrainConfig) -> list[Path]:
    names = [*(f"draft_{num_layers}_layers" for num_layers in config.draft_layers[:-1]), "draft"]
    return [config.out / name for name in names]


def train_drafts(data: Data, config: TrainConfig, device: str, generator: torch.Generator) -> dict[str, float]:
    """Distil one draft of each depth from the target on disk."""
    teacher = load_model(config.out / "target", torch.bfloat16 if device == "cuda" else torch.float32, device)
    own_text = generate_own_text(teacher, data.training, config, generator)
    print(f"own text: {len(own_text)} tokens", flush=True)
    drafts = nn.ModuleList(build_model(draft_shape(n), config, device) for n in config.draft_layers)
    loss = torch.compile(distillation_loss) if config.compile else distillation_loss
    half = config.batch_rows // 2

    def next_rows() -> Tensor:
        return torch.cat([sample_rows(s, half, config.row_tokens, generator) for s in (data.training, own_text)])

    record = optimise(drafts, lambda rows: loss(teacher, drafts, rows), next_rows, config.draft_seconds, config)
    for draft, folder in zip(drafts, draft_folders(config), strict=True):
        save_model(draft, data.tokenizer, folder)
    return record | {"own text tokens": len(own_text)}


def evaluate(data: Data, folder: Path, config: TrainConfig, device: str) -> dict[str, dict[str, float]]:
    """Measure the pair as it is on disk, in float32."""
    target = load_model(config.out / "target", torch.float32, device)
    draft = load_model(folder, torch.float32, device)
    rows = evenly_spaced_rows(data.held_out, config.held_out_rows, config.row_tokens)
    return {
        "held-out text": held_out_metrics(target, draft, rows),
        "greedy text": greedy_metrics(target, draft, data.tokenizer, data.prompts, config.continuation_tokens),
    }


def main() -> None:
    config = parse_config(sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    data = prepare_data(config, device)
    run = {
        "command": " ".join(["python", "benchmarks/train_demo_pair.py", *sys.argv[1:]]),
        **environment(device),
        "settings": {name: value for name, value in asdict(config).items() if name != "out"},
        "corpus": corpus_size(data.corpus)
        | {"training tokens": len(data.training), "held-out tokens": len(data.held_out)},
        "target training": train_target(data, config, device, generator),
        "draft training": train_drafts(data, config, device, generator),
    }
    results = {folder.name: evaluate(data, folder, config, device) for folder in draft_folders(config)}
    record = run | results.pop("draft") | {"not shipped": results}
    for role in ("target", "draft"):
        write_card(config.out / role, role, record, data.corpus)
    print(json.dumps(record, indent=1), flush=True)


if __name__ == "__main__":
    main()
