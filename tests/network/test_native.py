"""The native decode step against the torch operations and the model's own modules, and what happens without it."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import left_pad, plain_greedy, tiny_llama
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import specdec
from specdec.batch.rows import Rows
from specdec.network.choose import service_of
from specdec.network.fused import FusedNetwork
from specdec.network.native import build, calls
from specdec.network.native import network as native_network
from specdec.network.native.calls import num_threads
from specdec.network.native.network import MAX_TOKENS, NativeNetwork, can_run_natively, native_weights

VOCAB = 67
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}


def model_of(family, heads=4, kv_heads=2, head_dim=16, hidden=32, intermediate=48, **options):
    """Random, with norms and biases away from 1 and 0, where a mistake with them would not show."""
    kind, config = CLASSES[family]
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=3, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = kind(config(**sizes, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# Sizes that are no multiples of a vector or a panel, heads of the two sizes with loops of their own and of others.
MODELS = {
    "llama": lambda: model_of("llama"),
    "llama, biases": lambda: model_of("llama", attention_bias=True, mlp_bias=True, intermediate=41),
    "llama, odd sizes": lambda: model_of("llama", heads=6, kv_heads=3, head_dim=22, hidden=42, intermediate=83),
    "llama, tied, large heads": lambda: model_of("llama", head_dim=64, hidden=100, tie_word_embeddings=True),
    "mistral, window": lambda: model_of("mistral", head_dim=128, sliding_window=5),
    "qwen2, one window": lambda: model_of(
        "qwen2", head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3, norms, no groups": lambda: model_of("qwen3", kv_heads=4, head_dim=64),
    "qwen3, one key head, tied": lambda: model_of("qwen3", kv_heads=1, head_dim=10, tie_word_embeddings=True),
}
BUILT = {name: make() for name, make in MODELS.items()}


@pytest.fixture(autouse=True, scope="module")
def switched_on():
    """However the other tests are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.SWITCH, "1")
        yield


@pytest.fixture(params=[1, 2, 5], ids=lambda count: f"{count} threads")  # more than there may be processors
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No library yet, and none in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "specdec" / "native"
    build.library.cache_clear()


