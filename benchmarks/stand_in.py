"""Stand-ins for large models: a small trained model inflated to a large one's shape, computing the same function.

A stand-in has the large shape's cost and writes the small model's text, so that speculative decoding can be timed with
a real acceptance where no large weights are available. The inflation is dense, because zeros would hide rounding: the
residual stream is rotated by a random orthogonal matrix with the norms' weights folded into the next linear; neurons,
attention heads and values are split into copies whose outputs carry random shares summing to 1. Two things stay zero:
every second pair of a query's and key's dimensions if the head grows, and the output projections of the layers that the
small model lacks. Every report about a stand-in must say that it is one.

    python benchmarks/stand_in.py --small specdec/assets/demo_pair/target --shape tiny --device cpu
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specdec.files.loading import read_prompts


@dataclass(frozen=True)
class Shape:
    """The shape of a large Qwen3; embeddings are never tied here, which does not change the bytes a step reads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "32B": Shape(5120, 64, 64, 8, 128, 25600, 151936),
    "14B": Shape(5120, 40, 40, 8, 128, 17408, 151936),
    "8B": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936),
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    # 32 divides all sizes, as required for a batch-invariant float32 model on a CPU.
    "tiny": Shape(448, 10, 10, 5, 128, 1120, 2304),
}


class StandIn(NamedTuple):
    """to_small_hidden: [hidden, small hidden] float32; the states after the final norm, multiplied by it, are the small
    model's up to rounding."""

    model: Qwen3ForCausalLM
    to_small_hidden: Tensor


