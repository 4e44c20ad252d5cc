"""transformers' stopping criteria inside the batch, checked after every committed token, so nothing overshoots."""

from __future__ import annotations

import time

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from specdec.batch.report import StepReport
from specdec.batch.rows import Rows
from specdec.errors import ConfigError
from specdec.options.generation import GenerationOptions


class Stopping:
    """Ends a row after the first token for which any criterion says so.

    The criteria see each row alone, without padding. This is the only place where the host loops over rows and tokens;
    without criteria it does not run.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList | None,
        options: GenerationOptions,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.criteria = StoppingCriteriaList(criteria or ())
        if options.stop_strings and not any(isinstance(c, StopStringCriteria) for c in self.criteria):
            if tokenizer is None:
                raise ConfigError(f"stop_strings={list(options.stop_strings)} needs the tokenizer; pass tokenizer=")
            if not hasattr(tokenizer, "get_vocab"):
                raise ConfigError(
                    f"tokenizer is a {type(tokenizer).__name__}; pass the target's transformers tokenizer"
                )
            self.criteria.append(StopStringCriteria(tokenizer, list(options.stop_strings)))
        if options.max_time is not None and not any(isinstance(c, MaxTimeCriteria) for c in self.criteria):
            self.criteria.append(MaxTimeCriteria(options.max_time, time.time()))

    def __bool__(self) -> bool:
        return len(self.criteria) > 0

    def apply(self, rows: Rows, report: StepReport) -> StepReport:
        """The report of the tokens that remain committed; `rows` is cut accordingly."""
        num_committed, finished = report.num_committed.copy(), report.finished.copy()
        for slot, count in enumerate(report.num_committed):
            begin = int(rows.host_lengths[slot] - count)
            for kept in range(1, int(count) + 1):
                if bool(self.criteria(rows.token_ids[slot : slot + 1, : begin + kept], None).all()):
                    num_committed[slot] = kept
                    finished[slot] = True
                    break
        return rows.cut(report, num_committed, finished)


def users_criteria(arrived: StoppingCriteriaList | None, config: GenerationConfig) -> StoppingCriteriaList:
    """Inside `custom_generate`: the criteria without those that transformers made from the config, which the commit
    applies itself."""
    eos = config.eos_token_id
    ends = set() if eos is None else set(torch.as_tensor(eos).flatten().tolist())
    own = StoppingCriteriaList()
    for criterion in arrived or ():
        is_length = type(criterion) is MaxLengthCriteria and criterion.max_length == config.max_length
        is_end = type(criterion) is EosTokenCriteria and set(criterion.eos_token_id.flatten().tolist()) == ends
        if not (is_length or is_end):
            own.append(criterion)
    return own
