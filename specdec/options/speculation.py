"""How a caller configures the speculation: the drafter, the number of tokens, the source of random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, PreTrainedModel

from specdec.batch.layout import Layout, Ragged, resolve_layout
from specdec.drafter import Drafter, NoDrafts, check_contract
from specdec.errors import ConfigError, DrafterError
from specdec.limits import MAX_DRAFT_TOKENS
from specdec.network.extra_queries import check_extra_queries
from specdec.network.refusals import check_architecture, of_a_draft_model
from specdec.options.aliases import POLICY_ALIASES
from specdec.options.generation import is_whole
from specdec.policies.by_estimate import Confidence
from specdec.policies.fixed import DEFAULT_FIXED, Fixed
from specdec.policies.heuristic import Heuristic
from specdec.policies.registry import resolve_length_policy
from specdec.policy import LengthPolicy
from specdec.verify.lossy import GREEDY, SAMPLED, Lossy
from specdec.verify.random_streams import RowStreams

# What `drafter=` takes; `drafters/registry.py` has the grammar of text. A list names candidates, None plain decoding.
DrafterLike: TypeAlias = Drafter | PreTrainedModel | str | PathLike | Sequence | None
VERIFICATIONS = ("token", "block")
SCHEDULES = ("constant", "heuristic", "heuristic_transient")  # transformers' names


@dataclass(frozen=True)
class SpeculativeConfig:
    """The drafter, the most tokens it drafts per row and step (1 to 32), the layout of the caches, and the policy that
    decides how many tokens are drafted."""

    drafter: Drafter
    num_speculative_tokens: int
    layout: Layout = field(default_factory=Ragged)
    length_policy: LengthPolicy = field(default_factory=Fixed)

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        """Raise a SpecDecError if drafter or policy cannot serve `target` for sequences of `max_length` tokens."""
        check_drafter(self.drafter, target, self.layout, max_length)
        self.length_policy.check(target, self.drafter)

    @property
    def spare_slots(self) -> int:
        """The most slots that a step may write after a row's committed tokens: the draft, the last token's own keys,
        and the extra queries after each of them."""
        return (self.num_speculative_tokens + 1) * (1 + self.drafter.num_extra_queries)


def check_drafter(drafter: Drafter, target: PreTrainedModel, layout: Layout, max_length: int) -> None:
    """Raise a SpecDecError if the drafter cannot serve `target` in this layout for sequences of `max_length` tokens."""
    check_contract(drafter)
    if drafter.kv_model is not None:
        with of_a_draft_model():
            check_architecture(drafter.kv_model, layout)
    drafter.check(target, max_length)
    if drafter.num_extra_queries:
        check_extra_queries(target, layout)


def speculative_config(
    drafter: DrafterLike,
    num_speculative_tokens: int | None,
    config: GenerationConfig | None = None,
    explicit: AbstractSet[str] = frozenset(),
    assistant_model: PreTrainedModel | None = None,
    layout: Layout | str = "ragged",
    length_policy: LengthPolicy | str | None = None,
    target: PreTrainedModel | None = None,
) -> SpeculativeConfig:
    """The speculation requested by our arguments and transformers'; without any, plain decoding.

    explicit: the fields of `config` that were keywords. If a drafter is chosen, fields set by a config object or the
        model's own config count too, unless a keyword overrides them; transformers' defaults do not count.
    target: the model that is decoded, for drafters that are named by a folder.

    Raises DrafterError or ConfigError for contradictions and for numbers outside 1 .. 32.
    """
    from specdec.drafters.registry import only_one, resolve

    drafter = only_one(drafter)
    chosen_layout = resolve_layout(layout)
    lookup = config.prompt_lookup_num_tokens if config is not None else None
    named = [
        name
        for name, value in (
            ("drafter", drafter),
            ("assistant_model", assistant_model),
            ("prompt_lookup_num_tokens", lookup),
        )
        if value is not None
    ]
    if len(named) > 1:
        raise DrafterError(f"{' and '.join(named)} both choose a drafter; pass one of them")
    if lookup is not None:
        drafter = "prompt_lookup"
    elif assistant_model is not None:
        drafter = assistant_model
    is_lookup = isinstance(drafter, str) and drafter == "prompt_lookup"
    has_number = num_speculative_tokens is not None or lookup is not None
    asked = {
        "num_assistant_tokens": drafter is not None and not has_number,
        "max_matching_ngram_size": is_lookup,
    }
    values = {name: asked_for(config, name, name in explicit, by_config) for name, by_config in asked.items()}
    name, k = draft_tokens(num_speculative_tokens, lookup, values["num_assistant_tokens"])
    policy = length_policy_of(length_policy, config, k, target)
    ngram = values["max_matching_ngram_size"]
    if ngram is not None and not is_lookup:
        raise ConfigError(f"max_matching_ngram_size={ngram} belongs to prompt lookup; add drafter='prompt_lookup'")
    if drafter is None:
        if k is not None:
            raise DrafterError(
                f"{name}={k} without a drafter; pass drafter=, or leave the number out for plain decoding"
            )
        if not is_default(length_policy) or not explicit.isdisjoint(POLICY_ALIASES):
            raise DrafterError(f"length_policy {policy.name!r} without a drafter; pass drafter=, or leave it out")
        return SpeculativeConfig(NoDrafts(), 1, chosen_layout)
    if ngram is not None and not (is_whole(ngram) and ngram >= 1):
        raise ConfigError(f"max_matching_ngram_size={ngram!r} is not a number of tokens; choose 1 or more")
    chosen = resolve(drafter, target, **({} if ngram is None else {"max_ngram_size": ngram}))
    if is_default(length_policy) and isinstance(policy, Heuristic):
        k = MAX_DRAFT_TOKENS  # transformers' number applies only to the first draft
    return SpeculativeConfig(chosen, k or policy.default_tokens, chosen_layout, policy)


def names_folder(drafter: object) -> bool:
    """Whether a drafter is text that names a folder, from which it is loaded for a target."""
    from specdec.drafters.registry import is_plain, only_one, parse

    drafter = only_one(drafter)
    candidates = drafter if isinstance(drafter, list | tuple) else [drafter]
    texts = [str(one) for one in candidates if isinstance(one, str | PathLike) and not is_plain(one)]
    return any(part.folder is not None for text in texts for part in parse(text))


def asked_for(config: GenerationConfig | None, name: str, is_keyword: bool, by_config: bool) -> Any:
    """The value of a field if it was set, else None. by_config: whether values that were not keywords count."""
    value = getattr(config, name, None)
    if is_keyword:
        return value
    return value if by_config and value != getattr(GenerationConfig(), name, None) else None


def draft_tokens(
    num_speculative_tokens: int | None, prompt_lookup_num_tokens: int | None, num_assistant_tokens: int | None
) -> tuple[str, int | None]:
    """The requested number of draft tokens, and the name it was given by; None if none was requested."""
    tokens = {
        "num_speculative_tokens": num_speculative_tokens,
        "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
        "num_assistant_tokens": num_assistant_tokens,
    }
    given = {name: value for name, value in tokens.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name}={value}' for name, value in given.items())} contradict each other; "
            "pass one of them"
        )
    for name, k in given.items():
        if not is_whole(k) or k < 1:
            raise ConfigError(
                f"{name}={k!r} must be a whole number from 1 to {MAX_DRAFT_TOKENS}; for plain decoding pass "
                "drafter=None"
            )
        if k > MAX_DRAFT_TOKENS:
            raise ConfigError(f"{name}={k} exceeds {MAX_DRAFT_TOKENS}; lower it")
    return next(iter(given.items()), ("num_speculative_tokens", None))


def is_default(length_policy: LengthPolicy | str | None) -> bool:
    """Whether the caller leaves the length to us, or to transformers' names; "fixed" has always meant that too."""
    return length_policy is None or (isinstance(length_policy, str) and length_policy == "fixed")


