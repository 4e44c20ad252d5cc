"""What serves a model where the batch-invariant kernels serve by themselves, as on a GPU; here by their references."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from families import tiny
from tiny import continuations, left_pad, plain_greedy, tiny_llama

import specdec
from specdec import Request, batch_invariant
from specdec.batch.layout import Repad
from specdec.check.equivalence import BUG, check_equivalence
from specdec.engine.engine import Engine
from specdec.network import choose, probe
from specdec.network.choose import build_network, service_of
from specdec.network.fused import FusedNetwork
from specdec.network.invariant import swap
from specdec.network.invariant.network import InvariantDraftNetwork, InvariantForward, InvariantNetwork
from specdec.network.invariant.swap import is_batch_invariant
from specdec.network.kept_forwards import kept_bytes, kept_of, release_others
from specdec.network.stock import StockNetwork, SwappedNetwork

PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 7, 5, 9, 7, 5, 9], [11, 4, 8], [6, 13, 21, 34, 6, 13, 3, 8, 6, 13, 40])]


@pytest.fixture(autouse=True)
def exact_here(monkeypatch):
    """This device takes the exact network by itself; one thread, in which the kernels' references are exact."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(choose, "EXACT_DEVICES", ("cpu",))
    yield
    torch.set_num_threads(threads)


def other_family(dtype=torch.bfloat16):
    """One without a short forward."""
    torch.manual_seed(1)
    return tiny("gpt_neox", vocab_size=64, intermediate_size=64).to(dtype)


def is_untouched(model):
    return not is_batch_invariant(model) and all("forward" not in module.__dict__ for module in model.modules())


def expected_of(model, **options):
    with batch_invariant(model):
        return [plain_greedy(model, prompt, pad_token_id=0, **options) for prompt in PROMPTS]


def test_a_known_class_is_never_touched():
    model = tiny_llama().bfloat16()
    assert service_of(model)[:2] == (InvariantNetwork, True)
    seen, (ids, mask) = [], left_pad(PROMPTS)
    out = specdec.generate(
        model, ids, mask, drafter=tiny_llama(1).bfloat16(), num_speculative_tokens=3, max_new_tokens=12,
        on_commit=lambda report: seen.append(is_untouched(model)), pad_token_id=0,
    )  # fmt: skip
    expected = expected_of(model, max_new_tokens=12)
    assert seen and all(seen) and is_untouched(model)
    assert continuations(out, ids.shape[1], expected, 0) == expected


