"""XLNet's two streams in a short forward (Yang et al. 2019, arXiv 1906.08237), over transformers' own weights.

The content stream h holds each token's contribution; the query stream g asks for the token at a place and never
contributes. By rank, content sees only earlier content (visible tokens see each other), so the keys and values of a
committed token are computed once and kept. A step costs only its new tokens, whereas transformers' forward recomputes
every position, and every query position against every other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import XLNetLMHeadModel

# (layer index, its attention, queries [rows, heads, tokens, d_head], keys and values of the content) -> mixed values
Attend = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]


def distance_encoding(model: XLNetLMHeadModel, distances: Tensor) -> Tensor:
    """The sinusoids of signed distances (query's position minus key's), [distances, d_model] in the model's dtype."""
    config = model.config
    if config.clamp_len > 0:
        distances = distances.clamp(-config.clamp_len, config.clamp_len)
    exponents = torch.arange(0, config.d_model, 2, device=distances.device, dtype=torch.float32) / config.d_model
    angles = distances.float()[:, None] * (1 / 10000**exponents)
    return torch.cat([angles.sin(), angles.cos()], 1).to(model.dtype)


def run_layers(model: XLNetLMHeadModel, x: Tensor, num_content: int, attend: Attend) -> Tensor:
    """Both streams through all layers. x: [rows, content and query tokens, d_model], content first."""
    for index, layer in enumerate(model.transformer.layer):
        attention = layer.rel_attn
        content = x[:, :num_content]
        mixed = attend(
            index, attention, heads(x, attention.q), heads(content, attention.k), heads(content, attention.v)
        )
        output = attention.dropout(mixed.transpose(1, 2).flatten(2) @ attention.o.flatten(1).T)
        x = layer.ff(attention.layer_norm(output + x))
    return x


