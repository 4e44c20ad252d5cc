"""transformers' streamers for a batch: one for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from specdec.batch.report import StepReport
from specdec.errors import ConfigError


class Streamers:
    """Each row's streamer gets the prompt, then the row's tokens one by one as they are committed, then `end()`."""

    def __init__(self, streamer: BaseStreamer | Sequence[BaseStreamer] | None, num_rows: int):
        """Raises ConfigError unless there is one streamer per row (or none at all)."""
        if streamer is not None and not isinstance(streamer, Sequence) and num_rows > 1:
            raise ConfigError(f"one streamer for {num_rows} rows; pass a list with a streamer for each row")
        given = [] if streamer is None else list(streamer) if isinstance(streamer, Sequence) else [streamer]
        if given and len(given) != num_rows:
            raise ConfigError(f"{len(given)} streamers for {num_rows} rows; pass one for each row")
        for one in given:
            if not (hasattr(one, "put") and hasattr(one, "end")):
                raise ConfigError(f"streamer is a {type(one).__name__}; it needs transformers' put() and end()")
        self.by_row = given

    def begin(self, prompts: Sequence[Tensor]) -> None:
        """prompts: [length] each, without padding; streamers get them as [1, length], as from transformers."""
        for streamer, prompt in zip(self.by_row, prompts, strict=False):
            streamer.put(prompt[None].cpu())

    def after_step(self, report: StepReport) -> None:
        if not self.by_row:
            return
        for slot, row in enumerate(report.row_ids):
            for token in report.token_ids[slot, : report.num_committed[slot]]:
                self.by_row[row].put(torch.tensor([token]))
            if report.finished[slot]:
                self.by_row[row].end()