def test_another_family_is_swapped_while_it_runs_and_no_longer():
    model = other_family()
    assert service_of(model)[:2] == (SwappedNetwork, True)
    seen, (ids, mask) = [], left_pad(PROMPTS)
    expected = expected_of(model, max_new_tokens=12)
    out = specdec.generate(
        model, ids, mask, drafter="prompt_lookup", max_new_tokens=12, pad_token_id=0,
        on_commit=lambda report: seen.append(is_batch_invariant(model)),
    )  # fmt: skip
    assert seen and all(seen) and is_untouched(model)
    assert continuations(out, ids.shape[1], expected, 0) == expected

    def fail(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        specdec.generate(model, ids, mask, max_new_tokens=4, pad_token_id=0, on_commit=fail)
    assert is_untouched(model)


@pytest.mark.parametrize(
    "family, num_layers, network_type", [("qwen3_moe", 16, InvariantNetwork), ("gpt_oss", 5, SwappedNetwork)]
)
def test_a_mixture_of_many_near_ties_is_exact(family, num_layers, network_type):
    """In bfloat16 rounding chooses other experts than the stock modules do: compared with these it would be refused."""
    sizes = dict(vocab_size=64, intermediate_size=64, moe_intermediate_size=32, layer_types=None)
    model = tiny(family, num_hidden_layers=num_layers, num_experts=64, num_experts_per_tok=8, **sizes).bfloat16()
    service = service_of(model)
    assert service[:2] == (network_type, True), service.reason
    ids, mask = left_pad(PROMPTS)
    expected = expected_of(model, max_new_tokens=8)
    out = specdec.generate(model, ids, mask, drafter="prompt_lookup", max_new_tokens=8, pad_token_id=0)
    assert continuations(out, ids.shape[1], expected, 0) == expected
    assert is_untouched(model)


@pytest.mark.parametrize("make", [lambda: tiny_llama().bfloat16(), other_family])
def test_every_face_takes_it(make):
    """What they share, and what they say of it."""
    model = make()
    expected = expected_of(model, max_new_tokens=8)
    done = specdec.generate_many(model, PROMPTS, max_new_tokens=8, in_order=True, pad_token_id=0)
    assert [one.token_ids for one in done] == expected
    loop = specdec.speculative("prompt_lookup")
    ids = PROMPTS[0][None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=loop, max_new_tokens=8)
    assert out[0, ids.shape[1] :].tolist() == expected[0]
    with Engine(model) as engine:
        engine.add_request(Request(PROMPTS[1], max_new_tokens=8))
        tokens = []
        while not engine.is_finished:
            tokens += [token for event in engine.step() for token in event.token_ids]
    assert tokens == expected[1] and is_untouched(model)


@pytest.mark.parametrize("make", [lambda: tiny_llama().bfloat16(), other_family])
def test_exact_false_keeps_modules_and_kernels(make, monkeypatch):
    model = make()
    service = service_of(model, exact=False)
    assert service.network_type is StockNetwork and not service.is_exact and "exact=False" in service.reason
    built, kinds = build_network, []

    def spy(*args, **options):
        kinds.append(options["exact"])
        return built(*args, **options)

    for home in ("specdec.engine.target", "specdec.drafters.draft_model"):
        monkeypatch.setattr(f"{home}.build_network", spy)
    draft = tiny_llama(1).bfloat16()
    ids = PROMPTS[0][None]
    specdec.generate(model, ids, drafter=draft, max_new_tokens=4, exact=False)
    assert kinds == [False, False]
    specdec.generate(model, ids, drafter=draft, max_new_tokens=4)
    assert kinds == [False, False, True, True]


def test_a_draft_models_bits_do_not_matter():
    assert service_of(tiny_llama(), must_be_exact=False).network_type is InvariantDraftNetwork
    service = service_of(other_family(), must_be_exact=False)
    assert service.network_type is StockNetwork and not service.is_exact


def test_layouts_of_one_length_swap_the_modules():
    assert service_of(tiny_llama(), Repad())[:2] == (SwappedNetwork, True)


def test_the_callers_own_swap_stays():
    model = tiny_llama()
    with batch_invariant(model):
        for exact in (True, False):
            assert service_of(model, exact=exact)[:2] == (InvariantNetwork, True)
    assert service_of(model)[:2] == (InvariantNetwork, True)


def add_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output)
    return r"model\.layers\.1\.mlp \(LlamaMLP\) has hooks"


def replace_forward(model):
    module = model.model.layers[0].self_attn
    own = module.forward
    module.forward = lambda *args, **options: own(*args, **options)
    return r"layers\.0\.self_attn \(LlamaAttention\) has a replaced forward"