def heads(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, tokens, d_model] by [d_model, heads, d_head] -> [rows, heads, tokens, d_head]."""
    return (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:]).transpose(1, 2)


def query_tokens(model: XLNetLMHeadModel, num_rows: int, num_queries: int) -> Tensor:
    """The initial query stream: the same vector everywhere."""
    return model.transformer.mask_emb.expand(num_rows, num_queries, -1)


class TwoStreamCache:
    """The keys and values of the content of some rows, in slots numbered by rank.

    positions: [rows, slots] int64, the position of each rank; unused ranks may have any value.
    num_visible: [rows] int64, the ranks below which content sees each other.
    span: no two positions of a row are `span` or more apart.
    """

    def __init__(self, model: XLNetLMHeadModel, positions: Tensor, num_visible: Tensor, span: int):
        self.model, self.positions, self.num_visible, self.span = model, positions, num_visible, span
        config, layers = model.config, model.transformer.layer
        encoding = distance_encoding(model, torch.arange(1 - span, span, device=positions.device))
        # [heads, distances, d_head] per layer: they depend only on the weights
        self.distance_keys = [torch.einsum("ed,dnh->neh", encoding, layer.rel_attn.r) for layer in layers]
        shape = (len(layers), *positions.shape, config.n_head, config.d_head)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=positions.device)
        self.values = torch.zeros_like(self.keys)

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, starts: Tensor, targets: Tensor, known: Tensor, used_slots: int | None = None
    ) -> Tensor:
        """Add content to the cache and ask for tokens; returns logits, [rows, queries, vocab].

        token_ids: [rows, content] int64, of the ranks from `starts` ([rows]) on; a slot may be written again.
        targets: [rows, queries] int64, the requested ranks. known: [rows, queries] int64, the number of first ranks
        that each query sees, at least 1; they must be in the cache or in this call.
        used_slots: all ranks in use are below this; by default all slots.
        """
        num_rows, num_content = token_ids.shape
        used = self.positions.shape[1] if used_slots is None else used_slots
        ranks = starts[:, None] + torch.arange(num_content, device=starts.device)
        sees = torch.cat([torch.maximum(ranks + 1, self.num_visible[:, None]), known], 1)
        place = self.positions.gather(1, torch.cat([ranks, targets], 1))
        slot = torch.arange(used, device=starts.device)
        hidden = (slot >= sees[..., None])[:, None]  # [rows, 1, tokens, slots]
        # Only slots that no query sees may be outside the span.
        distance = (place[..., None] - self.positions[:, None, :used]).clamp(1 - self.span, self.span - 1)
        index = (distance + self.span - 1)[:, None].expand(-1, self.model.config.n_head, -1, -1)
        row = torch.arange(num_rows, device=starts.device)[:, None]

        def attend(layer: int, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][row, ranks] = k.transpose(1, 2)
            self.values[layer][row, ranks] = v.transpose(1, 2)
            keys, values = (cache[layer, :, :used].transpose(1, 2) for cache in (self.keys, self.values))
            by_content = (q + attention.r_w_bias[:, None]) @ keys.mT
            by_distance = ((q + attention.r_r_bias[:, None]) @ self.distance_keys[layer].mT).gather(3, index)
            scores = ((by_content + by_distance) * attention.scale).masked_fill(hidden, float("-inf"))
            return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values

        content = self.model.transformer.word_embedding(token_ids)
        x = torch.cat([content, query_tokens(self.model, num_rows, targets.shape[1])], 1)
        return self.model.lm_loss(run_layers(self.model, x, num_content, attend)[:, num_content:])

    def keep_rows(self, index: Tensor) -> None:
        """Rows left the batch: the new row i is the old row index[i]."""
        self.positions, self.num_visible = self.positions[index], self.num_visible[index]
        self.keys, self.values = self.keys[:, index], self.values[:, index]


class TwoStreamText(nn.Module):
    """Whole texts at once, with every position predicted under several masks, as training needs."""

    def __init__(self, model: XLNetLMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, content_sees: Tensor, queries_see: Tensor) -> Tensor:
        """Hidden states of the query stream, [rows, masks, length, d_model]; `model.lm_loss` turns them into logits.

        token_ids: [rows, length] int64, in the order of their positions.
        content_sees: [rows, length, length] bool, [b, i, j]: the content of i sees j; each sees itself.
        queries_see: [rows, masks, length, length] bool, the same for every mask's queries; each sees something.
        """
        model, drop = self.model, self.model.transformer.dropout
        num_rows, length = token_ids.shape
        num_masks = queries_see.shape[1]
        sees = torch.cat([content_sees[:, None], queries_see], 1).flatten(1, 2)[:, None]
        encoding = drop(distance_encoding(model, torch.arange(length, -length, -1, device=token_ids.device)))

        def attend(layer: int, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            distance_keys = torch.einsum("ed,dnh->neh", encoding, attention.r)
            by_content = (q + attention.r_w_bias[:, None]) @ k.mT
            by_distance = (q + attention.r_r_bias[:, None]) @ distance_keys.mT
            by_distance = shifted(by_distance.unflatten(2, (1 + num_masks, length))).flatten(2, 3)
            scores = (by_content + by_distance).float() * attention.scale
            probs = scores.masked_fill(~sees, float("-inf")).softmax(-1)
            return attention.dropout(probs).to(v.dtype) @ v

        content = drop(model.transformer.word_embedding(token_ids))
        queries = drop(query_tokens(model, num_rows, num_masks * length)).to(content.dtype)
        x = run_layers(model, torch.cat([content, queries], 1), length, attend)
        return drop(x[:, length:]).unflatten(1, (num_masks, length))


def shifted(scores: Tensor) -> Tensor:
    """Turn scores by distance into scores by key: [..., length, 2 length] -> [..., length, length].

    Column e of query i is distance length - e; the result's column j is distance i - j (Dai et al. 2019, appendix B).
    """
    length = scores.shape[-2]
    scores = scores.flatten(-2)[..., length:]
    return scores.unflatten(-1, (length, 2 * length - 1))[..., :length]
