"""Training of any-subset models: the joint density of hidden tokens under lattice orders, at ramped mask rates.

The loss of a text is the mean over its hidden tokens of -log p(x_s(i) | x_s(<i)): the conditionals of one sequential
decoding, in one forward under the oracle mask. Drafting by marginals asks the same network for tokens further ahead,
x_s(i) given x_s(<i - gap), which it never sees in any lattice order. `draft_weight` adds that loss, with the gaps that
drafts have, and so raises acceptance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, XLNetConfig, XLNetLMHeadModel

from specdec.drafters.training.data import TokenStream
from specdec.drafters.training.trainer import TrainStep
from specdec.errors import ConfigError
from specdec.network.any_subset.two_stream import TwoStreamText

MASK_TOKEN = "<|mask|>"
FIRST_MASK_RATE = 0.15
MAX_GAP = 8


@dataclass(frozen=True)
class MaskRecipe:
    """Which tokens of a training row are hidden.

    mask_rates: the bounds of the rates; a batch's rows cover them evenly. Both bounds ramp from 0.15 over the first
        `ramp_steps` steps. The paper's: (0.85, 0.99) for continuation, (0.05, 0.25) for single lines of code,
        (0.60, 0.75) for infilled stories.
    span_share: the share of rows that hide one block; the others hide tokens anywhere.
    draft_weight: weight of the loss of marginals, added to that of the joint density.
    """

    mask_rates: tuple[float, float] = (0.15, 0.99)
    ramp_steps: int = 500
    span_share: float = 0.5
    draft_weight: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.mask_rates
        if not 0 < low <= high < 1:
            raise ConfigError(f"mask rates {low} .. {high} are not usable; need 0 < low <= high < 1")
        if not 0 <= self.span_share <= 1:
            raise ConfigError(f"span_share={self.span_share} is not a share; use 0 to 1")
        if self.draft_weight < 0 or self.ramp_steps < 0:
            raise ConfigError(
                f"draft_weight={self.draft_weight} and ramp_steps={self.ramp_steps} must not be negative; 0 is none"
            )

    def rates_at(self, step: int) -> tuple[float, float]:
        progress = min(step / self.ramp_steps, 1.0) if self.ramp_steps else 1.0
        low, high = (FIRST_MASK_RATE + progress * (rate - FIRST_MASK_RATE) for rate in self.mask_rates)
        return low, high

    def draw(self, shape: tuple[int, int], step: int, generator: torch.Generator) -> Tensor:
        """The hidden tokens of one batch, [rows, length] bool; every row hides at least one token and shows at least
        one.
        """
        num_rows, length = shape
        low, high = self.rates_at(step)
        strata = (torch.randperm(num_rows, generator=generator) + torch.rand(num_rows, generator=generator)) / num_rows
        counts = ((low + (high - low) * strata) * length).round().long().clamp(1, length - 1)[:, None]
        anywhere = torch.rand(shape, generator=generator).argsort(1).argsort(1) < counts
        starts = (torch.rand(num_rows, 1, generator=generator) * (length - counts + 1)).long()
        column = torch.arange(length)
        block = (column >= starts) & (column < starts + counts)
        in_block = torch.rand(num_rows, 1, generator=generator) < self.span_share
        return torch.where(in_block, block, anywhere)


class AnySubsetLoss(nn.Module):
    """Computes the losses from texts and their hidden tokens; `specdec.drafters.training.trainer` trains it."""

    def __init__(self, model: XLNetLMHeadModel):
        super().__init__()
        self.text = TwoStreamText(model)
        for name, parameter in model.named_parameters():  # of segments, which a plain text does not have
            parameter.requires_grad_(not name.endswith(("seg_embed", "r_s_bias")))

    @property
    def model(self) -> XLNetLMHeadModel:
        return self.text.model

    def forward(self, token_ids: Tensor, hidden: Tensor, gaps: Tensor) -> Tensor:
        """Negative log-likelihoods, [rows, gaps, length] float32 in nats, 0 where a token is visible.

        token_ids: [rows, length] int64. hidden: [rows, length] bool.
        gaps: [rows, gaps, length] int64: how many of the ranks just before a token its prediction does not see; 0 is
        the joint density.
        """
        logits = self.model.lm_loss(self.text(token_ids, *visibility(hidden, gaps)))
        labels = token_ids[:, None].expand_as(gaps)
        nll = F.cross_entropy(logits.float().flatten(0, 2), labels.flatten(), reduction="none")
        return nll.view_as(gaps) * hidden[:, None]


def visibility(hidden: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens see which in a lattice order; arguments of `TwoStreamText`, [rows, (gaps,) length, length] bool."""
    number = hidden.cumsum(1)  # 1, 2, ... among the hidden tokens
    rank = torch.where(hidden, number, 0)
    content = rank[:, None, :] <= rank[:, :, None]
    first_unseen = (rank[:, None] - gaps).clamp(min=1)
    return content, rank[:, None, None, :] < first_unseen[..., None]