def parametrise(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return "is parametrised"


def use_two_dtypes(model):
    model.lm_head.double()
    return "weights in torch.float32, torch.float64"


@pytest.mark.parametrize("edit", [add_hook, replace_forward, parametrise, use_two_dtypes])
def test_what_is_attached_keeps_its_modules_and_is_said(edit, caplog):
    model = tiny_llama()
    text = edit(model)
    if edit is not use_two_dtypes:  # which transformers' own head cannot multiply
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                specdec.generate(model, PROMPTS[0][None], max_new_tokens=3)
        assert len(caplog.records) == 1, "said once"
        caplog.records[0].getMessage().index("not exact")
        assert issubclass(service_of(model).network_type, StockNetwork | FusedNetwork)
        assert not service_of(model).is_exact
    assert re.search(text, choose._settings_problem(model) or choose.attachment(model))


def test_a_hook_is_called(caplog):
    model, calls = tiny_llama(), []
    handle = model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    specdec.generate(model, PROMPTS[0][None], max_new_tokens=3)
    assert calls
    handle.remove()
    assert service_of(model).is_exact, "and once it is gone, the exact network serves again"


def test_settings_of_torch_decide(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    service = service_of(model)
    assert not service.is_exact and "float32_matmul_precision='high'" in service.reason
    monkeypatch.undo()


def test_bits_that_depend_on_the_width_are_noticed(monkeypatch):
    """A planted fault: the same logits up to rounding, with other bits where several tokens are computed at once."""
    logits = InvariantForward.logits

    def rounded_by_width(self, hidden):
        out = logits(self, hidden)
        return out * (1 + 2**-20) if hidden.shape[1] > 1 else out

    monkeypatch.setattr(InvariantForward, "logits", rounded_by_width)
    service = service_of(tiny_llama())
    assert service.network_type is SwappedNetwork


def test_a_gpu_that_nobody_has_compared_is_compared_at_more_widths(monkeypatch):
    """A planted fault that narrow steps do not show: tiles of longer prompts sum in another order."""
    model, logits, seen = tiny_llama(), InvariantForward.logits, []

    def other_tiles(self, hidden):
        seen.append(hidden.shape[1])
        return logits(self, hidden) * (1 + 2**-20) if hidden.shape[1] > 30 else logits(self, hidden)

    monkeypatch.setattr(InvariantForward, "logits", other_tiles)
    assert service_of(model).network_type is InvariantNetwork and max(seen) < 30
    monkeypatch.setattr(probe, "unproven_widths", lambda model: (40,))
    other = tiny_llama()
    assert service_of(other).network_type is SwappedNetwork and 40 in seen

    monkeypatch.setattr(swap, "unproven_widths", lambda model: (40,))
    in_order_linear = swap.in_order_linear

    def other_products(x, *rest):
        out = in_order_linear(x, *rest)
        return out * (1 + 2**-20) if x.shape[1] > 30 else out

    monkeypatch.setattr(swap, "in_order_linear", other_products)
    service = service_of(tiny_llama())
    assert not service.is_exact and "the beginning of one of 40 tokens" in service.reason


def test_a_gpu_that_cannot_run_the_kernels_is_served_all_the_same(monkeypatch):
    """With less shared memory than a kernel needs, Triton raises an error of its own at the launch."""
    errors = pytest.importorskip("triton.runtime.errors")

    def too_large(*args, **options):
        raise errors.OutOfResources(163840, 101376, "shared memory")

    monkeypatch.setattr(InvariantForward, "run", too_large)
    service = service_of(tiny_llama())
    assert service.network_type is SwappedNetwork and service.is_exact
    monkeypatch.setattr(swap, "in_order_linear", too_large)
    service = service_of(tiny_llama())
    assert service.network_type is StockNetwork and not service.is_exact and "shared memory" in service.reason


def test_an_oracle_is_swapped_by_itself_and_a_difference_is_no_tie(monkeypatch):
    model = tiny_llama().bfloat16()
    report = check_equivalence(model, PROMPTS, "prompt_lookup", max_new_tokens=8)
    assert report.equivalent and report.is_exact and is_untouched(model)

    logits = InvariantForward.logits  # another argmax from some step on, as near to it as rounding
    monkeypatch.setattr(
        InvariantForward,
        "logits",
        lambda self, hidden: logits(self, hidden).roll(1, -1) if len(hidden) > 2 else logits(self, hidden),
    )
    report = check_equivalence(model, PROMPTS, "prompt_lookup", max_new_tokens=8)
    assert not report.equivalent and {one.kind for one in report.divergences} == {BUG}


def test_release_gives_back_what_is_kept():
    specdec.release()
    first, second = tiny_llama(), tiny_llama(1)
    for model in (first, second):
        specdec.generate(model, PROMPTS[0][None], max_new_tokens=2)
    size = kept_of(first, InvariantNetwork).nbytes
    assert size > 0 and kept_bytes() == 2 * size
    assert specdec.release(first) == size and kept_bytes() == size and kept_of(first, InvariantNetwork) is None
    assert specdec.release(first) == 0
    specdec.generate(first, PROMPTS[0][None], max_new_tokens=2)
    again = kept_of(first, InvariantNetwork).nbytes
    assert again > 0 and specdec.release() == size + again and kept_bytes() == 0


def test_what_is_running_is_not_released():
    model, sizes = tiny_llama(), []
    expected = expected_of(model, max_new_tokens=6)[0]
    ids = PROMPTS[0][None]
    out = specdec.generate(model, ids, max_new_tokens=6, on_commit=lambda report: sizes.append(specdec.release()))
    assert out[0, ids.shape[1] :].tolist() == expected
    assert kept_of(model, InvariantNetwork) is not None, "kept at its end"


def test_what_other_models_keep_makes_room():
    specdec.release()
    mine, other = tiny_llama(), tiny_llama(1)
    for model in (mine, other):
        specdec.generate(model, PROMPTS[0][None], max_new_tokens=2)
    assert release_others(mine, None) and kept_of(other, InvariantNetwork) is None
    assert kept_of(mine, InvariantNetwork) is not None
    assert not release_others(mine)
