"""Bytes of the caches, foretold, against those of the tensors; refusals on a device that is told to be small."""

from __future__ import annotations

import re

import psutil
import pytest
import torch
from families import tiny
from tiny import tiny_llama
from transformers import Qwen3Config, Qwen3ForCausalLM

import specdec
from specdec import ConfigError, batch_invariant
from specdec.batch.cache import RaggedLayer
from specdec.batch.layout import Ragged, Repad
from specdec.network import memory
from specdec.network.choose import service_of
from specdec.network.fused import FusedNetwork
from specdec.network.invariant.network import SPARE_SLOTS, InvariantNetwork, kept_invariant
from specdec.network.memory import PROBE_SLOTS
from specdec.network.stock import StockNetwork

PROMPTS = torch.tensor([[5, 9, 7, 5], [11, 4, 8, 6]])


def used(network_type, model, max_rows, num_slots, layout):
    """Bytes of a cache after a forward of one token."""
    network = network_type(model, max_rows, num_slots, layout=layout)
    with torch.no_grad(), network.running():
        nothing = torch.zeros(max_rows, dtype=torch.long)
        network.forward(nothing[:, None], nothing, 1)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in network.cache.layers)


@pytest.mark.parametrize("layout", [Ragged(), Repad()])
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3", "gemma2"])
def test_bytes_of_the_models_own_modules(family, layout):
    model = tiny(family)
    network_type = service_of(model, layout).network_type
    assert issubclass(network_type, FusedNetwork if family == "llama" else StockNetwork)
    assert memory.cache_bytes(network_type, model, 3, 50, layout) == (used(network_type, model, 3, 50, layout), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_invariant_forward(dtype):
    """Rows and slots are rounded up; one that is kept costs nothing while it serves, and is freed when it does not."""
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=12, num_key_value_heads=2, **sizes)).eval().to(dtype)
    layout = Ragged()
    with batch_invariant(model):
        network_type = service_of(model, layout).network_type
        assert network_type is InvariantNetwork
        specdec.release(model)  # the probe's
        foretold, freed = memory.cache_bytes(network_type, model, 5, 300, layout)
        assert freed == 0 and foretold == 8 * (512 + SPARE_SLOTS) * 2 * 3 * 2 * 12 * dtype.itemsize
        with kept_invariant(model, 5, 300) as kept:
            assert kept.cache.nbytes == foretold
        assert memory.cache_bytes(network_type, model, 8, 512, layout) == (0, 0)
        larger, freed = memory.cache_bytes(network_type, model, 8, 513, layout)
        assert freed == foretold
        with kept_invariant(model, 8, 513) as kept:
            assert kept.cache.nbytes == larger


@pytest.fixture
def device_with(monkeypatch):
    def set_free(free):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        monkeypatch.setattr(memory, "LIMITED_DEVICES", ("cpu",))

    return set_free


def generate(model, **options):
    return specdec.generate(model, PROMPTS, max_new_tokens=8, eos_token_id=None, **options)


def small_only(allocate):
    def checked(layer, keys, values):
        assert layer.owner.num_slots <= PROBE_SLOTS, "more than what is measured was allocated"
        allocate(layer, keys, values)

    return checked


# 2 rows of 4 + 8 tokens and the 3 that a step may write behind them
SLOTS = 2 * (4 + 8 + 3)


@pytest.mark.parametrize("invariant", [False, True])
def test_what_does_not_fit_is_refused_before_anything_is_allocated(device_with, monkeypatch, invariant):
    model, draft = tiny_llama(), tiny_llama(1, num_hidden_layers=1)
    options = dict(drafter=draft, num_speculative_tokens=2)
    with batch_invariant(model) if invariant else torch.no_grad():
        expected = generate(model, **options)  # probes, which need little, are behind us
        specdec.release()
        per_slot = 2 * 2 * 8 * 4  # keys and values of a layer
        slots = 2 * (256 + SPARE_SLOTS) if invariant else SLOTS
        needed = (slots * 2 + SLOTS) * per_slot
        device_with(needed - 1)
        with monkeypatch.context() as patch:
            patch.setattr(RaggedLayer, "lazy_initialization", small_only(RaggedLayer.lazy_initialization))
            with pytest.raises(ConfigError) as refusal:
                generate(model, **options)
        text = str(refusal.value)
        assert [int(number) for number in re.findall(r"(\d+) bytes", text)] == [needed, needed - 1]
        assert "target" in text and "draft model" in text and "lower max_new_tokens" in text
        device_with(needed)
        assert torch.equal(generate(model, **options), expected)


def test_prompt_lookup_needs_no_second_cache(device_with):
    model = tiny_llama()
    generate(model)
    device_with(SLOTS * 2 * 2 * 2 * 8 * 4)
    generate(model, drafter="prompt_lookup", num_speculative_tokens=2)


def test_generate_many_is_refused_too(device_with):
    model = tiny_llama()
    device_with(1000)
    with pytest.raises(ConfigError, match="available"):
        specdec.generate_many(model, list(PROMPTS), max_new_tokens=8)


def test_a_cpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    generate(tiny_llama())


def test_a_cpu_has_the_memory_of_its_host():
    assert 0 < memory.free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_memory_that_torch_holds_unused_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert memory.free_bytes(torch.device("cuda")) == 120