def draw_gaps(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """How far ahead drafts predict, [rows, length] int64 from 1: half of them for the next token but one, and so on."""
    weights = 0.5 ** torch.arange(1, MAX_GAP + 1)
    drawn = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator)
    return drawn.view(shape) + 1


@dataclass
class AnySubsetStep:
    """The step function: batch n and its masks are functions of n and the seed alone."""

    stream: TokenStream
    batch_rows: int
    recipe: MaskRecipe

    def __call__(self, module: nn.Module, step: TrainStep) -> Tensor:
        generator = torch.Generator().manual_seed(self.stream.seed * 1_000_003 + step.shard)
        token_ids = self.stream.rows(step.shard * self.batch_rows, self.batch_rows)
        shape = (self.batch_rows, self.stream.row_tokens)
        hidden = self.recipe.draw(shape, step.index, generator)
        gaps = [torch.zeros(shape, dtype=torch.long)]
        if self.recipe.draft_weight:
            gaps.append(draw_gaps(shape, generator))
        hidden = hidden.to(step.device, non_blocking=True)
        nll = module(token_ids.to(step.device), hidden, torch.stack(gaps, 1).to(step.device))
        joint, *drafts = nll.sum((0, 2)) / hidden.sum()
        return joint + sum(self.recipe.draft_weight * draft for draft in drafts)


def build_xlnet(
    tokenizer: PreTrainedTokenizerBase,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_inner: int,
    max_positions: int,
    seed: int = 0,
) -> XLNetLMHeadModel:
    """A new model for a tokenizer, which gets a mask token if it has none."""
    if d_model % num_heads or d_model % 2:
        raise ConfigError(f"d_model={d_model} must be even and a multiple of num_heads={num_heads}")
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=d_model, n_layer=num_layers, n_head=num_heads, d_inner=d_inner, dropout=0.0,
        initializer_range=d_model**-0.5,  # transformers' 0.02 suits large models; small ones learn slowly from it
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id, max_positions=max_positions, use_mems_eval=False, mem_len=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return XLNetLMHeadModel(config)


@torch.no_grad()
def validate(
    module: AnySubsetLoss, rows: Tensor, rates: tuple[float, ...] = (0.25, 0.5, 0.75, 0.95), batch_rows: int = 16
) -> dict[str, dict[str, float]]:
    """Joint negative log-likelihood per hidden token in nats, by mask rate and kind of mask.

    rows: [rows, length] int64. The masks are fixed, so that two models are compared on the same ones.
    """
    was_training = module.training
    module.eval()
    found: dict[str, dict[str, float]] = {}
    for kind, span_share in (("anywhere", 0.0), ("block", 1.0)):
        for rate in rates:
            recipe = MaskRecipe((rate, rate), 0, span_share)
            total = count = 0.0
            for hidden, tokens in masked_batches(recipe, rows, batch_rows):
                nll = module(tokens, hidden, torch.zeros_like(tokens)[:, None])
                total, count = total + float(nll.sum()), count + float(hidden.sum())
            found.setdefault(kind, {})[f"{rate:g}"] = round(total / count, 4)
    module.train(was_training)
    return found


@torch.no_grad()
def draft_acceptance(module: AnySubsetLoss, rows: Tensor, rate: float, max_gap: int = 4) -> list[float]:
    """Entry g - 1: the chance that a marginal draft g ranks ahead is accepted if all before it were, sum min(p, q).

    Measured on the text itself rather than on samples; hidden tokens are anywhere, at `rate`.
    """
    was_training = module.training
    module.eval()
    accepted, count = torch.zeros(max_gap, dtype=torch.float64), 0
    for hidden, tokens in masked_batches(MaskRecipe((rate, rate), 0, 0.0), rows, 8):
        gaps = torch.arange(max_gap + 1, device=tokens.device)[None, :, None].expand(len(tokens), -1, tokens.shape[1])
        logits = module.model.lm_loss(module.text(tokens, *visibility(hidden, gaps)))
        p, *marginals = logits.float().softmax(-1).unbind(1)
        far = hidden & (hidden.cumsum(1) > max_gap)
        for gap, q in enumerate(marginals):
            accepted[gap] += float(torch.minimum(p, q).sum(-1)[far].sum())
        count += int(far.sum())
    module.train(was_training)
    return [round(float(share), 4) for share in accepted / max(count, 1)]


def masked_batches(recipe: MaskRecipe, rows: Tensor, batch_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for first in range(0, len(rows), batch_rows):
        tokens = rows[first : first + batch_rows]
        hidden = recipe.draw((len(tokens), tokens.shape[1]), 0, generator)
        yield hidden.to(tokens.device), tokens


def evenly_spaced(num_tokens: int, num_rows: int, row_tokens: int) -> list[int]:
    """Starts of rows that cover a stream of tokens evenly."""
    last = num_tokens - row_tokens
    return [math.floor(last * i / max(num_rows - 1, 1)) for i in range(num_rows)]
