"""Prefill of short prompts as CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.network.captured.graphs import capture, outliving_inference_mode, reserved_bytes

PROMPT_ROUNDING = 64
CAPTURED_PROMPT_TOKENS = 2048  # of all rows
MOST_PROMPT_SHAPES = 32

logger = logging.getLogger(__name__)


class PromptGraphs:
    """Prefill of short prompts, captured when a shape is met for the second time.

    The host launches a prompt of some hundred tokens more slowly than the device computes it; longer ones hide the
    launches.
    """

    def __init__(self, device: torch.device):
        self.device, self.nbytes = device, 0
        self.pool = torch.cuda.graph_pool_handle()
        self._met: set[tuple[int, int, int]] = set()
        self._captured: OrderedDict[tuple[int, int, int], CapturedPrompts] = OrderedDict()

    def replay(
        self,
        forward: Callable[[Tensor, Tensor, int], Tensor],
        token_ids: Tensor,
        last: Tensor,
        first_row: int,
        num_slots: int,
    ) -> Tensor | None:
        """The logits of forward(token_ids, last, first_row), [rows, 1, vocab]; None where the shape is too large, or is
        met for the first time.

        token_ids: [rows, width] int64, from each row's first slot on. last: [rows] int64, the column whose logits are
        wanted. num_slots: a row of the cache has as many.
        """
        rows, width = token_ids.shape
        columns = -(-width // PROMPT_ROUNDING) * PROMPT_ROUNDING
        if columns > num_slots or rows * columns > CAPTURED_PROMPT_TOKENS:
            return None

        key = rows, columns, first_row
        if key not in self._captured:
            if key not in self._met:
                self._met.add(key)
                return None
            self._captured[key] = self._capture(forward, *key)
            if len(self._captured) > MOST_PROMPT_SHAPES:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key](token_ids, last)

    def _capture(
        self, forward: Callable[[Tensor, Tensor, int], Tensor], rows: int, columns: int, first_row: int
    ) -> CapturedPrompts:
        logger.info("capturing prompts: %d rows x %d tokens", rows, columns)
        reserved = reserved_bytes(self.device)
        with outliving_inference_mode():
            token_ids = torch.zeros(rows, columns, dtype=torch.long, device=self.device)
            last = torch.zeros(rows, dtype=torch.long, device=self.device)
            graph, logits = capture(lambda: forward(token_ids, last, first_row), self.pool)
        self.nbytes += max(reserved_bytes(self.device) - reserved, 0)
        return CapturedPrompts(graph, token_ids, last, logits)


@dataclass
class CapturedPrompts:
    """token_ids: [rows, columns] int64 and last: [rows] int64, to be filled; logits: overwritten by each replay."""

    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    last: Tensor
    logits: Tensor

    def __call__(self, token_ids: Tensor, last: Tensor) -> Tensor:
        # What an earlier prompt left in the columns past this one is computed again; nothing reads it.
        self.token_ids[:, : token_ids.shape[1]] = token_ids
        self.last.copy_(last)
        self.graph.replay()
        return self.logits.clone()
