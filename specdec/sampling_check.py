"""Does sampled output follow the target? Two tests of the decoder as it runs here, and a planted bug for each.

Next token: each prompt is continued many times. Wherever many continuations share a beginning, the tokens behind it are
a sample of the target's distribution there, which one plain forward and transformers' own warpers tell exactly. The
places are tested one by one (Williams-corrected G) and all together. Whole sequence: a tiny random model whose every
output can be enumerated.

The planted bug is a verification that accepts every draft: the same test with the same numbers must reject it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec.drafter import Drafter
from specdec.environment import versions
from specdec.errors import ConfigError
from specdec.generate import generate
from specdec.goodness import POWER, Fit, detectable_distance, g_test, pooled
from specdec.lossy import Lossy, Typical
from specdec.oracle import OnProgress, greedy_settings, tell
from specdec.ways import PLAIN, Way

ALPHA = 1e-3  # of all tests of a check together
PROMPT_TOKENS = 16  # of each prompt; a longer text makes no other test, and a slower one
MIN_SHARED = 100  # continuations that must share a beginning
MAX_PLACES = 100  # tested per prompt; those that most continuations share
CONTROL = Typical(1e-12, 1e-12)  # every draft is typical enough
TINY_VOCAB, TINY_LENGTH, TINY_K = 3, 4, 3


@dataclass(frozen=True)
class SamplingTest:
    """One test of one way to decode.

    kind: "next token" or "whole sequence". is_control: the planted bug, which must be rejected.
    num_samples: tokens, or sequences. num_places: beginnings at which the next token was tested.
    p_value: of all together. worst_p_value: of the worst place, times the number of places.
    detectable_distance: the total variation at every place that is found with probability `goodness.POWER`.
    tokens_per_step: what the drafts gained; 1 means that nothing was verified.
    """

    name: str
    kind: str
    is_control: bool
    num_samples: int
    num_places: int
    statistic: float
    freedom: int
    p_value: float
    worst_p_value: float
    detectable_distance: float
    tokens_per_step: float
    alpha: float

    @property
    def rejected(self) -> bool:
        return min(self.p_value, self.worst_p_value) < self.alpha

    @property
    def passed(self) -> bool:
        return self.rejected == self.is_control


@dataclass(frozen=True)
class SamplingReport:
    """alpha: the chance that a correct decoder fails the check, shared out among the tests. options: of sampling."""

    tests: list[SamplingTest]
    seed: int
    options: dict[str, Any]
    ignored_settings: dict[str, Any] = field(default_factory=dict)
    alpha: float = ALPHA

    @property
    def passed(self) -> bool:
        return all(test.passed for test in self.tests)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the versions that produced it."""
        tests = [{**asdict(test), "rejected": test.rejected, "passed": test.passed} for test in self.tests]
        own = {"seed": self.seed, "options": self.options, "ignored_settings": self.ignored_settings}
        return {
            "passed": self.passed, "alpha": self.alpha, "power": POWER, "tests": tests, **own, "versions": versions()
        }  # fmt: skip


def check_sampling(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    ways: Sequence[Way],
    drafters: Mapping[str, Drafter | PreTrainedModel | str],
    verifications: Sequence[str] = ("token", "block"),
    num_samples: int = 500,
    max_new_tokens: int = 8,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> SamplingReport:
    """Test every way with every verification, and each way with the planted bug.

    prompts: [length] integer tensors, of which the first PROMPT_TOKENS count. num_samples: continuations
        of each. options: temperature, top_k, top_p, min_p.
    Settings of the model's generation config beyond special tokens are ignored, and listed in the report.

    Raises SpecDecError before any token is generated if something cannot be served.
    """
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **(options or {})}
    plain = [way for way in ways if way.drafter == PLAIN]
    if plain:
        raise ConfigError("plain decoding verifies nothing; pass a drafter to check sampling with")
    methods: list[str | Lossy] = [*verifications, CONTROL]
    cells = [(way, method) for way in ways for method in methods]
    alpha = ALPHA / (2 * (len(cells) + len(methods)))
    tests = [whole_sequence_test(method, 12 * num_samples, seed, alpha, model.device) for method in methods]
    with greedy_settings(model) as ignored:
        for way, method in cells:
            continued = Continuations(model, drafters[way.drafter], way, method, max_new_tokens, chosen)
            for index, prompt in enumerate(prompts):
                continued.add(prompt[:PROMPT_TOKENS], num_samples, seed + index)
                tell(on_progress, "sampling", 1)
            tests.append(continued.test(alpha))
    return SamplingReport(tests, seed, chosen, ignored)


def name_of(method: str | Lossy) -> str:
    return "accepts everything (planted bug)" if method == CONTROL else str(method)


