"""Filling in held-out code: sequential, parallel without verification, and ASSD, by mask rate and draft length.

    python benchmarks/infilling.py --output infilling.json --plot infilling.png

Part `rates`: texts with places hidden anywhere are filled by samples; network calls, seconds, and the mean negative
log-likelihood of the samples under the model's joint density, which an exact method keeps and an inexact one raises.
Part `lines`: single lines and blocks are filled greedily; exact matches and ROUGE-L against the original text. Every
method fills the same texts, with the same seeds, in the same run, in an order that rotates from repeat to repeat. Calls
are counted one text at a time. `forward="recomputed"` is transformers' own forward, which recomputes every position in
each call; `kept` keeps the keys of committed tokens (`specdec/network/any_subset/two_stream.py`), for sequential
filling too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, XLNetLMHeadModel

import specdec
from specdec.bench.measure import log_to_stderr as log
from specdec.files.environment import environment
from specdec.infill.infill import Forbidding, rows_of, sequences_of
from specdec.infill.masked_text import MaskedText, mask_lines
from specdec.kernels.commit.sample import sample_tokens
from specdec.network.any_subset.model import Order, XLNet, conditionals_of
from specdec.verify.random_streams import Purpose, RowStreams

ASSETS = Path(__file__).resolve().parent.parent / "specdec" / "assets"
SEQUENTIAL, PARALLEL = "sequential", "parallel, unverified"


@dataclass(frozen=True)
class Way:
    """name: a drafter of `specdec.infill`, SEQUENTIAL or PARALLEL. forward: "kept" or "recomputed"."""

    name: str
    k: int | None = None
    bonus_token: bool = True
    forward: str = "kept"

    @property
    def label(self) -> str:
        k = "" if self.k is None else f", k = {self.k}"
        return f"{self.name}{k}{'' if self.bonus_token else ', no bonus'}" + (
            ", recomputed" if self.forward == "recomputed" else ""
        )


@dataclass
class Filled:
    texts: list[Tensor]
    num_calls: int
    num_tokens: int
    seconds: list[float]  # one per repeat


def fill(model: XLNetLMHeadModel, way: Way, text: MaskedText, seed: int | None) -> tuple[Tensor, int]:
    """The filled text and its network calls. seed: of a sample; None fills greedily."""
    ids, mask = text.token_ids[None].to(model.device), text.mask[None].to(model.device)
    served = model if way.forward == "kept" else XLNet(model)
    if way.name == PARALLEL:
        return parallel(served, ids, mask, seed)[0], 1
    out = specdec.infill(
        served, ids, mask, drafter=None if way.name == SEQUENTIAL else way.name, num_speculative_tokens=way.k or 1,
        bonus_token=way.bonus_token, do_sample=seed is not None, seed=seed, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[0], out.speculation.num_target_calls + out.speculation.num_draft_calls


@torch.no_grad()
def parallel(model: XLNetLMHeadModel | XLNet, ids: Tensor, mask: Tensor, seed: int | None) -> Tensor:
    """All hidden positions at once, each sampled alone from its marginal."""
    order = Order.lattice(mask, torch.ones_like(mask))
    rows = rows_of(ids, order, 1)
    network = model.model if isinstance(model, XLNet) else model
    conditionals = Forbidding(conditionals_of(model, order, rows), network.config.mask_token_id)
    count = int(mask.sum())
    scores = conditionals.logits(rows, ids[:, :0], count)[0, 0]
    tokens = scores.argmax(-1)
    if seed is not None:
        uniforms = RowStreams(seed, 1, ids.device).uniforms(np.zeros(1, int), np.zeros(1, int), count, Purpose.DRAFT)
        tokens = sample_tokens(scores.softmax(-1), uniforms[0])
    rows.output_ids = rows.token_ids.clone()
    rows.output_ids[0, int(order.num_visible) : int(order.lengths)] = tokens
    return sequences_of(rows, order, ids)


@torch.no_grad()
def joint_nll(model: XLNetLMHeadModel, filled: Tensor, mask: Tensor) -> float:
    """-log p of the filled tokens, in nats, without the mask token."""
    filled, mask = filled[None].to(model.device), mask[None].to(model.device)
    order = Order.lattice(mask, torch.ones_like(mask))
    ranks = torch.arange(int(order.num_visible), filled.shape[1], device=model.device)[None]
    tokens = filled.gather(1, order.positions)
    logits = XLNet(model).conditional_logits(tokens, order, order.lengths, ranks).float()
    logits[..., model.config.mask_token_id] = float("-inf")
    return -float(logits.log_softmax(-1).gather(2, tokens.gather(1, ranks)[..., None]).sum())


def measure(
    model: XLNetLMHeadModel, ways: Sequence[Way], texts: Sequence[MaskedText], sampled: bool, num_repeats: int
) -> list[Filled]:
    """Every way over all texts; repeat 0 warms up, and its results are kept."""
    found = [Filled([], 0, 0, []) for _ in ways]
    for repeat in range(num_repeats + 1):
        turn = repeat % len(ways)
        for index in [*range(turn, len(ways)), *range(turn)]:
            result, way = found[index], ways[index]
            started = time.perf_counter()
            filled = [fill(model, way, text, i if sampled else None) for i, text in enumerate(texts)]
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                result.seconds.append(time.perf_counter() - started)
            else:
                result.texts = [text.cpu() for text, _ in filled]
                result.num_calls = sum(calls for _, calls in filled)
                result.num_tokens = sum(int(text.mask.sum()) for text in texts)
        log(f"repeat {repeat}/{num_repeats}")
    return found


def entry(way: Way, result: Filled, sequential: Filled, **more: object) -> dict:
    ratios = [a / b for a, b in zip(result.seconds, sequential.seconds, strict=True)]
    return {
        **asdict(way), "label": way.label, **more,
        "num_tokens": result.num_tokens, "num_calls": result.num_calls,
        "calls_per_token": result.num_calls / result.num_tokens,
        "seconds": result.seconds, "median_seconds": float(np.median(result.seconds)),
        "time_over_sequential": float(np.median(ratios)),
    }  # fmt: skip


def part_rates(model: XLNetLMHeadModel, texts: list[Tensor], options: argparse.Namespace) -> list[dict]:
    entries = []
    for rate in options.rates:
        hidden = [MaskedText(ids, hide(ids, rate, i)) for i, ids in enumerate(texts)]
        ways = ways_of(options.ks)
        results = measure(model, ways, hidden, True, options.repeats)
        for way, result in zip(ways, results, strict=True):
            nll = [joint_nll(model, text, h.mask) for text, h in zip(result.texts, hidden, strict=True)]
            per_token = sum(nll) / result.num_tokens
            rates = np.array(nll) / np.array([int(h.mask.sum()) for h in hidden])
            error = float(rates.std(ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else None
            base = baseline(ways, results, way)
            entries.append(entry(way, result, base, mask_rate=rate, nll_per_token=per_token, nll_standard_error=error))
            log(f"{rate:.2f} {way.label}: {entries[-1]['calls_per_token']:.3f} calls per token, {per_token:.3f} nats")
    return entries


def part_lines(
    model: XLNetLMHeadModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], options: argparse.Namespace
) -> list[dict]:
    entries = []
    for kind, height in (("line", 1), ("block", 3)):
        hidden = [masked for i, text in enumerate(texts) if (masked := hide_lines(text, height, i, tokenizer, model))]
        ways = ways_of(options.ks, with_recomputed=False)
        results = measure(model, ways, hidden, False, options.repeats)
        for way, result in zip(ways, results, strict=True):
            pairs = [
                (tokenizer.decode(h.token_ids[h.mask]), tokenizer.decode(text[h.mask]))
                for h, text in zip(hidden, result.texts, strict=True)
            ]
            exact = sum(a.strip() == b.strip() for a, b in pairs) / len(pairs)
            rouge = sum(rouge_l(a.split(), b.split()) for a, b in pairs) / len(pairs)
            base = baseline(ways, results, way)
            entries.append(entry(way, result, base, kind=kind, num_texts=len(pairs), exact_match=exact, rouge_l=rouge))
            log(f"{kind} {way.label}: {exact:.3f} exact, ROUGE-L {rouge:.3f}")
    return entries


def ways_of(ks: Sequence[int], with_recomputed: bool = True) -> list[Way]:
    ways = [Way(SEQUENTIAL), Way(PARALLEL)]
    ways += [Way(name, k) for name in ("self", "ahead", "ngram") for k in ks]
    ways.append(Way("self", 5, bonus_token=False))
    if with_recomputed:
        ways += [Way(SEQUENTIAL, forward="recomputed"), Way("self", 5, forward="recomputed")]
    return ways


def baseline(ways: Sequence[Way], results: Sequence[Filled], way: Way) -> Filled:
    """Sequential filling by the same forward."""
    return results[ways.index(Way(SEQUENTIAL, forward=way.forward))]


def hide(ids: Tensor, rate: float, seed: int) -> Tensor:
    count = min(max(round(rate * len(ids)), 1), len(ids) - 1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(len(ids), dtype=torch.bool).index_fill_(0, order[:count], True)


def hide_lines(
    text: str, height: int, seed: int, tokenizer: PreTrainedTokenizerBase, model: XLNetLMHeadModel
) -> MaskedText | None:
    """`height` lines inside a text, with no blank line at either end; None if there are none."""
    lines = text.split("\n")
    starts = [i for i in range(1, len(lines) - height) if lines[i].strip() and lines[i + height - 1].strip()]
    if not starts:
        return None
    first = starts[int(torch.randint(len(starts), (), generator=torch.Generator().manual_seed(seed)))]
    masked = mask_lines(text, [f"{first + 1}-{first + height}"], tokenizer)
    return masked.around(model.config.max_positions)[0]


def rouge_l(reference: Sequence[str], candidate: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004, "ROUGE", section 3); words are separated by blanks."""
    if not reference or not candidate:
        return float(list(reference) == list(candidate))
    longest = [0] * (len(candidate) + 1)
    for word in reference:
        diagonal = 0
        for j, other in enumerate(candidate, 1):
            here = longest[j]
            longest[j] = diagonal + 1 if word == other else max(here, longest[j - 1])
            diagonal = here
    return 2 * longest[-1] / (len(reference) + len(candidate))


