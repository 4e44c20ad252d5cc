"""What rules that stop a draft can gain, without a clock: replayed on held-out prompts, given where the draft is right.

    python benchmarks/stopping.py --models code-qwen3 --head benchmarks/trained/code-qwen3 --draft-costs 0.12 0.2

Confidence, the product of confidences, the acceptance head and an oracle against the best fixed K, at given costs of a
draft token; a verification costs the same whatever its width, and deciding costs nothing, so this is the most that a
rule can gain. Besides the head, small networks are fitted to half of these prompts, on other signals a rule could use:
the gap to the draft's second token, the entropy, how many of the row's last tokens were accepted. Their gain on the
other half bounds that of a better head on these signals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pairs import DEMO_PAIR, load_pair, positive
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from specdec.bench.methods import Pair
from specdec.bench.report.tables import markdown
from specdec.check.settings import greedy_settings
from specdec.drafters.training.heads.simulate import THRESHOLDS, Trace, compare_rules, product, speed
from specdec.files.environment import environment
from specdec.kernels.commit.token_statistics import token_statistics
from specdec.policies.heads.acceptance_head import AcceptanceHead

DRAFTED = 3  # tokens of the row whose fate is unknown to a decision in the middle of a draft
PRIOR_ACCEPTED, PRIOR_TOKENS = 1.5, 2.0
FEATURES = ("head", "confidence", "gap to the second", "entropy", "last 8 accepted", "last 24 accepted")
SETS = {
    "confidence, gap and entropy": (1, 2, 3),
    "head and confidence": (0, 1),
    "head, confidence, gap and entropy": (0, 1, 2, 3),
    "all of these and the row's history": (0, 1, 2, 3, 4, 5),
}


class Replay(NamedTuple):
    """features: [tokens, 6] float64, by FEATURES; probabilities as their logits."""

    trace: Trace
    features: np.ndarray


@torch.no_grad()
def replays(pair: Pair, head: AcceptanceHead, max_new_tokens: int) -> list[Replay]:
    """One replay per prompt, of the target's greedy continuation."""
    found = []
    with greedy_settings(pair.target):
        for prompt in pair.prompts:
            text = pair.target.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=max_new_tokens
            )[0]
            out = pair.draft(input_ids=text[None, :-1], output_hidden_states=True, use_cache=False)
            log_probs = out.logits[0, len(prompt) - 1 :].float().log_softmax(-1)
            hidden = out.hidden_states[-1][0, len(prompt) - 1 :].float()
            top, token_ids = log_probs.topk(2)
            acceptance = head.log_acceptance(hidden, token_statistics(log_probs, token_ids[:, 0])).exp()
            accepted = (token_ids[:, 0] == text[len(prompt) :]).numpy()
            trace = Trace(accepted, acceptance.double().numpy(), top[:, 0].double().exp().numpy())
            found.append(Replay(trace, features_of(trace, top, log_probs)))
    return found


def features_of(trace: Trace, top: Tensor, log_probs: Tensor) -> np.ndarray:
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    history = [logit(share_of_last(trace.accepted, count)) for count in (8, 24)]
    return np.stack(
        [logit(trace.acceptance), logit(trace.top_prob), (top[:, 0] - top[:, 1]).numpy(), entropy.numpy(), *history], 1
    )


def logit(probabilities: np.ndarray) -> np.ndarray:
    inside = np.clip(probabilities, 1e-4, 1 - 1e-4)
    return np.log(inside / (1 - inside))


def share_of_last(accepted: np.ndarray, count: int) -> np.ndarray:
    """The accepted share of the last `count` tokens whose fate is known, smoothed towards three quarters.

    >>> share_of_last(np.array([True, True, True, False, False]), 8).round(2).tolist()
    [0.75, 0.75, 0.75, 0.75, 0.83]
    """
    known = [accepted[max(0, place - DRAFTED - count) : max(0, place - DRAFTED)] for place in range(len(accepted))]
    return np.array([(part.sum() + PRIOR_ACCEPTED) / (len(part) + PRIOR_TOKENS) for part in known])


def refitted(found: Sequence[Replay], columns: Sequence[int], seed: int = 0) -> list[Trace]:
    """The traces with acceptance predicted by a network that was fitted to every other trace."""
    torch.manual_seed(seed)
    inputs = [torch.tensor(replay.features[:, columns], dtype=torch.float32) for replay in found]
    known = torch.cat(inputs[::2])
    labels = torch.cat([torch.tensor(replay.trace.accepted, dtype=torch.float32) for replay in found[::2]])
    mean, spread = known.mean(0), known.std(0) + 1e-6
    network = nn.Sequential(nn.Linear(len(columns), 8), nn.SiLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network((known - mean) / spread)[:, 0], labels).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = [network((x - mean) / spread)[:, 0].sigmoid().double().numpy() for x in inputs]
    return [replace(replay.trace, acceptance=row) for replay, row in zip(found, predicted, strict=True)]


def gains(found: Sequence[Replay], draft_cost: float) -> dict[str, float]:
    """Gains over the best fixed K. Each rule's setting and K are chosen on every other prompt, judged on the rest."""
    rules = compare_rules([replay.trace for replay in found], draft_cost)
    result = {f"best fixed K = {rules['fixed']['setting']:g}": 0.0}
    result |= {name: rules[name]["gain"] for name in ("confidence", "product of confidences", "head", "oracle")}
    for name, columns in SETS.items():
        traces = refitted(found, columns)
        threshold = max(THRESHOLDS, key=lambda t: speed(traces[::2], product("acceptance", t), draft_cost))
        gain = speed(traces[1::2], product("acceptance", threshold), draft_cost) / rules["fixed"]["speed"] - 1
        result[f"fitted: {name}"] = round(gain, 4)
    return result


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=DEMO_PAIR, help="folder with target/, draft/ and prompts.json")
    parser.add_argument("--head", type=Path, help="folder with an acceptance head, by default the draft's")
    parser.add_argument("--num-prompts", type=positive, default=100)
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--draft-costs", type=float, nargs="+", default=[0.12, 0.2], help="in target calls")
    parser.add_argument("--json", type=Path, required=True, help="the record")
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    pair = load_pair(arguments.models, arguments.num_prompts, torch.float32, torch.device("cpu"))
    head = AcceptanceHead.load(arguments.head or arguments.models / "draft").eval()
    head.check(pair.target, pair.draft)
    found = replays(pair, head, arguments.max_new_tokens)
    by_cost = {f"{cost:g}": gains(found, cost) for cost in arguments.draft_costs}
    rows = [(f"{cost}", name, f"{gain:+.1%}") for cost, rules in by_cost.items() for name, gain in rules.items()]
    print(markdown(("draft cost", "rule", "over the best fixed K"), rows))
    record = environment(torch.device("cpu"), ["python", "benchmarks/stopping.py", *argv])
    about = {"models": pair.name, "num_prompts": len(found), "max_new_tokens": arguments.max_new_tokens}
    record |= about | {"gain_by_draft_cost": by_cost}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
