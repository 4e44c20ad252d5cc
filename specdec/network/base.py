"""A causal language model over a ragged KV cache: what the target and a draft model have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.columns import Columns
from specdec.batch.layout import Layout, Ragged
from specdec.batch.rows import Rows
from specdec.draft import ExtraQueries

# Tokens per prefill forward. They bound the memory of masks and activations; on a CPU these also stay in the cache.
PREFILL_TOKENS = {"cpu": 512}
PREFILL_TOKENS_ELSEWHERE = 8192


def prefill_budget(device: torch.device) -> int:
    """Tokens per prefill forward."""
    return PREFILL_TOKENS.get(device.type, PREFILL_TOKENS_ELSEWHERE)


class NetworkOutput(NamedTuple):
    """logits: [rows, width or 1, vocab] in the model's dtype. hidden_states: [rows, width, hidden] per asked layer.

    extra_logits: of a forward with extra queries; takes the column of each row whose branch is wanted, [rows] int64,
    and returns [rows, extra, vocab]. A network may compute these branches alone.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    extra_logits: Callable[[Tensor], Tensor] | None = None

    def of_rows(self, index: Tensor) -> NetworkOutput:
        """A copy for the rows that are left, without extra logits. index: [rows] int64 on the device."""
        return NetworkOutput(self.logits[index], tuple(state[index] for state in self.hidden_states))


class Timings(Protocol):
    """What the steps of a network take on the device, without the launch. Each shape is timed once, by itself."""

    @property
    def version(self) -> int:
        """Another one as soon as anything below says something else."""

    def seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        """[MAX_STEP_WIDTH + 1] float64 by width; do not write to it. Widths that were not timed follow from those that
        were; at least one step of any shape must have been. Takes no time worth speaking of."""

    def has(self, num_rows: int, width: int, used_slots: int) -> bool:
        """Whether this shape was timed, and is therefore ready to run."""

    def ready_seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        """The same of what would run now without a capture, which may be a larger shape; infinite where nothing is."""

    def measure(self, num_rows: int, width: int, used_slots: int) -> None:
        """Time this shape, unless that was done before; it is captured if need be.

        Texts stay what they are, but the outputs of earlier forwards are overwritten, so nobody may be waiting for one.
        """


class CachePlan(NamedTuple):
    """What running a network allocates: a cache of that size, for which `freed` bytes are given back."""

    max_rows: int
    num_slots: int
    freed: int = 0


