"""A smaller causal language model as the drafter, with its own ragged KV cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch.rows import Rows
from specdec.batch.slots import to_device
from specdec.draft import NO_TOKEN, Draft, Shown, Verified
from specdec.drafter import Context, Drafter
from specdec.drafters.folders import load_target_first, model_in
from specdec.errors import DrafterError
from specdec.limits import MAX_DRAFT_TOKENS
from specdec.network.base import Network, NetworkOutput, Timings, num_embeddings_of, prefill_budget, vocab_size_of
from specdec.network.choose import build_network
from specdec.network.refusals import max_text_length, of_a_draft_model

# Vocabularies of one tokenizer are padded to different multiples (151936 and 152064, 50304 and 50688); a larger
# difference means another tokenizer.
MAX_PADDING = 1 / 16
NEWEST = 2  # most committed tokens in a draft's first forward, after a step that drafted
MAX_FED = 8  # most tokens in a draft's first forward that were committed without being drafted
# What catching up takes the host per layer where steps are captured: it is the one forward that is launched kernel by
# kernel. On an H200 the device waits for these launches, however many tokens are missing.
LAUNCHES_OF_A_LAYER = 2e-4
ONE_BY_ONE = np.maximum(np.arange(MAX_DRAFT_TOKENS + 1) - 1.0, 0.0)  # forwards after the first, by tokens drafted
UNLIMITED = 1 << 62  # tokens
GAP = 5e-5  # seconds that the host takes between a step's report and the launch of the second forward of a draft


class ForwardTimings:
    """Of a draft model whose network times its own steps; as `specdec.drafter.DraftTimings` describes it."""

    def __init__(self, steps: Timings, num_layers: int):
        self.steps, self.num_layers = steps, num_layers

    @property
    def version(self) -> int:
        return self.steps.version

    def seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        """The first forward takes the two newest tokens, as one that is launched ahead does; then one after another."""
        return self._seconds(self.steps.seconds(num_rows, used_slots))

    def ready_seconds(self, num_rows: int, used_slots: int) -> np.ndarray:
        return self._seconds(self.steps.ready_seconds(num_rows, used_slots))

    def _seconds(self, by_width: np.ndarray) -> np.ndarray:
        seconds: np.ndarray = GAP + by_width[NEWEST] + by_width[1] * ONE_BY_ONE
        seconds[0] = 0.0
        return seconds

    def catch_up(self, num_rows: int, num_missed: int) -> float:
        if num_missed <= NEWEST:
            return 0.0
        if num_missed <= MAX_FED:
            by_width = self.steps.seconds(num_rows, 1)
            return float(by_width[MAX_FED] - by_width[NEWEST])
        return LAUNCHES_OF_A_LAYER * self.num_layers

    def has(self, num_rows: int, used_slots: int) -> bool:
        return all(self.steps.has(num_rows, width, used_slots) for width in (1, NEWEST))

    def measure(self, num_rows: int, used_slots: int) -> None:
        for width in (1, NEWEST):
            self.steps.measure(num_rows, width, used_slots)


class DraftModel(Drafter):
    """Drafts token by token: the argmax, or a sample if the output is sampled.

    The draft model caches each token once. After a fully accepted draft its cache lacks the last drafted token, which
    is then fed together with the newest one in the next draft's first forward. The same goes for the tokens of a few
    steps that drafted nothing; after many such steps, the tokens are cached first, like a prompt's. A first forward
    that is launched ahead always takes the two newest tokens.

    Stopped rows stay in the forwards of the others, so that shapes do not change; their tokens are discarded. So do
    rows that are longer than the draft model can read: it sees their beginning, and they go on without drafts.
    """

    name = "draft_model"
    shares_slots = True
    shows = frozenset({"logits", "hidden_states"})

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None):
        """vocab_size: the number of tokens that target and draft share; by default the smaller of the vocabularies."""
        if not isinstance(model, PreTrainedModel):
            raise DrafterError(f"a draft model must be a transformers PreTrainedModel, not {type(model).__name__}")
        self.model = self.kv_model = model
        self.vocab_size = vocab_size
        self._most = UNLIMITED  # tokens of the longest text that the draft model reads
        self._running = ExitStack()
        self._network: Network | None = None
        self._num_uncertain = 0  # tokens of the last draft in the cache, at the end of each row's, until it is observed
        # A draft's first forward, launched before the step in progress was read; only for the draft of the next step.
        self._launched: NetworkOutput | None = None
        self._begun: NetworkOutput | None = None  # the same, once that step has been observed

    @classmethod
    def load(cls, folder: str | Path, target: PreTrainedModel | None, vocab_size: int | None = None) -> DraftModel:
        """The draft model in a folder, on the target's device and in its dtype."""
        if target is None:
            raise load_target_first(cls.name, folder)
        return cls(model_in(folder, target), vocab_size)

    @property
    def timings(self) -> ForwardTimings | None:
        steps = None if self._network is None else self._network.timings
        return None if steps is None else ForwardTimings(steps, self.model.config.num_hidden_layers)

    def check(self, target: PreTrainedModel, max_length: int) -> None:
        if self.model.device != target.device:
            raise DrafterError(
                f"the draft model is on {self.model.device}, the target on {target.device}; move them to one device"
            )
        sizes = vocab_size_of(self.model), vocab_size_of(target)
        if self.vocab_size is None and abs(sizes[0] - sizes[1]) > MAX_PADDING * max(sizes):
            raise DrafterError(
                f"the draft model's vocabulary has {sizes[0]} tokens, the target's {sizes[1]}: too different "
                "for one tokenizer with different padding; use a draft model with the target's tokenizer "
                "(or pass DraftModel(model, vocab_size=n) if they do share the first n tokens)"
            )
        if self.vocab_size is not None and not 0 < self.vocab_size <= min(sizes):
            raise DrafterError(
                f"vocab_size={self.vocab_size} must be between 1 and {min(sizes)}, the smaller vocabulary"
            )

    def start(self, context: Context, rows: Rows) -> None:
        super().start(context, rows)
        target = context.target
        self._shared_vocab = self.vocab_size or min(vocab_size_of(self.model), vocab_size_of(target))
        # Prompts may hold whatever the target has an embedding for.
        num_tokens = max(vocab_size_of(target), num_embeddings_of(target))
        self._knows_all = self._shared_vocab >= num_tokens
        self._most = max_text_length(self.model) or UNLIMITED
        rows = rows.up_to(self._most)
        limit = min(rows.max_limit, self._most) if len(rows) else None
        # Accepted tokens are the target's own, whatever the draft model's last bits are.
        with of_a_draft_model():
            self._network = build_network(
                self.model,
                len(rows.slots),
                min(rows.capacity, self._most),
                limit,
                context.layout,
                must_be_exact=False,
                exact=context.exact,
            )
        self._running.enter_context(self._network.running())
        if len(rows):
            self._network.compile_ahead(len(rows), rows.max_length, (1, NEWEST))
            self._network.prefill(rows, self._known(rows.token_ids))
        self._cached = np.zeros(len(rows.slots), dtype=np.int64)  # by slot: tokens in the cache, drafts included
        self._cached[: len(rows)] = rows.host_lengths

    def propose(self, rows: Rows, max_tokens: int) -> Draft:
        room = self._most + 1 - rows.host_lengths  # one more than can be fed, as the last drafted token is not
        max_tokens = min(max_tokens, max(room.tolist()))
        if max_tokens <= 0:
            return Draft.empty(len(rows), rows.device)

        text = rows.up_to(self._most)
        used_slots = text.max_length
        output = self._begun or self._first_forward(text, used_slots)
        self._begun = None
        # The device waits for this forward's launch, so all work that it does not need comes after it. The host waits #
        # for the policy's inputs at each token, so work that can be done here is not left until after them.
        drafted = rows.token_ids.new_empty(len(rows), max_tokens)
        later_starts = text.lengths + torch.arange(max_tokens - 1, device=rows.device)[:, None]
        if used_slots + max_tokens - 2 >= self._most:
            later_starts.clamp_(max=self._most - 1)  # of rows without room, into a slot that their newest token takes
        assert self.context is not None
        sampler, policy = self.context.sampler_for(rows), self.context.policy
        probs = uniforms = None
        if sampler is not None:
            probs, uniforms = sampler.probs(rows, max_tokens), sampler.draw(rows, max_tokens)
        tokens = drafted[:, :0]  # what the next forward is fed
        goes_on, num_drafted = room > 0, np.zeros(len(rows), dtype=np.int64)
        for place in range(max_tokens):
            if place > 0:
                host_starts = np.minimum(text.host_lengths + (place - 1), self._most - 1)
                used = min(used_slots + place, self._most)
                output = self._forward(tokens, later_starts[place - 1], used, host_starts)
            logits, newest = output.logits[:, -1, : self._shared_vocab], drafted[:, place : place + 1]
            if sampler is None or probs is None or uniforms is None:
                tokens = torch.argmax(logits, -1, keepdim=True, out=newest)
            else:
                newest[:, 0] = sampler.sample(rows, drafted[:, :place], logits, uniforms[:, place], probs[:, place])
                tokens = self._known(newest)
            num_drafted += goes_on
            goes_on &= room > place + 1
            if policy is not None and place + 1 < max_tokens:
                hidden = output.hidden_states[0][:, -1] if output.hidden_states else None
                goes_on &= policy.goes_on(rows, Shown(place, newest[:, 0], logits, hidden))
                if not goes_on.any():
                    break
        drafted = drafted[:, : place + 1]
        self._num_uncertain = drafted.shape[1] - 1
        self._cached[: len(rows)] = text.host_lengths + self._num_uncertain
        if (num_drafted < drafted.shape[1]).any():
            behind = torch.arange(drafted.shape[1]) >= torch.from_numpy(num_drafted)[:, None]
            drafted = drafted.masked_fill(behind.to(rows.device), NO_TOKEN)
        if probs is None:
            return Draft.trusted(drafted, is_valid=True)
        probs = probs[:, : drafted.shape[1]]
        return Draft.trusted(drafted, probs, is_normalised=True)

    def observe(self, verified: Verified) -> None:
        """Accepted tokens stay cached; the keys after them belong to rejected tokens, whatever is committed there."""
        here = slice(len(verified.host_lengths))
        cached = self._cached[here]
        if verified.is_own is not None:
            # Of rows in which another drafter's tokens were verified, this draft's keys belong to no committed token.
            cached = np.where(verified.is_own, cached, cached - self._num_uncertain)
        self._num_uncertain = 0
        self._cached[here] = np.minimum(cached, verified.host_lengths - 1)
        self._begun, self._launched = self._launched, None

    def begin(self, rows: Rows) -> None:
        """Launch the first forward over the two newest tokens of every row, as it is not yet known whether the older
        one is cached."""
        assert self._network is not None
        rows = rows.up_to(self._most)
        if self._network.runs_ahead and (self._cached[: len(rows)] >= rows.host_lengths - NEWEST).all():
            tokens, starts = rows.last_tokens(NEWEST), rows.lengths - NEWEST
            self._launched = self._forward(self._known(tokens), starts, rows.max_length, rows.host_lengths - NEWEST)

    def keep_rows(self, index: Tensor) -> None:
        assert self._network is not None
        self._network.keep_rows(index)
        if self._begun is not None:
            self._begun = self._begun.of_rows(to_device(index.numpy(), self.model.device))
        self._cached[: len(index)] = self._cached[index.numpy()]

    def join(self, rows: Rows, begin: int, end: int) -> None:
        assert self._network is not None
        text, end = rows.up_to(self._most), min(end, self._most)
        if begin < end:
            self._network.prefill_columns(self._known(text.token_ids), text.lengths, text.first, begin, end)
            self._cached[rows.first : rows.first + len(rows)] = np.minimum(end, text.host_lengths)

    def resize(self, num_slots: int, capacity: int) -> None:
        assert self._network is not None
        self._network.resize(num_slots, min(capacity, self._most))
        self._cached = np.concatenate([self._cached[:num_slots], np.zeros(max(num_slots - len(self._cached), 0), int)])

    def finish(self) -> None:
        self._running.close()
        self._network = self._begun = self._launched = None

    def _first_forward(self, rows: Rows, used_slots: int) -> NetworkOutput:
        """Over the tokens that are not cached, each row's newest among them."""
        tokens = self._not_cached(rows)
        width = tokens.shape[1]
        starts = rows.newest()[0] if width == 1 else rows.lengths - width
        return self._forward(tokens, starts, used_slots, rows.host_lengths - width)

    def _not_cached(self, rows: Rows) -> Tensor:
        """The newest tokens, [rows, 1 to MAX_FED], for the next forward; older ones are cached."""
        # The newest token always goes in, even if a row was resumed among longer ones and already has its keys.
        cached = np.minimum(self._cached[: len(rows)], rows.host_lengths - 1)
        width = int((rows.host_lengths - cached).max())
        assert self._network is not None
        shortest = int(rows.host_lengths.min())
        if width > NEWEST and self._network.timings is not None:
            width = max(width, min(MAX_FED, shortest))  # one captured step serves all numbers
        if width > min(MAX_FED, shortest):
            self._catch_up(rows, cached)
            width = 1
        tokens = rows.newest()[1] if width == 1 else rows.last_tokens(width)
        return tokens if self._knows_all else self._known(tokens)

    def _catch_up(self, rows: Rows, cached: np.ndarray) -> None:
        """Cache all committed tokens except each row's last. cached: [rows] int64, number already cached."""
        assert self._network is not None
        most = max(prefill_budget(rows.device) // len(rows), 1)
        while (behind := int((rows.host_lengths - 1 - cached).max())) > 0:
            width = min(behind, most)
            # Rows that lack fewer tokens are fed some of them again; short rows, values past their end that nothing
            # reads.
            host_starts = np.minimum(cached, np.maximum(rows.host_lengths - 1 - width, 0))
            starts = torch.from_numpy(host_starts).to(rows.device)
            tokens = rows.token_ids.gather(1, starts[:, None] + torch.arange(width, device=rows.device))
            self._network.fill(self._known(tokens), starts, int(host_starts.max()) + width, host_starts)
            cached = np.minimum(np.maximum(cached, host_starts + width), rows.host_lengths - 1)

    def _forward(self, token_ids: Tensor, starts: Tensor, used_slots: int, host_starts: np.ndarray) -> NetworkOutput:
        assert self._network is not None
        self.num_calls += 1
        assert self.context is not None
        policy = self.context.policy
        layers = (-1,) if policy is not None and "hidden_states" in policy.sees else ()
        return self._network.forward(token_ids, starts, used_slots, layers, host_starts)

    def _known(self, token_ids: Tensor) -> Tensor:
        """Replace ids that the draft model does not have by token 0: a poor draft, never a wrong output."""
        return token_ids.masked_fill((token_ids < 0) | (token_ids >= self._shared_vocab), 0)