def default_policy(num_tokens: int | None, target: PreTrainedModel | None) -> LengthPolicy:
    """The policy of a caller who names none.

    num_tokens: what the caller asked for; None if nothing. target: None where it is not known yet.
    """
    return Fixed()


def length_policy_of(
    length_policy: LengthPolicy | str | None,
    config: GenerationConfig | None,
    first_tokens: int | None,
    target: PreTrainedModel | None = None,
) -> LengthPolicy:
    """The policy given by our argument, or by transformers' names. first_tokens: of the schedule's first draft.

    Raises ConfigError if several ask for one.
    """
    chosen = default_policy(first_tokens, target) if length_policy is None else length_policy
    policy = resolve_length_policy(chosen)
    schedule, threshold = (getattr(config, name, None) for name in POLICY_ALIASES)
    if schedule not in (None, *SCHEDULES):
        raise ConfigError(f"num_assistant_tokens_schedule={schedule!r}; choose {', '.join(map(repr, SCHEDULES))}")
    if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
        raise ConfigError(f"assistant_confidence_threshold={threshold!r} is not a probability; choose 0 to 1")
    asked = {} if is_default(length_policy) else {f"length_policy={policy.name!r}": policy}
    if schedule in SCHEDULES[1:]:
        asked[f"num_assistant_tokens_schedule={schedule!r}"] = Heuristic(first_tokens or DEFAULT_FIXED)
    if threshold:
        asked[f"assistant_confidence_threshold={threshold!r}"] = Confidence(threshold)
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} each decide how far to draft; pass one of them")
    return next(iter(asked.values()), policy)


