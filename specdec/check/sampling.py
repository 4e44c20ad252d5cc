"""Does sampled output follow the target? Two tests of the decoder as it runs here, and a planted bug for each.

Next token: each prompt is continued many times. Wherever many continuations share a beginning, the tokens after it are
a sample of the target's distribution there, which one plain forward and transformers' own warpers tell exactly. The
places are tested one by one (Williams-corrected G) and all together, and so are the ranks that all tokens take in their
distributions, whatever they follow. Whole sequence: a tiny random model whose every output can be enumerated.

The planted bug is a verification that accepts every draft: the same test with the same numbers must reject it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec.api.generate import generate
from specdec.check.goodness import MIN_EXPECTED, POWER, GoodnessOfFit, detectable_distance, g_test, pooled
from specdec.check.progress import OnProgress, tell
from specdec.check.settings import greedy_settings
from specdec.check.ways import PLAIN, Way
from specdec.drafter import Drafter
from specdec.engine.metrics import acceptance_length
from specdec.errors import ConfigError
from specdec.files.environment import versions
from specdec.network.base import vocab_size_of
from specdec.verify.lossy import Lossy, Typical

ALPHA = 1e-3  # of all tests of a check together
PROMPT_TOKENS = 16  # of each prompt; a longer text makes no other test, and a slower one
RANK_CELLS = 20
FORWARD_ELEMENTS = 2**22  # logits of one plain forward
MIN_SHARED = 100  # continuations that must share a beginning
MAX_PLACES = 100  # tested per prompt; those that most continuations share
CONTROL = Typical(1e-12, 1e-12)  # every draft is typical enough
TINY_VOCAB, TINY_LENGTH, TINY_K = 3, 4, 3


@dataclass(frozen=True)
class SamplingTest:
    """One test of one way to decode.

    kind: "next token" or "whole sequence". is_control: the planted bug, which must be rejected.
    num_samples: tokens, or sequences. num_places: beginnings at which the next token was tested.
    p_value: of all together. worst_p_value: of the worst place, times the number of places. rank_p_value: of where all
        verified tokens stand in their distributions, shared places or not.
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
    rank_p_value: float
    detectable_distance: float
    tokens_per_step: float
    alpha: float

    @property
    def rejected(self) -> bool:
        return min(self.p_value, self.worst_p_value, self.rank_p_value) < self.alpha

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

    Raises SpecDecError before any token is generated if something cannot be served, and ConfigError after a way's
    continuations if they are too few, or too much alike, to test anything.
    """
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **(options or {})}
    if num_samples < MIN_SHARED:
        raise ConfigError(
            f"num_samples={num_samples}: no place is tested unless {MIN_SHARED} continuations reach it; raise "
            "num_samples (--num-samples)"
        )
    if max_new_tokens < 2:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} verifies no draft, the first token being the prompt's own; pass 2 or "
            "more (--max-new-tokens)"
        )
    plain = [way for way in ways if way.drafter == PLAIN]
    if plain:
        raise ConfigError("plain decoding verifies nothing; pass a drafter to check sampling with")
    methods: list[str | Lossy] = [*verifications, CONTROL]
    cells = [(way, method) for way in ways for method in methods]
    alpha = ALPHA / (3 * (len(cells) + len(methods)))  # three p-values each
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
    """Sampled continuations of prompts by one way, and how likely the target finds each of their tokens."""

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
        self.fits: list[GoodnessOfFit] = []
        self.num_continuations, self.num_samples, self.lengths = 0, 0, [0, 0]  # tokens of steps, and steps
        self.ranks = torch.zeros(RANK_CELLS, dtype=torch.long)
        self.ends = set(torch.as_tensor(model.generation_config.eos_token_id or []).flatten().tolist())

    def add(self, prompt: Tensor, num_samples: int, seed: int) -> None:
        """Continue a prompt `num_samples` times and look at every token."""
        rows = self._sampled(prompt, num_samples, seed)
        self.num_continuations += len(rows)
        followers: dict[tuple[int, ...], Counter[int]] = {}
        for tokens in rows:
            for place, token in enumerate(tokens):
                followers.setdefault(tuple(tokens[:place]), Counter())[token] += 1
        shared = [begin for begin, counts in followers.items() if counts.total() >= MIN_SHARED]
        shared = sorted(shared, key=lambda begin: -followers[begin].total())[:MAX_PLACES]
        left, generator = set(shared), torch.Generator().manual_seed(seed)
        for tokens, probs in self._with_probs(prompt, rows):
            for place in range(len(tokens)):
                begin = tuple(tokens[:place])
                if begin in left:
                    left.remove(begin)
                    self._test(followers[begin], probs[place])
            # The first token is the prefill's; the others have been verified.
            self.ranks += rank_cells(probs[1:], torch.tensor(tokens[1:], dtype=torch.long), generator)

    def _test(self, counts: Counter[int], probs: Tensor) -> None:
        observed = torch.zeros(len(probs), dtype=torch.long)
        observed[list(counts)] = torch.tensor(list(counts.values()))
        fit = g_test(observed, probs)
        if fit.freedom:
            self.fits.append(fit)
            self.num_samples += counts.total()

    def test(self, alpha: float) -> SamplingTest:
        """Raises ConfigError if there is nothing to test: a test that could not reject says nothing."""
        if not self.fits:
            raise ConfigError(
                f"{self.way.name}: nothing could be tested, for nowhere do two tokens each expect {MIN_EXPECTED} of "
                f"{self.num_continuations} continuations with {self.max_new_tokens} new tokens and {self.options}; "
                "raise num_samples (--num-samples) or max_new_tokens (--max-new-tokens), or choose a temperature "
                "nearer to 1 (--temperature)"
            )
        together = pooled(self.fits)
        worst = min((fit.p_value for fit in self.fits), default=1.0)
        ranks = g_test(self.ranks, torch.full((RANK_CELLS,), 1 / RANK_CELLS, dtype=torch.float64))
        name = f"{self.way.name} K={self.way.num_speculative_tokens}, {name_of(self.method)}"
        return SamplingTest(
            name, "next token", self.method == CONTROL, self.num_samples, len(self.fits), together.statistic,
            together.freedom, together.p_value, min(1.0, worst * len(self.fits)), ranks.p_value,
            detectable_distance(self.num_samples, together.freedom, alpha),
            acceptance_length(*self.lengths), alpha,
        )  # fmt: skip

    def _sampled(self, prompt: Tensor, num_samples: int, seed: int) -> list[list[int]]:
        """The new tokens of each continuation, up to and with its end of sequence."""
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
            for tokens in out.sequences[:, len(prompt) :].tolist():
                end = next((place + 1 for place, token in enumerate(tokens) if token in self.ends), len(tokens))
                rows.append(tokens[:end])
            self.lengths[0] += out.speculation.num_step_tokens
            self.lengths[1] += out.speculation.num_spec_steps
        return rows

    @torch.no_grad()
    def _with_probs(self, prompt: Tensor, rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Each continuation with the target's distribution of each of its tokens, [tokens, vocab] float64 on the CPU:
        by plain forwards of whole texts and transformers' own warpers."""
        size = max(FORWARD_ELEMENTS // (self.max_new_tokens * vocab_size_of(self.model)), 1)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            texts = [[*prompt.tolist(), *tokens[:-1]] for tokens in part]
            longest = max(map(len, texts))
            # Attention is causal: tokens after a text's end change nothing before it.
            ids = torch.tensor([text + text[:1] * (longest - len(text)) for text in texts], device=self.model.device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, len(prompt) - 1 :]
            for tokens, own in zip(part, logits, strict=True):
                yield tokens, torch.softmax(self._warpers(None, own[: len(tokens)].float()).double(), -1).cpu()

    @cached_property
    def _warpers(self) -> Any:
        config = GenerationConfig(do_sample=True, **self.options)
        return self.model._get_logits_processor(
            generation_config=config, input_ids_seq_length=1, device=self.model.device, model_kwargs={}
        )


def rank_cells(probs: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """How many tokens fall into each of RANK_CELLS equal parts of their own distribution, the likeliest first.

    The mass of all likelier tokens plus a random part of a token's own is uniform if the token follows (a randomised
    probability integral transform), so that tokens of any places can be counted together.
    probs: [tokens, vocab] float64. tokens: [tokens] int64.
    """
    own = probs.gather(1, tokens[:, None])
    is_ahead = (probs > own) | ((probs == own) & (torch.arange(probs.shape[1]) < tokens[:, None]))
    uniform = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    place = (probs * is_ahead).sum(1) + uniform * own[:, 0]
    return (place * RANK_CELLS).long().clamp(max=RANK_CELLS - 1).bincount(minlength=RANK_CELLS)


def whole_sequence_test(
    method: str | Lossy, num_samples: int, seed: int, alpha: float, device: torch.device
) -> SamplingTest:
    """Whole outputs of a tiny random model, drafted by another, against the enumerated joint."""
    target, draft = (tiny_model(number).to(device) for number in (3, 2))
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
        fit.freedom, fit.p_value, 1.0, 1.0, detectable_distance(num_samples, fit.freedom, alpha),
        out.speculation.mean_acceptance_length, alpha,
    )  # fmt: skip


def tiny_model(seed: int) -> PreTrainedModel:
    """A random model over TINY_VOCAB tokens, neither flat nor peaked; torch's global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=TINY_VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.17, bos_token_id=None, eos_token_id=None, pad_token_id=None,
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