def assert_near(values, expected):
    """Within float32's rounding through three layers, relative to the largest value: sums run in another order."""
    torch.testing.assert_close(values, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


def run(network, ids, starts, width, layers=()):
    """Cache each row's first starts[b] tokens, then feed the next `width`; [rows, width, vocab] and the states."""
    rows = Rows([row[:start] for row, start in zip(ids, starts, strict=True)], width, 0, torch.device("cpu"))
    network.prefill(rows)
    tokens = torch.stack([row[start : start + width] for row, start in zip(ids, starts, strict=True)])
    return network.forward(tokens, torch.tensor(starts), max(starts) + width, layers)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8).map(lambda n: sorted(n, reverse=True)),
    st.integers(1, 7),
    st.integers(0, 99),
)
@torch.no_grad()
def test_ragged_steps_equal_the_torch_operations(name, starts, width, seed):
    model, layers = BUILT[name], (0, 1, 2, 3)
    ids = torch.randint(VOCAB, (len(starts), 50), generator=torch.Generator().manual_seed(seed))
    slots = max(starts) + width
    native = run(NativeNetwork(model, len(starts), slots), ids, starts, width, layers)
    fused = run(FusedNetwork(model, len(starts), slots), ids, starts, width, layers)
    assert_near(native.logits, fused.logits)
    for mine, other in zip(native.hidden_states, fused.hidden_states, strict=True):
        assert_near(mine, other)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_equal_the_models_own(name, threads):
    model, starts, width = BUILT[name], [23, 11, 2], 5
    ids = torch.randint(VOCAB, (3, 30), generator=torch.Generator().manual_seed(1))
    out = run(NativeNetwork(model, 3, 30), ids, starts, width)
    for row, start in enumerate(starts):
        expected = model(ids[row : row + 1], use_cache=False).logits[0, start : start + width]
        assert_near(out.logits[row], expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_tokens_bits_do_not_depend_on_what_is_computed_with_it(name, threads):
    """Neither on other rows, their lengths and their NaN, nor on the columns after it, nor on the number of threads."""
    model, starts, width = BUILT[name], [19, 12, 3], 6
    ids = torch.randint(VOCAB, (3, 30), generator=torch.Generator().manual_seed(2))
    together = run(NativeNetwork(model, 3, 30), ids, starts, width).logits
    for row, start in enumerate(starts):
        network = NativeNetwork(model, 1, 40)
        alone = [
            network.forward(ids[row : row + 1, i : i + 1], torch.tensor([i]), i + 1).logits[0, 0]
            for i in range(start + width)
        ]
        assert torch.equal(together[row], torch.stack(alone[start:]))

    network = NativeNetwork(model, 3, 30)
    run(network, ids, starts, 1)
    for layer in network.cache.layers:
        layer.keys[0], layer.values[0] = torch.nan, torch.nan
    tokens = torch.stack([row[start : start + width] for row, start in zip(ids, starts, strict=True)])
    poisoned = network.forward(tokens, torch.tensor(starts), max(starts) + width).logits
    assert poisoned[0].isnan().all() and torch.equal(poisoned[1:], together[1:])


@torch.no_grad()
def test_what_lies_after_a_rows_text_is_not_seen():
    """Rejected drafts, NaN among them, and slots of the cache that nothing was written to."""
    model = BUILT["llama"]
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(3))
    network = NativeNetwork(model, 2, 30)
    expected = run(network, ids, [9, 4], 3).logits
    for layer in network.cache.layers:
        for row, start in enumerate((9, 4)):
            layer.keys[row, start:], layer.values[row, start:] = torch.nan, torch.nan
    tokens = torch.stack([ids[0, 9:12], ids[1, 4:7]])
    assert torch.equal(network.forward(tokens, torch.tensor([9, 4]), 20).logits, expected)


@torch.no_grad()
def test_steps_of_many_tokens_take_the_other_way(monkeypatch):
    """Over the same cache, to the same logits."""
    model, starts = BUILT["qwen3, norms, no groups"], [11, 7]
    ids = torch.randint(VOCAB, (2, 100), generator=torch.Generator().manual_seed(4))
    width = MAX_TOKENS // 2
    steps = []
    network = NativeNetwork(model, 2, 100)
    native_layers = network.weights.native.layers
    monkeypatch.setattr(network.weights.native, "layers", lambda step: (steps.append(1), native_layers(step)))
    few = run(network, ids, starts, width).logits
    count = len(steps)
    more = run(network, ids, starts, width + 1).logits
    assert count == 2 and len(steps) == 3, "the two prefills and the narrow step"
    assert_near(more[:, :width], few)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_plain_greedy(name):
    model = BUILT[name]
    assert service_of(model).network_type is NativeNetwork
    prompts = [torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(9)) for length in (11, 1, 6)]
    ids, mask = left_pad(prompts)
    expected = [plain_greedy(model, prompt, max_new_tokens=16) for prompt in prompts]
    for drafter in ("prompt_lookup", tiny_llama(3, vocab_size=VOCAB)):
        out = specdec.generate(model, ids, mask, drafter=drafter, num_speculative_tokens=3, max_new_tokens=16)
        assert out[:, 11:].tolist() == expected


def test_the_switch(monkeypatch):
    model = model_of("llama")
    assert service_of(model).network_type is NativeNetwork
    monkeypatch.setenv("SPECDEC_NATIVE", "0")
    assert service_of(model).network_type is FusedNetwork
    monkeypatch.setenv("SPECDEC_NATIVE", "1")
    assert service_of(model).network_type is NativeNetwork


def test_edited_weights_and_settings_are_noticed():
    model = model_of("llama")
    first = native_weights(model)
    assert native_weights(model) is first
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    second = native_weights(model)
    assert second is not first
    model.model.layers[0].post_attention_layernorm.variance_epsilon = 0.5
    assert native_weights(model) is not second
    ids = torch.tensor([[5, 9, 7, 5]])
    out = specdec.generate(model, ids, max_new_tokens=8)
    assert out[0, 4:].tolist() == plain_greedy(model, ids[0], max_new_tokens=8)


