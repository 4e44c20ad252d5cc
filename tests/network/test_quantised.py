"""Quantised targets are decoded through their own modules: no packed or merged weight stands in for them."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from torch import nn

import specdec
from specdec.batch.cache import RaggedCache
from specdec.network.base import num_embeddings_of, vocab_size_of
from specdec.network.fused import can_fuse
from specdec.network.probe import probe, probe_tolerance
from specdec.network.stock import StockNetwork

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


class RoundedInputs(torch.Tensor):
    """As torchao's int8 does it: products round what they are given, each token by its own scale. In models as small as
    those of the tests few inputs lie close to a step, so a sine of their last bits brings all of them close to one."""

    __module__ = "torchao.stand_in"
    act_quant_kwargs = SimpleNamespace(granularity=SimpleNamespace())

    def dequantize(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                scale = args[0].abs().amax(-1, keepdim=True) / 127
                weight = args[1].as_subclass(torch.Tensor)
                steps = args[0] / scale
                return nn.functional.linear((steps + (steps * 1e6).sin()).round() * scale, weight, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})


def with_rounded_inputs(model, kind=RoundedInputs):
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Linear and module is not model.lm_head:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(kind), requires_grad=False)
    return model


def test_rounded_inputs_do_not_count_as_a_fault_of_the_cache(demo_pair, caplog):
    model = with_rounded_inputs(demo_pair.target)
    assert min(probe(model, StockNetwork, seed) for seed in range(3)) > probe_tolerance(model), "what made it refuse"
    ids = torch.tensor([PROMPTS[2].tolist()])
    with caplog.at_level(logging.WARNING):
        assert specdec.generate(model, ids, max_new_tokens=12, eos_token_id=None).shape == (1, ids.shape[1] + 12)
    assert "rounds its inputs to 8 bits at model.layers.0.self_attn.q_proj" in caplog.text
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("fault", ["positions", "masks"])
def test_the_probe_of_rounded_inputs_still_sees_faults(fault, demo_pair, monkeypatch):
    run = StockNetwork._run

    def mistaken(self, token_ids, positions, *rest):
        return run(self, token_ids, positions.max(0, keepdim=True).values.expand_as(positions), *rest)

    if fault == "positions":
        monkeypatch.setattr(StockNetwork, "_run", mistaken)
    else:
        monkeypatch.setattr(RaggedCache, "get_query_offset", lambda self, layer_idx=0: self.columns.starts + 1)
    with pytest.raises(specdec.UnsupportedModelError, match="gives other logits over a ragged cache"):
        specdec.generate(with_rounded_inputs(demo_pair.target), torch.tensor([[5, 6, 7]]), max_new_tokens=3)


class OneScale(RoundedInputs):
    __module__ = "torchao.stand_in"

    class PerTensor:
        pass

    act_quant_kwargs = SimpleNamespace(granularity=PerTensor())


def dynamic(dtype, seed=0):
    return torch.ao.quantization.quantize_dynamic(tiny_llama(seed, eos_token_id=None), {nn.Linear}, dtype=dtype)


IGNORED = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated:UserWarning")


@IGNORED
@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("kind", ["torch.ao", "torchao"])
def test_one_scale_for_all_tokens_is_refused_by_name(kind, role):
    plain = tiny_llama(0, eos_token_id=None)
    model = dynamic(torch.qint8) if kind == "torch.ao" else with_rounded_inputs(plain, OneScale)
    target, draft = (model, None) if role == "target" else (plain, model)
    words = r"model\.layers\.0\.self_attn\.q_proj \(torch.*Linear\) rounds all tokens of a call by one scale.*per token"
    with pytest.raises(specdec.UnsupportedModelError, match=words):
        specdec.generate(target, torch.tensor([[5, 6, 7]]), drafter=draft, max_new_tokens=3)


@IGNORED
@pytest.mark.parametrize("drafter", [None, "prompt_lookup", "itself", "plain"])
def test_weights_that_a_method_gives_out(drafter):
    """torch.ao's modules: `weight` is a method, and no parameter stands for it."""
    model = dynamic(torch.float16)
    assert callable(model.lm_head.weight) and vocab_size_of(model) == num_embeddings_of(model) == 61
    expected = [plain_greedy(model, prompt, max_new_tokens=16, pad_token_id=0) for prompt in PROMPTS]
    ids, mask = left_pad(PROMPTS)
    chosen = {"itself": model, "plain": tiny_llama(0, eos_token_id=None)}.get(drafter, drafter)
    out = specdec.generate(model, ids, mask, drafter=chosen, max_new_tokens=16, pad_token_id=0)
    assert continuations(out, ids.shape[1], expected, 0) == expected
    out = specdec.generate(chosen if drafter == "plain" else model, ids, mask, drafter=model, max_new_tokens=4)
    assert out.shape[1] == ids.shape[1] + 4


@IGNORED
def test_an_embedding_whose_weight_is_a_method():
    model = tiny_llama(0)
    model.get_input_embeddings().qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    quantised = torch.ao.nn.quantized.Embedding.from_float(model.get_input_embeddings())
    model.set_input_embeddings(quantised)
    assert callable(quantised.weight) and num_embeddings_of(model) == 61
    model.set_input_embeddings(nn.Identity())
    assert num_embeddings_of(model) == 61  # what the config says


def test_a_head_that_is_packed():
    model = tiny_llama(0)
    head = model.lm_head
    head.weight = nn.Parameter(torch.zeros(61 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert vocab_size_of(model) == 61
