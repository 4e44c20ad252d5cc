"""Which logits processors a request has, and what is known of their kinds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec.kernels.commit.truncation import GREEDY, Truncation
from specdec.verify.forks import fork

# Scores of a position depend on that position's scores alone.
BLIND = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
OCCURRENCE = (hf.RepetitionPenaltyLogitsProcessor,)  # which tokens occur: padding by repeating one of them is harmless
ENDING = (hf.NoRepeatNGramLogitsProcessor, hf.NoBadWordsLogitsProcessor, hf.SequenceBiasLogitsProcessor)
# They look at the text in other ways. Of a prefix_allowed_tokens_fn transformers says that the text decides its answer.
OTHERS_WITHOUT_STATE = (
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.PrefixConstrainedLogitsProcessor,
    hf.TopHLogitsWarper,
)
STATELESS = (*BLIND, *OCCURRENCE, *ENDING, *OTHERS_WITHOUT_STATE)


def is_stateful(processor: LogitsProcessor) -> bool:
    """Whether its answer may depend on what it was asked before. Nothing that is not known to us is trusted."""
    return type(processor) not in STATELESS


@dataclass(frozen=True, eq=False)
class Plan:
    """How the scores of one request's positions are processed. Rows that share a plan are processed together.

    processors: all but the truncation. truncation: temperature, top-k, top-p and min-p, at temperature 0 for greedy
        rows. They are left to the code that makes a distribution of the scores, which is far cheaper than transformers'
        own `warpers` of the same values.
    min_new_tokens: no end of sequence before a row has that many. eos_token_ids: what ends the row, and what is
        forbidden until then.
    num_stateless: how many processors come before the first stateful one; from that one on, all are asked about one
        place after another.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    truncation: Truncation = GREEDY
    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    num_stateless: int = field(init=False)

    def __post_init__(self) -> None:
        kinds = [is_stateful(processor) for processor in self.processors]
        object.__setattr__(self, "num_stateless", kinds.index(True) if any(kinds) else len(kinds))

    @property
    def names_tokens(self) -> bool:
        """Whether scores of particular tokens are read or changed, so that each must have one."""
        return len(self.processors) > 0 or self.min_new_tokens > 0

    @property
    def in_order(self) -> list[LogitsProcessor]:
        """The processors from the first stateful one on."""
        return list(self.processors[self.num_stateless :])

    def check_stateful(self) -> None:
        """Raise ConfigError, which names the processor, for one that cannot be copied."""
        fork(self.in_order, [processor for processor in self.in_order if not is_stateful(processor)])
