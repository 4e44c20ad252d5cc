"""Steps of a model's own modules, captured: padded to buckets, replayed at other places, kept, and refused where the
host takes part. Off a GPU a replay runs the captured call again."""

from __future__ import annotations

import traceback
from types import SimpleNamespace

import pytest
import torch
from families import tiny
from tiny import continuations, left_pad, plain_greedy, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
from specdec import batch_invariant
from specdec.network import choose
from specdec.network.captured import graphs as step_graphs
from specdec.network.choose import build_network, service_of
from specdec.network.kept_forwards import kept_of
from specdec.network.stock import CapturedStock, CapturedSwapped, StockNetwork, SwappedNetwork

PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 7, 5, 9, 7, 5, 9], [11, 4, 8], [6, 13, 21, 34, 6, 13, 3, 8, 6, 13, 40])]
FAMILIES = ["gpt_neox", "gpt2", "opt", "phi", "stablelm", "starcoder2", "olmo2", "cohere", "gemma2"]


@pytest.fixture
def capturing(monkeypatch):
    """The shapes that were captured, [rows, width, slots] each; where steps are captured on this device."""
    shapes = []

    def capture(call, pool=None):
        output = call()
        shapes.append(tuple(output.logits.shape[:2]))

        def replay():
            new = call()
            for mine, fresh in zip(
                (output.logits, *output.hidden_states), (new.logits, *new.hidden_states), strict=True
            ):
                mine.copy_(fresh)

        return SimpleNamespace(replay=replay), output

    monkeypatch.setattr(step_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(choose, "CAPTURING_DEVICES", ("cpu",))
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_plain_greedys(capturing, family):
    model = tiny(family)
    assert service_of(model).network_type is CapturedStock, choose.capture_problem(model, CapturedStock)
    expected = [plain_greedy(model, prompt, max_new_tokens=12, pad_token_id=0) for prompt in PROMPTS]
    ids, mask = left_pad(PROMPTS)
    for drafter in (None, "prompt_lookup"):
        capturing.clear()
        for _ in range(2):  # the second finds the steps that the first has captured
            k = {} if drafter is None else {"num_speculative_tokens": 3}
            out = specdec.generate(model, ids, mask, drafter=drafter, max_new_tokens=12, pad_token_id=0, **k)
            assert continuations(out, ids.shape[1], expected, 0) == expected
        assert (4, 1 if drafter is None else 4) in capturing and len(set(capturing)) == len(capturing)


def test_padding_leaves_no_trace_and_hidden_states_are_the_modules(capturing):
    model = tiny("gpt_neox")
    network, plain = CapturedStock(model, 3, 60), StockNetwork(model, 3, 60)
    rows = specdec.Rows(PROMPTS, 16, 0, model.device)
    with network.running(), plain.running(), torch.no_grad():
        for one in (network, plain):
            one.prefill(rows)
        written = 0
        for width in (3, 1, 6):
            ids = torch.randint(3, 60, (3, width))
            starts = rows.lengths + written
            written += width
            ours = network.forward(ids, starts, int(starts.max()) + width, (0, 1, -1))
            theirs = plain.forward(ids, starts, int(starts.max()) + width, (0, 1, -1))
            pairs = zip((ours.logits, *ours.hidden_states), (theirs.logits, *theirs.hidden_states), strict=True)
            for mine, other in pairs:
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        for mine, other in zip(network.cache.layers, plain.cache.layers, strict=True):
            for row, length in enumerate(map(len, PROMPTS)):
                torch.testing.assert_close(mine.keys[row, :length], other.keys[row, :length], rtol=1e-4, atol=1e-5)


def test_a_larger_cache_holds_what_the_smaller_held(capturing):
    model = tiny("gpt_neox", max_position_embeddings=512)
    expected = [
        plain_greedy(model, PROMPTS[i % 3], max_new_tokens=300 if i == 1 else 5, pad_token_id=0) for i in range(6)
    ]
    done = specdec.generate_many(
        model, [PROMPTS[i % 3] for i in range(6)], max_new_tokens=[5, 300, 5, 5, 5, 5], max_rows=2, in_order=True,
        pad_token_id=0,
    )  # fmt: skip
    assert [one.token_ids for one in done] == expected


def test_other_weights_are_captured_anew(capturing):
    model = tiny("gpt_neox")
    ids = PROMPTS[0][None]
    specdec.generate(model, ids, max_new_tokens=4)
    first = kept_of(model, CapturedStock)
    specdec.generate(model, ids, max_new_tokens=4)
    assert kept_of(model, CapturedStock) is first and first.nbytes > 0
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach() * -1)
    out = specdec.generate(model, ids, max_new_tokens=4)
    assert out[0, ids.shape[1] :].tolist() == plain_greedy(model, PROMPTS[0], max_new_tokens=4)
    assert kept_of(model, CapturedStock) is not first


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_calls_within_inference_mode_and_outside_share_their_steps(capturing, first):
    model, ids = tiny("gpt_neox"), PROMPTS[0][None]
    expected = plain_greedy(model, PROMPTS[0], max_new_tokens=6)
    for mode in (first, torch.enable_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            out = specdec.generate(model, ids, drafter="prompt_lookup", num_speculative_tokens=2, max_new_tokens=6)
        assert out[0, ids.shape[1] :].tolist() == expected
    assert len(set(capturing)) == len(capturing), "captured once"


def test_steps_of_swapped_modules_are_apart_from_those_of_stock_modules(capturing, monkeypatch):
    """Neither serves in place of the other, whoever swapped the kernels in."""
    torch.manual_seed(1)
    model, ids = tiny("gpt_neox", vocab_size=64, intermediate_size=64), PROMPTS[0][None]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    specdec.generate(model, ids, max_new_tokens=4)
    stock = kept_of(model, CapturedStock)
    with batch_invariant(model):
        specdec.generate(model, ids, max_new_tokens=4)
        assert service_of(model).network_type is CapturedSwapped
    assert kept_of(model, CapturedStock) is stock and kept_of(model, CapturedSwapped) is not None
    specdec.generate(model, ids, max_new_tokens=4)
    assert kept_of(model, CapturedStock) is stock


def test_autocast_is_not_captured(capturing):
    model = tiny("gpt_neox")
    with torch.autocast("cpu", torch.bfloat16):
        assert service_of(model).network_type is StockNetwork
    assert service_of(model).network_type is CapturedStock


def test_what_asks_the_host_is_not_captured(capturing, monkeypatch):
    model = tiny("gpt_neox")

    def refusing(call, pool=None):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(step_graphs, "capture", refusing)
    assert "synchronizing" in choose.capture_problem(model, CapturedStock)
    assert choose._own_modules(model, specdec.batch.layout.Ragged()) is StockNetwork


def test_a_step_that_depends_on_the_hosts_length_is_noticed(capturing, monkeypatch):
    """A planted fault: a number that the host read when the step was captured."""
    model = tiny("gpt_neox")
    run = StockNetwork._run

    def with_host_length(self, token_ids, positions, *rest, **options):
        if token_ids.shape[1] > 1 and token_ids.shape[1] < 8:
            positions = positions - positions.min() + self.cache.used_slots - token_ids.shape[1]
        return run(self, token_ids, positions, *rest, **options)

    monkeypatch.setattr(CapturedStock, "_run", with_host_length)
    assert "other logits" in choose.capture_problem(model, CapturedStock)


@pytest.mark.parametrize("kind", [StockNetwork, SwappedNetwork])
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi", "qwen3_moe", "gpt_oss"])
def test_no_step_waits_for_the_device(kind, family, monkeypatch):
    """No number of the device's is read on the host: torch's own operations that do so are watched."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # only the swap asks; its bits do not matter here
    model, seen = tiny(family), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in func._schema.name for word in ("_local_scalar_dense", "aten::equal", "nonzero", "unique")):
                seen.append((func._schema.name, traceback.extract_stack(limit=12)))
            return func(*args, **(kwargs or {}))

    network = kind(model, 2, 40)
    rows = specdec.Rows([PROMPTS[0], PROMPTS[1]], 16, 0, model.device)
    with network.running(), torch.no_grad():
        network.prefill(rows)
        used_slots = rows.max_length + 3
        with Watch():
            network.forward(torch.ones(2, 3, dtype=torch.long), rows.lengths, used_slots)
    assert not seen, seen


def test_hooks_are_called_at_every_step(capturing):
    model, calls = tiny("gpt_neox"), []
    model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(1))
    assert service_of(model).network_type is StockNetwork
    specdec.generate(model, PROMPTS[0][None], max_new_tokens=6, eos_token_id=None)
    assert len(calls) >= 6


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_of_swapped_modules_on_a_gpu(family):
    """Bits of transformers' own decoding of the swapped model, from modules that nobody wrapped."""
    torch.manual_seed(0)
    model = tiny(family).to("cuda", torch.bfloat16)
    service = service_of(model)
    if not service.is_exact:
        pytest.skip(service.reason)
    if service.network_type is not build_network(tiny_llama().cuda().bfloat16(), 1, 8).__class__:
        assert service.network_type is CapturedSwapped, choose.capture_problem(model, CapturedSwapped)
    prompts = [prompt.cuda() for prompt in PROMPTS]
    with batch_invariant(model):
        expected = [plain_greedy(model, prompt, max_new_tokens=24, pad_token_id=0) for prompt in prompts]
    ids, mask = (x.cuda() for x in left_pad(PROMPTS))
    for drafter, k in ((None, {}), ("prompt_lookup", {"num_speculative_tokens": 5})):
        out = specdec.generate(model, ids, mask, drafter=drafter, max_new_tokens=24, pad_token_id=0, **k)
        assert continuations(out, ids.shape[1], expected, 0) == expected