class Continuations:
    """Sampled continuations of prompts by one way, counted by what they begin with."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | PreTrainedModel | str,
        way: Way,
        method: str | Lossy,
        max_new_tokens: int,
        options: Mapping[str, Any],
    ):
        self.model, self.drafter, self.way, self.method = model, drafter, way, method
        self.max_new_tokens, self.options = max_new_tokens, dict(options)
        self.fits: list[Fit] = []
        self.num_samples, self.lengths = 0, [0.0, 0.0]  # accepted tokens and steps

    def add(self, prompt: Tensor, num_samples: int, seed: int) -> None:
        """Continue a prompt `num_samples` times and test the next token behind every beginning that many share."""
        followers: dict[tuple[int, ...], Counter[int]] = {}
        ends = set(torch.as_tensor(self.model.generation_config.eos_token_id or []).flatten().tolist())
        for tokens in self._sampled(prompt, num_samples, seed):
            for place, token in enumerate(tokens):
                followers.setdefault(tuple(tokens[:place]), Counter())[token] += 1
                if token in ends:
                    break
        shared = [begin for begin, counts in followers.items() if counts.total() >= MIN_SHARED]
        shared.sort(key=lambda begin: -followers[begin].total())
        for begin in shared[:MAX_PLACES]:
            counts = followers[begin]
            probs = self._probs(torch.cat([prompt, torch.tensor(begin, dtype=torch.long)]))
            observed = torch.zeros(len(probs), dtype=torch.long)
            observed[list(counts)] = torch.tensor(list(counts.values()))
            fit = g_test(observed, probs)
            if fit.freedom:
                self.fits.append(fit)
                self.num_samples += counts.total()

    def test(self, alpha: float) -> SamplingTest:
        together = pooled(self.fits)
        worst = min((fit.p_value for fit in self.fits), default=1.0)
        name = f"{self.way.name} K={self.way.num_speculative_tokens}, {name_of(self.method)}"
        return SamplingTest(
            name, "next token", self.method == CONTROL, self.num_samples, len(self.fits), together.statistic,
            together.freedom, together.p_value, min(1.0, worst * len(self.fits)),
            detectable_distance(self.num_samples, together.freedom, alpha),
            1 + self.lengths[0] / max(self.lengths[1], 1), alpha,
        )  # fmt: skip

    def _sampled(self, prompt: Tensor, num_samples: int, seed: int) -> list[list[int]]:
        rows: list[list[int]] = []
        while len(rows) < num_samples:
            count = min(self.way.batch_size, num_samples - len(rows))
            out: Any = generate(
                self.model,
                prompt.to(self.model.device).expand(count, -1),
                drafter=self.drafter,
                num_speculative_tokens=self.way.num_speculative_tokens,
                verification=self.method,
                do_sample=True,
                max_new_tokens=self.max_new_tokens,
                seed=[seed * 2**32 + len(rows) + row for row in range(count)],
                return_dict_in_generate=True,
                **self.options,
            )
            rows += out.sequences[:, len(prompt) :].tolist()
            self.lengths[0] += out.speculation.num_accepted_draft_tokens
            self.lengths[1] += out.speculation.num_spec_steps
        return rows

    @torch.no_grad()
    def _probs(self, ids: Tensor) -> Tensor:
        """The target's distribution behind a text, [vocab] float64, by one plain forward and transformers' warpers."""
        ids = ids[None].to(self.model.device)
        scores = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float()
        return torch.softmax(self._warpers()(ids, scores)[0].double(), -1).cpu()

    def _warpers(self) -> Any:
        config = GenerationConfig(do_sample=True, **self.options)
        return self.model._get_logits_processor(
            generation_config=config, input_ids_seq_length=1, device=self.model.device, model_kwargs={}
        )


def whole_sequence_test(
    method: str | Lossy, num_samples: int, seed: int, alpha: float, device: torch.device
) -> SamplingTest:
    """Whole outputs of a tiny random model, drafted by another, against the enumerated joint."""
    target, draft = (tiny_model(number).to(device) for number in (0, 5))
    prompt = torch.tensor([1, 2, 1, 0], device=device)
    out: Any = generate(
        target, prompt.expand(num_samples, -1), drafter=draft, num_speculative_tokens=TINY_K, verification=method,
        do_sample=True, top_k=0, max_new_tokens=TINY_LENGTH, seed=seed, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    radix = TINY_VOCAB ** torch.arange(TINY_LENGTH - 1, -1, -1)
    counts = (out.sequences[:, len(prompt) :].cpu() @ radix).bincount(minlength=TINY_VOCAB**TINY_LENGTH)
    fit = g_test(counts, joint_of(target, prompt))
    return SamplingTest(
        f"tiny model K={TINY_K}, {name_of(method)}", "whole sequence", method == CONTROL, num_samples, 1, fit.statistic,
        fit.freedom, fit.p_value, 1.0, detectable_distance(num_samples, fit.freedom, alpha),
        out.speculation.mean_acceptance_length, alpha,
    )  # fmt: skip


def tiny_model(seed: int) -> PreTrainedModel:
    """A random model over TINY_VOCAB tokens, neither flat nor peaked; torch's global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=TINY_VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


@torch.no_grad()
def joint_of(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """The probability of every output of TINY_LENGTH tokens in lexical order, [vocab ** length] float64."""
    outputs = torch.tensor(list(itertools.product(range(TINY_VOCAB), repeat=TINY_LENGTH)), device=prompt.device)
    ids = torch.cat([prompt.expand(len(outputs), -1), outputs], 1)
    logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double()
    chances = logits.log_softmax(-1).gather(2, outputs[..., None]).squeeze(2)
    joint = chances.sum(1).exp().cpu()
    assert math.isclose(float(joint.sum()), 1, rel_tol=1e-5)
    return joint / joint.sum()