def inflate(
    small: Qwen3ForCausalLM, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Qwen3ForCausalLM:
    """The model of `stand_in`."""
    return stand_in(small, shape, dtype, device, seed).model


@torch.no_grad()
def stand_in(
    small: Qwen3ForCausalLM, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> StandIn:
    """A model of `shape` whose logits over the small vocabulary are `small`'s up to rounding; moves `small` there.

    Raises ValueError if the small model does not fit into the shape.
    """
    old = small.config
    check_fits(old, shape)
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size, max_position_embeddings=max(old.max_position_embeddings, 32768),
        rope_parameters=old.rope_parameters, rms_norm_eps=old.rms_norm_eps * old.hidden_size / shape.hidden_size,
        tie_word_embeddings=False, bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id, dtype=dtype,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            big = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    big.generation_config = small.generation_config
    small = small.to(device, torch.float32)
    rotation = torch.linalg.qr(torch.randn(shape.hidden_size, shape.hidden_size, device=device))[0]
    writer = Inflation(rotation[:, : old.hidden_size], old, shape, torch.Generator(device=device).manual_seed(seed))
    writer.vocabulary(big, small, old.pad_token_id)
    # Spread evenly, so that the layers that add nothing lie between those that add something.
    places = [index * shape.num_layers // old.num_hidden_layers for index in range(old.num_hidden_layers)]
    for place, layer in zip(places, small.model.layers, strict=True):
        writer.layer(big.model.layers[place], layer)
    for place in set(range(shape.num_layers)) - set(places):
        big.model.layers[place].self_attn.o_proj.weight.zero_()
        big.model.layers[place].mlp.down_proj.weight.zero_()
        # Layers of one kind, as in a real model: a draft's one-launch step needs that.
        for name in ("q_norm", "k_norm"):
            known = getattr(big.model.layers[places[0]].self_attn, name).variance_epsilon
            getattr(big.model.layers[place].self_attn, name).variance_epsilon = known
    return StandIn(big, writer.to_small_hidden(small.model.norm.weight))


def check_fits(old: Qwen3Config, shape: Shape) -> None:
    for name, have, need in (
        ("hidden_size", shape.hidden_size, old.hidden_size),
        ("num_layers", shape.num_layers, old.num_hidden_layers),
        ("num_heads", shape.num_heads, old.num_attention_heads),
        ("num_kv_heads", shape.num_kv_heads, old.num_key_value_heads),
        ("intermediate_size", shape.intermediate_size, old.intermediate_size),
        ("vocab_size", shape.vocab_size, old.vocab_size),
    ):
        if have < need:
            raise ValueError(
                f"the shape's {name}={have} is smaller than the small model's {need}; choose another shape"
            )
    if shape.head_dim % old.head_dim:
        raise ValueError(f"the shape's head_dim={shape.head_dim} is not a multiple of the small model's {old.head_dim}")
    slots = copies_of(old.num_key_value_heads, shape.num_kv_heads).bincount().min()
    if slots * (shape.num_heads // shape.num_kv_heads) < old.num_attention_heads // old.num_key_value_heads:
        raise ValueError(
            f"{shape.num_heads} heads cannot hold a copy of each of the small model's heads; choose another shape"
        )


class Inflation:
    """Writes small weights into a large model.

    basis: [hidden, small hidden], the rotated residual stream's directions that carry the small one.
    """

    def __init__(self, basis: Tensor, old: Qwen3Config, shape: Shape, generator: torch.Generator):
        self.basis, self.old, self.shape, self.generator = basis, old, shape, generator
        # An RMSNorm divides by the mean over more dimensions.
        self.norm_scale = (old.hidden_size / shape.hidden_size) ** 0.5

    def vocabulary(self, big: Qwen3ForCausalLM, small: Qwen3ForCausalLM, filler: int) -> None:
        """filler: a token that the small model never prefers; further vocabulary entries are copies of it."""
        index = torch.arange(self.shape.vocab_size, device=self.basis.device)
        index = index.where(index < self.old.vocab_size, filler)
        big.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight[index] @ self.basis.T)
        big.lm_head.weight.copy_(self._reading(small.lm_head.weight, small.model.norm.weight)[index])

    def layer(self, big: nn.Module, small: nn.Module) -> None:
        self._attention(big.self_attn, small.self_attn, small.input_layernorm.weight)
        norm = small.post_attention_layernorm.weight
        copies = copies_of(self.old.intermediate_size, self.shape.intermediate_size).to(self.basis.device)
        big.mlp.gate_proj.weight.copy_(self._reading(small.mlp.gate_proj.weight, norm)[copies])
        big.mlp.up_proj.weight.copy_(self._reading(small.mlp.up_proj.weight, norm)[copies])
        big.mlp.down_proj.weight.copy_(self.basis @ (small.mlp.down_proj.weight[:, copies] * self._shares(copies)))

    def _attention(self, big: nn.Module, small: nn.Module, norm: Tensor) -> None:
        old, shape, device = self.old, self.shape, self.basis.device
        times = shape.head_dim // old.head_dim
        kv_copies = copies_of(old.num_key_value_heads, shape.num_kv_heads)
        # Each key head's queries take, in turn, the small queries of the key head that it copies.
        group, old_group = shape.num_heads // shape.num_kv_heads, old.num_attention_heads // old.num_key_value_heads
        taken = [0] * old.num_key_value_heads
        query_copies = []
        for kv_head in kv_copies.tolist():
            for _ in range(group):
                query_copies.append(kv_head * old_group + taken[kv_head] % old_group)
                taken[kv_head] += 1
        queries, kvs = torch.tensor(query_copies, device=device), kv_copies.to(device)
        # Pair i of the small head turns as fast as pair i * times of the large one.
        half = torch.arange(old.head_dim // 2, device=device) * times
        turning = torch.cat([half, half + shape.head_dim // 2])
        for name, copies in (("q", queries), ("k", kvs)):
            rows = self._reading(getattr(small, f"{name}_proj").weight, norm).view(-1, old.head_dim, shape.hidden_size)
            out = rows.new_zeros(len(copies), shape.head_dim, shape.hidden_size)
            out[:, turning] = rows[copies]
            getattr(big, f"{name}_proj").weight.copy_(out.flatten(0, 1))
            weight = getattr(small, f"{name}_norm").weight
            # The mean square of a head with zeros is smaller; the query's factor compensates for the score's scaling.
            large = torch.ones(shape.head_dim, device=device)
            large[turning] = weight if name == "q" else weight / times**0.5
            getattr(big, f"{name}_norm").weight.copy_(large)
            getattr(big, f"{name}_norm").variance_epsilon = old.rms_norm_eps / times
        values = self._reading(small.v_proj.weight, norm).view(-1, old.head_dim, shape.hidden_size)[kvs]
        big.v_proj.weight.copy_(values.repeat(1, times, 1).flatten(0, 1))
        dims = torch.arange(old.head_dim, device=device).repeat(times)
        columns = (queries[:, None] * old.head_dim + dims).flatten()
        big.o_proj.weight.copy_(self.basis @ (small.o_proj.weight[:, columns] * self._shares(columns)))

    def to_small_hidden(self, norm: Tensor) -> Tensor:
        """Maps the output of the large final norm, whose weights are ones, to that of the small one, with weights
        `norm`.
        """
        return self.basis * self.norm_scale * norm

    def _reading(self, weight: Tensor, norm: Tensor) -> Tensor:
        """The weights of a linear after an RMSNorm, [out, hidden]."""
        return (weight * norm) @ self.basis.T * self.norm_scale

    def _shares(self, copies: Tensor) -> Tensor:
        """A random weight for each copy; those of one original sum to 1."""
        raw = 1 + torch.rand(len(copies), device=copies.device, generator=self.generator)
        return raw / torch.zeros(int(copies.max()) + 1, device=copies.device).index_add(0, copies, raw)[copies]


def copies_of(count: int, slots: int) -> Tensor:
    """[slots] int64: which original each slot copies, neighbours together and as evenly as possible.

    >>> copies_of(2, 5).tolist()
    [0, 0, 0, 1, 1]
    """
    return torch.arange(slots) * count // slots


@torch.no_grad()
def agreement(small: nn.Module, big: nn.Module, prompts: list[Tensor]) -> dict[str, float]:
    """Over all positions of the prompts: how often the argmax agrees, and the largest difference of the logits."""
    same = total = 0
    worst = 0.0
    for prompt in prompts:
        expected = small(input_ids=prompt[None].to(small.device)).logits[0].float()
        found = big(input_ids=prompt[None].to(big.device)).logits[0].float()
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        total += len(prompt)
        worst = max(worst, (found[:, : expected.shape[1]] - expected).abs().max().item())
    return {"positions": total, "argmax_agreement": same / total, "largest_difference": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description="Inflate a small model and compare the two.")
    parser.add_argument("--small", required=True, help="folder of a Qwen3 checkpoint")
    parser.add_argument("--prompts", help="prompts.json; by default the one next to the checkpoint's folder")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-prompts", type=int, default=8)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    small = AutoModelForCausalLM.from_pretrained(arguments.small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.small)
    path = Path(arguments.prompts or Path(arguments.small).parent / "prompts.json")
    texts = [prompt.text for prompt in read_prompts(path, arguments.num_prompts)]
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    big = inflate(small, SHAPES[arguments.shape], getattr(torch, arguments.dtype), arguments.device)
    billions = sum(parameter.numel() for parameter in big.parameters()) / 1e9
    print(json.dumps({"shape": arguments.shape, "billions": round(billions, 3), **agreement(small, big, prompts)}))


if __name__ == "__main__":
    main()