def test_what_is_hooked_or_half_precision_is_left_to_others():
    model = model_of("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert not issubclass(service_of(model).network_type, FusedNetwork)
    for dtype in (torch.bfloat16, torch.float64):
        assert not can_run_natively(model_of("llama").to(dtype))


def test_a_model_that_was_cut_down_is_left_to_others():
    """The step would read past the ends of its weights."""
    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(32, 40, bias=False))
    mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    assert not can_run_natively(model)
    assert service_of(model).network_type is FusedNetwork


def test_little_memory(monkeypatch):
    monkeypatch.setattr(native_network, "free_bytes", lambda device: 1000)
    assert not can_run_natively(model_of("llama"))


def test_compiled_once_and_found_again(empty_cache, caplog):
    with caplog.at_level(logging.INFO):
        assert build.library() is not None
    assert "compiling" in caplog.text and len(list(empty_cache.glob("*.so"))) == 1
    caplog.clear()
    build.library.cache_clear()
    begin = time.perf_counter()
    assert build.library() is not None
    assert not caplog.records and time.perf_counter() - begin < 0.5


def test_another_torch_or_processor_has_another_library(monkeypatch):
    key = build.key()
    monkeypatch.setattr(build, "processor", lambda: "another")
    other = build.key()
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({key, other, build.key()}) == 3


def test_a_broken_file_is_compiled_again(empty_cache):
    empty_cache.mkdir(parents=True)
    (empty_cache / f"step-{build.key()}.so").write_bytes(b"cut short")
    assert isinstance(build.library(), ctypes.CDLL)


def no_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "no-such-compiler")
    return "no C\\+\\+ compiler"


def failing_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "false")
    return "false failed"


def endless_compiler(monkeypatch, folder):
    script = folder / "endless"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "TIMEOUT_S", 0.1)
    return "took longer than"


def unusable_folder(monkeypatch, folder):
    (folder / "a-file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a-file"))
    return "a-file"


def other_system(monkeypatch, folder):
    monkeypatch.setattr(sys, "platform", "darwin")
    return "darwin"


@pytest.mark.parametrize("fault", [no_compiler, failing_compiler, endless_compiler, unusable_folder, other_system])
def test_without_a_library_torch_serves_and_says_why_once(fault, empty_cache, tmp_path, monkeypatch, caplog):
    text = fault(monkeypatch, tmp_path)
    ids = torch.tensor([[5, 9, 7, 5]])
    with caplog.at_level(logging.INFO, logger="specdec.network.native.build"):
        for model in (model_of("llama"), model_of("qwen3")):
            assert service_of(model).network_type is FusedNetwork
            out = specdec.generate(model, ids, max_new_tokens=4)
            assert out[0, 4:].tolist() == plain_greedy(model, ids[0], max_new_tokens=4)
    said = [record.getMessage() for record in caplog.records if "no native decode step" in record.getMessage()]
    assert len(said) == 1
    assert re.search(text, said[0])


def test_a_forked_process_waits_for_no_thread():
    """OpenMP's threads do not survive a fork; a parallel region would wait for them forever."""
    code = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "from specdec.network.native.network import NativeNetwork\n"
        "from tiny import tiny_llama\n"
        "model = tiny_llama()\n"
        "def step(network):\n"
        "    return network.forward(torch.tensor([[5]]), torch.tensor([0]), 1).logits\n"
        "with torch.inference_mode():\n"
        "    network = NativeNetwork(model, 1, 8)\n"
        "    expected = step(network)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(0 if torch.equal(step(network), expected) else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=root
    )
    assert done.stdout.strip() == "0", done.stderr[-2000:]


def test_threads_are_torchs(threads, monkeypatch):
    assert num_threads() == threads
    monkeypatch.setattr(calls, "_has_forked", True)
    assert num_threads() == 1
