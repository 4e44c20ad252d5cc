"""Is speculative output the target's own? Token for token against transformers' plain greedy decoding.

The oracle is `model.generate` on one prompt at a time: no batch, no padding, no draft. Each row's first difference is
judged (later tokens continue different texts): rounding can only exchange tokens whose logits it can exchange, so a
difference is a tie where the target's margin is within twice the measured error of a logit, and a bug elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.check.oracle import Run, is_exact, oracle_of, run_plain, run_speculative
from specdec.check.progress import OnProgress, tell
from specdec.check.referee import TIE_MULTIPLE, Referee, name_of
from specdec.check.settings import greedy_settings
from specdec.check.ways import Way, generate_options
from specdec.drafter import Drafter
from specdec.engine.metrics import Speculation
from specdec.errors import ConfigError, InputError
from specdec.files.environment import versions
from specdec.network.base import evaluating, num_embeddings_of
from specdec.network.refusals import check_architecture, check_lengths, check_model
from specdec.options.inputs import check_input_ids
from specdec.options.speculation import SpeculativeConfig, speculative_config
from specdec.policies.fixed import DEFAULT_FIXED

TIE, BUG = "tie", "bug"


@dataclass(frozen=True)
class Divergence:
    """The first difference of one row.

    prompt: 0-based index. position: 0-based, among the new tokens. expected_token_id, actual_token_id: plain greedy's
    and ours, None where that output had ended. margin: the target's logit(expected) - logit(actual).
    noise, noise_all_tokens, rounding: see `referee.Judgement`. All four are None where a token is missing.
    kind: tie or bug.
    """

    prompt: int
    position: int
    expected_token_id: int | None
    actual_token_id: int | None
    margin: float | None
    kind: str
    noise: float | None = None
    noise_all_tokens: float | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class EquivalenceReport:
    """What `check_equivalence` found.

    Rates count new tokens up to each row's end; plain decoding runs one prompt at a time. margin_dtype: None if nothing
    had to be judged; margin_note: why it is not float64. options: further keywords of `generate`. ignored_settings:
    what the model's generation config asks for and neither run did. is_exact: whether the target ran batch-invariant
    kernels, in both runs; then every difference is a bug.
    """

    num_prompts: int
    num_equal: int
    divergences: list[Divergence]
    plain_tokens_per_second: float
    speculative_tokens_per_second: float
    speculation: Speculation
    drafter: str
    batch_size: int
    num_speculative_tokens: int
    max_new_tokens: int
    dtype: str
    device: str
    margin_dtype: str | None
    margin_note: str
    options: dict[str, Any] = field(default_factory=dict)
    ignored_settings: dict[str, Any] = field(default_factory=dict)
    is_exact: bool = False

    @property
    def equivalent(self) -> bool:
        """Whether every row is equal; a tie is a difference too."""
        return self.num_equal == self.num_prompts

    @property
    def num_ties(self) -> int:
        return sum(divergence.kind == TIE for divergence in self.divergences)

    @property
    def only_ties(self) -> bool:
        return all(divergence.kind == TIE for divergence in self.divergences)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the versions that produced it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "equivalent": self.equivalent,
            **fields,
            "divergences": [asdict(divergence) for divergence in self.divergences],
            "mean_acceptance_length": self.speculation.mean_acceptance_length,
            "draft_acceptance_rate": self.speculation.draft_acceptance_rate,
            "speculation": self.speculation.to_dict(),
            "tie_multiple": TIE_MULTIPLE,
            "versions": versions(),
        }


def check_equivalence(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    drafter: Drafter | PreTrainedModel | str | None = None,
    batch_size: int = 8,
    num_speculative_tokens: int = DEFAULT_FIXED,
    max_new_tokens: int = 64,
    on_progress: OnProgress | None = None,
    exact: bool = True,
) -> EquivalenceReport:
    """Decode all prompts plainly and speculatively, compare token ids, judge the differences.

    prompts: [length] integer tensors without padding. drafter: as in `specdec.generate`; None checks plain decoding.
    batch_size: rows decoded together. exact: as in `generate`. Both runs are greedy, whatever the model's generation
    config says.

    Raises SpecDecError before any token is generated if something cannot be checked.
    """
    speculation = speculative_config(drafter, None if drafter is None else num_speculative_tokens, target=model)
    way = Way(speculation.drafter.name, speculation.num_speculative_tokens, batch_size)
    return check_matrix(model, prompts, [way], {way.drafter: speculation.drafter}, max_new_tokens, on_progress, exact)[
        0
    ]


def check_matrix(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    ways: Sequence[Way],
    drafters: Mapping[str, Drafter | PreTrainedModel | str],
    max_new_tokens: int = 64,
    on_progress: OnProgress | None = None,
    exact: bool = True,
) -> list[EquivalenceReport]:
    """`check_equivalence` for every way, against one plain run. drafters: by the names that the ways give them.

    Raises SpecDecError before any token is generated if something cannot be checked.
    """
    check_model(model)
    configs = [
        speculative_config(drafters.get(way.drafter), way.num_speculative_tokens, **generate_options(way))
        for way in ways
    ]
    for way, config in zip(ways, configs, strict=True):
        check_prompts(model, prompts, config, way.batch_size, max_new_tokens)
    reports = []
    with greedy_settings(model) as ignored, evaluating(model):
        with oracle_of(model, exact):
            run_plain(model, prompts[:1], min(max_new_tokens, 2))
            plain = run_plain(model, prompts, max_new_tokens, on_progress)
        for way, config in zip(ways, configs, strict=True):
            # Packs, probes and compiles; long enough that drafts are verified.
            warm_up = min(max_new_tokens, config.num_speculative_tokens + 2)
            options = {**generate_options(way), "exact": exact}
            run_speculative(model, prompts[: way.batch_size], config, way.batch_size, warm_up, options=options)
            ours = run_speculative(model, prompts, config, way.batch_size, max_new_tokens, on_progress, options)
            reports.append(compare(model, prompts, way, config, max_new_tokens, plain, ours, on_progress))
    is_same_bits = is_exact(model, exact)
    return [settled(replace(report, ignored_settings=ignored), is_same_bits) for report in reports]


def settled(report: EquivalenceReport, is_same_bits: bool) -> EquivalenceReport:
    """is_same_bits: both runs had the same arithmetic, so that a difference is no tie."""
    divergences = report.divergences
    if is_same_bits:
        divergences = [replace(divergence, kind=BUG) for divergence in divergences]
    return replace(report, divergences=divergences, is_exact=is_same_bits)


def compare(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    way: Way,
    config: SpeculativeConfig,
    max_new_tokens: int,
    plain: Run,
    ours: Run,
    on_progress: OnProgress | None,
) -> EquivalenceReport:
    """Judge each row's first difference, within `greedy_settings`."""
    places = first_differences(plain.outputs, ours.outputs)
    referee = Referee(model, config.num_speculative_tokens, way.batch_size) if places else None
    divergences = []
    for row, position in places.items():
        assert referee is not None
        divergences.append(judge(referee, row, position, prompts[row], plain.outputs[row], ours.outputs[row]))
        tell(on_progress, "judging", 1)
    return EquivalenceReport(
        num_prompts=len(prompts),
        num_equal=len(prompts) - len(divergences),
        divergences=divergences,
        plain_tokens_per_second=plain.tokens_per_second,
        speculative_tokens_per_second=ours.tokens_per_second,
        speculation=ours.speculation,
        drafter=config.drafter.name,
        batch_size=way.batch_size,
        num_speculative_tokens=config.num_speculative_tokens,
        max_new_tokens=max_new_tokens,
        dtype=name_of(model.dtype),
        device=str(model.device),
        margin_dtype=referee.margin_dtype if referee else None,
        margin_note=referee.margin_note if referee else "",
        options=generate_options(way),
    )


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Tensor], config: SpeculativeConfig, batch_size: int, max_new_tokens: int
) -> None:
    """Raise SpecDecError for whatever `generate` would refuse in some later batch."""
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    if not len(prompts):
        raise InputError("there are no prompts; pass at least one")
    vocab_size = num_embeddings_of(model)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor) or prompt.dim() != 1:
            shape = list(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            raise InputError(f"prompt {row} is {shape}; pass a [length] integer tensor")
        if not len(prompt):
            raise InputError(f"prompt {row} is empty; a prompt needs at least one token")
        try:
            check_input_ids(prompt[None], vocab_size)
        except InputError as error:
            raise InputError(f"prompt {row}: {error}") from None
    max_length = max(map(len, prompts)) + max_new_tokens
    check_architecture(model, config.layout)
    check_lengths(model, max_length)
    config.check(model, max_length)


def judge(
    referee: Referee, row: int, position: int, prompt: Tensor, expected: list[int], actual: list[int]
) -> Divergence:
    """A missing token is a bug: both runs stop for the same reasons, so no rounding explains it."""
    if position >= min(len(expected), len(actual)):
        tokens = [output[position] if position < len(output) else None for output in (expected, actual)]
        return Divergence(row, position, tokens[0], tokens[1], None, BUG)
    pair = expected[position], actual[position]
    verdict = referee.judge(prompt, expected[:position], *pair)
    errors = verdict.noise, verdict.noise_all_tokens, verdict.rounding
    return Divergence(row, position, *pair, verdict.margin, TIE if verdict.is_tie else BUG, *errors)


def first_differences(expected: Sequence[list[int]], actual: Sequence[list[int]]) -> dict[int, int]:
    """Row -> position of its first difference, for the rows that differ; a missing token differs from any."""
    places = {}
    for row, pair in enumerate(zip(expected, actual, strict=True)):
        position = next((i for i, (a, b) in enumerate(zip_longest(*pair)) if a != b), None)
        if position is not None:
            places[row] = position
    return places