def table(entries: Sequence[dict], columns: Sequence[tuple[str, str, Callable]]) -> str:
    header = "| " + " | ".join(title for title, _, _ in columns) + " |"
    rows = ["| " + " | ".join(show(e[name]) for _, name, show in columns) + " |" for e in entries]
    return "\n".join([header, "|" + " --- |" * len(columns), *rows])


def tables(record: dict) -> str:
    plain, three = str, lambda value: "" if value is None else f"{value:.3f}"
    shared = [("calls / token", "calls_per_token", three), ("time / sequential", "time_over_sequential", three)]
    rates = [("hidden", "mask_rate", plain), ("way", "label", plain), *shared]
    rates += [("nats / token", "nll_per_token", three), ("standard error", "nll_standard_error", three)]
    lines = [("hidden", "kind", plain), ("way", "label", plain), *shared]
    lines += [("exact", "exact_match", three), ("ROUGE-L", "rouge_l", three)]
    return table(record["rates"], rates) + "\n\n" + table(record["lines"], lines)


def plot(record: dict, path: Path, k: int) -> None:
    """Calls per token and likelihood of the samples by mask rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (calls, nll) = plt.subplots(1, 2, figsize=(10, 4))
    for label in dict.fromkeys(e["label"] for e in record["rates"] if e["forward"] == "kept"):
        entries = [e for e in record["rates"] if e["label"] == label]
        if entries[0]["k"] not in (None, k):
            continue
        x = [e["mask_rate"] for e in entries]
        calls.plot(x, [e["calls_per_token"] for e in entries], marker="o", label=label)
        nll.plot(x, [e["nll_per_token"] for e in entries], marker="o", label=label)
    calls.set(xlabel="share of tokens hidden", ylabel="network calls per token", ylim=(0, 1.05))
    nll.set(xlabel="share of tokens hidden", ylabel="nats per token of the samples")
    calls.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ASSETS / "infill_model", help="an any-subset model, with its tokenizer"
    )
    parser.add_argument("--texts", type=Path, default=ASSETS / "demo_pair" / "prompts.json", help="a JSON list")
    parser.add_argument("--num-texts", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.95])
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 5, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    options = parse(sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = XLNetLMHeadModel.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    texts = json.loads(options.texts.read_text(encoding="utf-8"))[: options.num_texts]
    limit = model.config.max_positions
    ids = [torch.tensor(tokenizer(text)["input_ids"][:limit]) for text in texts]
    record = {
        **environment(torch.device(options.device), ["python", "benchmarks/infilling.py", *sys.argv[1:]]),
        "model": {"num_parameters": model.num_parameters(), "max_positions": limit},
        "num_texts": len(texts),
        "text_tokens": {"min": min(map(len, ids)), "mean": sum(map(len, ids)) / len(ids), "max": max(map(len, ids))},
        "rates": part_rates(model, ids, options),
        "lines": part_lines(model, tokenizer, texts, options),
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(tables(record))
    if options.plot is not None:
        plot(record, options.plot, options.ks[len(options.ks) // 2])


if __name__ == "__main__":
    main()