class Network(ABC):
    """One model and its cache. Rows are the first rows of the cache; `keep_rows` moves them when some leave.

    captures: steps are captured as CUDA graphs where the device has them, and replayed.
    runs_ahead: `forward` returns long before the device has run it, and asks the host for no row's length.
    max_tree: the most columns of a step that may be hidden from each other; None for any number.
    """

    captures = False
    runs_ahead = False
    max_tree: int | None = None

    def __init__(
        self, model: PreTrainedModel, num_layers: int, max_rows: int, num_slots: int, layout: Layout | None = None
    ):
        """layout: of the cache, by default ragged."""
        self.model = model
        self.cache = (layout or Ragged()).new_cache(num_layers, max_rows, num_slots, model.device)

    @abstractmethod
    def _run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_at: Tensor | None,
        layers: tuple[int, ...],
        extra_queries: ExtraQueries | None = None,
    ) -> NetworkOutput:
        """One forward after `cache.begin`. logits_at: [rows] int64, the one column a row needs logits for."""

    @classmethod
    def plan(cls, model: PreTrainedModel, max_rows: int, num_slots: int) -> CachePlan:
        """Of a network of that size, before it is built."""
        return CachePlan(max_rows, num_slots)

    @property
    def timings(self) -> Timings | None:
        """None: only the steps of a generation show what they take. Ask each time: a resize makes new ones."""
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything between entering and leaving may call `forward`; the model is restored afterwards."""
        yield

    def forward(
        self,
        token_ids: Tensor,
        starts: Tensor,
        used_slots: int,
        layers: tuple[int, ...] = (),
        host_starts: np.ndarray | None = None,
        extra_queries: ExtraQueries | None = None,
        parents: Tensor | None = None,
    ) -> NetworkOutput:
        """Feed [rows, width] tokens to follow each row's first starts[b] ([rows] int64) cached ones.

        used_slots: an upper bound of starts + width known to the host. layers: hidden states to return, numbered as
        in transformers (0 = embeddings, -1 = after the final norm). host_starts: `starts` on the host; a layout that
        needs them copies them there if they are not given.
        extra_queries: a branch after every token. The branches take slots of the cache until the next forward: width *
        extra after those of the tokens, which `used_slots` counts.
        parents: [rows, width] int64 where the tokens form a tree: the column before each in its path, -1 for the cached
        tokens; see `specdec/batch/columns.py`.
        """
        width = token_ids.shape[1]
        if extra_queries is not None:
            assert parents is None, "extra queries stand after text alone"
            each = torch.arange(width, device=starts.device)[None]
            columns = Columns.branches(starts, width, each, extra_queries.ahead)
        else:
            columns = Columns.chain(starts, width) if parents is None else Columns.tree(starts, parents)
        positions = self.cache.begin(columns, used_slots, host_starts=host_starts)
        return self._run(token_ids, positions, None, layers, extra_queries)

    def prefill(
        self,
        rows: Rows,
        token_ids: Tensor | None = None,
        layers: tuple[int, ...] = (),
        read: Callable[[Rows, int, int, tuple[Tensor, ...]], None] | None = None,
    ) -> Tensor:
        """Cache all committed tokens of every row; returns the logits after each row's last one, [rows, vocab].

        token_ids: in place of `rows.token_ids`, where this network knows fewer tokens.
        layers, read: of each piece, read(its rows, begin, end, the hidden states of its columns).
        """
        token_ids = rows.token_ids if token_ids is None else token_ids
        budget = prefill_budget(rows.device)
        logits, first = [], 0
        while first < len(rows):
            # Rows are sorted by falling length, so neighbours waste little on each other's padding.
            longest = int(rows.host_lengths[first])
            last = min(first + max(budget // longest, 1), len(rows))

            part, width = slice(first, last), max(budget // (last - first), 1)
            lengths, found = rows.lengths[part], rows.token_ids.new_empty(last - first, 0)
            for begin in range(0, longest, width):
                end = min(begin + width, longest)
                output = self.prefill_columns(token_ids[part], lengths, first, begin, end, layers)
                new = output.logits[:, 0]
                found = new if begin == 0 else torch.where((lengths > begin)[:, None], new, found)
                if read is not None:
                    read(Rows.of(rows.slots, rows.first + first, last - first), begin, end, output.hidden_states)
            logits.append(found)
            first = last
        return torch.cat(logits)

    def prefill_columns(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        first_row: int,
        begin: int,
        end: int,
        layers: tuple[int, ...] = (),
    ) -> NetworkOutput:
        """Cache columns begin .. end - 1 of [rows, columns] tokens, in the cache's rows from `first_row` on.

        Returns logits, [rows, 1, vocab], after each row's last token if it is among the columns, and the hidden states
        of all columns. Neither has a meaning after the end of a row; what is cached there is overwritten later.

        layers: as in `forward`.
        """
        starts = torch.full((len(token_ids),), begin, device=token_ids.device)
        host_starts = np.full(len(token_ids), begin)
        positions = self.cache.begin(Columns.chain(starts, end - begin), end, first_row, host_starts)
        last = (lengths - 1 - begin).clamp(0, end - begin - 1)
        return self._run(token_ids[:, begin:end], positions, last, layers)

    def fill(self, token_ids: Tensor, starts: Tensor, used_slots: int, host_starts: np.ndarray) -> None:
        """Cache tokens as `forward` does, with little else: it looks at no logits."""
        columns = Columns.chain(starts, token_ids.shape[1])
        positions = self.cache.begin(columns, used_slots, host_starts=host_starts)
        self._run(token_ids, positions, torch.zeros_like(starts), ())

    def compile_ahead(self, num_rows: int, prompt_length: int, widths: Sequence[int]) -> None:  # noqa: B027 - optional
        """Compile the kernels of prompts and of steps of these widths before they are launched; between entering
        `running` and the first forward."""

    def keep_rows(self, index: Tensor) -> None:
        self.cache.keep_rows(index)

    def resize(self, max_rows: int, num_slots: int) -> None:
        """Room for other numbers of rows and tokens; what still fits stays cached."""
        self.cache.resize(max_rows, num_slots)


def layer_numbers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The same layers counted from 0, the embeddings, to num_layers, the output of the final norm.

    >>> layer_numbers((0, 2, -1), 12)
    (0, 2, 12)
    """
    numbers = range(num_layers + 1)
    return tuple(numbers[layer] for layer in layers)


def vocab_size_of(model: PreTrainedModel) -> int:
    """Rows of the output projection: what the logits' last dimension is."""
    head = model.get_output_embeddings()
    if (size := _rows_of(head, "out_features")) is not None:
        return size
    # A head of several layers: the last one's rows.
    matrices = [] if head is None else [weight for weight in head.parameters() if weight.dim() == 2]
    return matrices[-1].shape[0] if matrices else model.config.get_text_config(decoder=True).vocab_size


def on_device_of(model: Any) -> AbstractContextManager:
    """Within it CUDA's current device is the model's, if that is on one."""
    device = getattr(model, "device", None)
    is_on_gpu = isinstance(device, torch.device) and device.type == "cuda"
    return torch.cuda.device(device) if is_on_gpu else nullcontext()


def num_embeddings_of(model: PreTrainedModel) -> int:
    """The number of token ids that the model can be given."""
    size = _rows_of(model.get_input_embeddings(), "num_embeddings")
    return model.config.get_text_config(decoder=True).vocab_size if size is None else size


def _rows_of(module: Any, name: str) -> int | None:
    """The rows of a module's matrix. Quantised ones pack it (bitsandbytes), or give it out by a method (torch.ao):
    then the attribute `name` says what it stands for."""
    weight, number = getattr(module, "weight", None), getattr(module, name, None)
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2
    if isinstance(weight, Tensor) and is_matrix and (weight.is_floating_point() or not isinstance(number, int)):
        return weight.shape[0]
    return number if isinstance(number, int) else None


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off, as decoding needs it. Afterwards each module returns to its own mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