@dataclass(frozen=True)
class Randomness:
    """The source of random numbers for sampling, and how drafts are verified."""

    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    verification: str | Lossy = "token"

    def checked(self, do_sample: bool | None, drafter: Drafter | None = None) -> Randomness:
        """Raise ConfigError for values that cannot be served, or that would be ignored.

        do_sample: None if not yet known. drafter: None if not yet known.
        """
        self._check_verification(do_sample, drafter)
        if self.seed is not None and self.generator is not None:
            raise ConfigError("seed and generator both set the source of random numbers; pass one of them")
        one = self.seed is None or is_whole(self.seed)
        if not one and not (isinstance(self.seed, Sequence) and all(map(is_whole, self.seed))):
            raise ConfigError(f"seed={self.seed!r}; pass a whole number, or one per row")
        if not isinstance(self.generator, torch.Generator | None):
            raise ConfigError(f"generator is a {type(self.generator).__name__}; pass a torch.Generator")
        for name in ("seed", "generator"):
            if do_sample is False and getattr(self, name) is not None:
                raise ConfigError(f"{name}= has no effect on greedy decoding; pass do_sample=True, or leave it out")
        return self

    def _check_verification(self, do_sample: bool | None, drafter: Drafter | None) -> None:
        rule = self.verification
        if not isinstance(rule, Lossy):
            if rule not in VERIFICATIONS:
                raise ConfigError(
                    f"verification={rule!r}; choose {' or '.join(map(repr, VERIFICATIONS))} (or, lossy, "
                    "specdec.Lenient, Typical or TopBeta)"
                )
            if do_sample is False and rule != "token":
                raise ConfigError(f"verification={rule!r} is for sampled drafts; pass do_sample=True with it")
            return
        if do_sample and not isinstance(rule, SAMPLED):
            raise ConfigError(f"verification={rule} is a rule of greedy decoding; leave do_sample=True out")
        if do_sample is False and not isinstance(rule, GREEDY):
            raise ConfigError(
                f"verification={rule} at temperature 0 is greedy decoding; pass do_sample=True with it, or leave it out"
            )
        if isinstance(drafter, NoDrafts):
            raise ConfigError(f"verification={rule} has nothing to accept without a drafter; pass drafter=")

    def drawn_seed(self) -> int:
        """A seed from the generator, or from torch's global one."""
        device = torch.device("cpu") if self.generator is None else self.generator.device
        return int(torch.randint(2**62, (), generator=self.generator, device=device))

    def streams(self, num_rows: int | None, device: torch.device) -> RowStreams:
        return RowStreams(self.drawn_seed() if self.seed is None else self.seed, num_rows, device)

    def of_rows(self, num_rows: int) -> list[tuple[int, int]]:
        """The seed and the stream of each row. Raises ConfigError for seeds of another number of rows."""
        if isinstance(self.seed, Sequence):
            if len(self.seed) != num_rows:
                raise ConfigError(
                    f"seed has {len(self.seed)} entries for {num_rows} rows; give one int, or one per row"
                )
            return [(int(seed), 0) for seed in self.seed]
        seed = self.drawn_seed() if self.seed is None else int(self.seed)
        return [(seed, row) for row in range(num_rows)]
