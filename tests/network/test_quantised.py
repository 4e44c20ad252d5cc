"""Quantised targets are decoded through their own modules: no packed or merged weight stands in for them."""

from __future__ import annotations

import pytest
import torch
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from torch import nn

import specdec
from specdec.network.fused import can_fuse

PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 5, 6, 7], [9], [11, 12, 13, 11])]


class Int8Subclass(nn.Linear):
    """As bitsandbytes does it: a subclass of Linear whose weight holds codes and whose forward knows what they mean."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int8Module(nn.Module):
    """As others do it: no Linear at all, and no parameter."""

    def __init__(self, linear):
        super().__init__()
        own = Int8Subclass(linear)
        self.in_features, self.out_features, self.bias, self.num_calls = own.in_features, own.out_features, None, 0
        self.register_buffer("codes", own.weight.detach())
        self.register_buffer("scale", own.scale)

    def forward(self, x):
        self.num_calls += 1
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype))


class Codes(torch.Tensor):
    """As torchao does it: the module stays, its weight is a subclass of Tensor that products dispatch on."""

    num_calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            Codes.num_calls += 1
            with torch._C.DisableTorchFunctionSubclass():
                codes = args[1].as_subclass(torch.Tensor)
                return nn.functional.linear(args[0], (codes * 20).round() / 20, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})


def quantised(kind):
    model = tiny_llama(3, eos_token_id=None)
    replaced = []
    for layer in model.model.layers:
        for block, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            linear = getattr(block, name)
            if kind is Codes:
                linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Codes), requires_grad=False)
            else:
                replaced.append(kind(linear))
                setattr(block, name, replaced[-1])
    return model, replaced


@pytest.mark.parametrize("kind", [Int8Subclass, Int8Module, Codes])
def test_own_modules_are_called_and_the_tokens_are_transformers_own(kind):
    model, replaced = quantised(kind)
    assert not can_fuse(model)
    expected = [plain_greedy(model, prompt, max_new_tokens=16, pad_token_id=0) for prompt in PROMPTS]
    original = tiny_llama(3, eos_token_id=None)
    assert expected != [plain_greedy(original, prompt, max_new_tokens=16, pad_token_id=0) for prompt in PROMPTS]
    Codes.num_calls = 0
    for module in replaced:
        module.num_calls = 0
    ids, mask = left_pad(PROMPTS)
    draft = tiny_llama(1, num_hidden_layers=1, eos_token_id=None)
    out = specdec.generate(model, ids, mask, drafter=draft, max_new_tokens=16, pad_token_id=0)
    assert continuations(out, ids.shape[1], expected, 0) == expected
    assert Codes.num_calls > 0 if kind is Codes else all(module.num_calls > 0 for module in replaced)
    weights = [module.weight for module in model.modules() if isinstance(module, Int8Subclass)]
    assert all(weight.dtype == torch.int8 for weight in weights)


@pytest.mark.parametrize("kind", [Int8Subclass, Codes])
def test_as_a_draft_model(kind):
    target = tiny_llama(0, eos_token_id=None)
    expected = [plain_greedy(target, prompt, max_new_tokens=16, pad_token_id=0) for prompt in PROMPTS]
    ids, mask = left_pad(PROMPTS)
    out = specdec.generate(target, ids, mask, drafter=quantised(kind)[0], max_new_tokens=16, pad_token_id=0)
    assert continuations(out, ids.shape[1], expected, 0) == expected
