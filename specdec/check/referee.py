"""Judges one divergence with the target's own modules: was it a numerical tie, or a bug?

Nothing of specdec's decoding runs here. The margin between the two tokens is recomputed teacher-forced in float64, and
compared with what this model, in its own dtype and at that place, loses by rounding: between forwards over one token
and over K + 1, and between both and float64.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from specdec.network.free_memory import free_bytes
from specdec.network.model_cache import cache_argument, returned_cache

# |margin| <= TIE_MULTIPLE * error is a tie. If rounding alone exchanged two tokens, one run's margin is not below 0 and
# the other's not above, so the float64 margin is at most what one run's margin is off by: the errors of two logits.
# (18 ties each of K = 1 and K = 5, a 3.5M-parameter model in bfloat16: at most 0.9 times the error.)
TIE_MULTIPLE = 2


@dataclass(frozen=True)
class Judgement:
    """margin: the target's logit of the expected token minus that of the actual one.

    noise: the largest difference of these two tokens' logits between one-token and (K + 1)-token forwards.
    noise_all_tokens: the same over the whole vocabulary.
    rounding: the largest distance of either forward's logits from those that margins are computed with. It is there
        because transformers' kernels may round alike for both widths, while specdec's fused forward rounds elsewhere.
    """

    margin: float
    noise: float
    noise_all_tokens: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        """Without any measured error only an exact tie is one."""
        return abs(self.margin) <= TIE_MULTIPLE * max(self.noise_all_tokens, self.rounding)


class Referee:
    """Made at the first divergence, because it copies the model.

    margin_dtype: what margins are computed in. margin_note: why that is not float64; empty if it is.
    """

    def __init__(self, model: PreTrainedModel, num_speculative_tokens: int, batch_size: int):
        self.model, self.width, self.batch_size = model, num_speculative_tokens + 1, batch_size
        self.exact, self.margin_note = precise_copy(model)
        self.margin_dtype = name_of(self.exact.dtype)

    @torch.no_grad()
    def judge(self, prompt: Tensor, new_tokens: Sequence[int], expected: int, actual: int) -> Judgement:
        """prompt: [length] int64. new_tokens: what both runs wrote after it before they differed."""
        token_ids = torch.cat([prompt.cpu(), torch.tensor(new_tokens, dtype=torch.long)]).to(self.model.device)
        one, several = self.decode_both_ways(token_ids, len(prompt))
        exact = last_logits(self.exact, token_ids, one.shape[1]).double()
        margin = (exact[-1, expected] - exact[-1, actual]).item()
        one, several = one.double(), several.double()
        noise = (one - several).abs()
        rounding = max((logits - exact).abs().max().item() for logits in (one, several))
        return Judgement(margin, noise[..., [expected, actual]].max().item(), noise.max().item(), rounding)

    def decode_both_ways(self, token_ids: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """The model's logits at the last K + 1 tokens (or all, if fewer), [1, width, vocab] and [rows, width, vocab].

        After the prompt, the first way feeds one token at a time, as plain decoding does; the second K + 1 tokens at
        a time in a batch of copies, as verification of drafts that are all accepted does.
        """
        length = len(token_ids)
        width = min(self.width, length)
        first = min(prompt_length, length - width)
        one = self._decode(token_ids, list(range(first, length + 1)), 1, width)
        num_wide = max(-(-(length - prompt_length) // width), 1)
        cuts = [max(length - width * i, 0) for i in range(num_wide, -1, -1)]
        return one, self._decode(token_ids, cuts, self.batch_size, width)

    def _decode(self, token_ids: Tensor, cuts: list[int], num_rows: int, width: int) -> Tensor:
        """Cache what lies before the first cut, then feed what lies between cuts: [rows, width, vocab], the last."""
        logits: list[Tensor] = []
        cache = None
        if cuts[0] > 0:
            prompt = token_ids[None, : cuts[0]]
            cache = returned_cache(self.model(input_ids=prompt, use_cache=True, **only_last(self.model, 1)))
            cache.batch_repeat_interleave(num_rows)
        for begin, end in pairwise(cuts):
            inputs = token_ids[begin:end].expand(num_rows, -1)
            output = self.model(input_ids=inputs, use_cache=True, **cache_argument(self.model, cache))
            cache = returned_cache(output)
            logits = [*logits, output.logits][-width:]
        return torch.cat(logits, 1)[:, -width:]


class KeepFloat64(TorchFunctionMode):
    """Models compute norms, rotations and softmax in float32 by name; in here float32 means float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def float64_throughout(model: PreTrainedModel) -> AbstractContextManager:
    """Within it a float64 model computes nothing in float32; other models are left alone."""
    return KeepFloat64() if model.dtype == torch.float64 else nullcontext()


@torch.no_grad()
def last_logits(model: PreTrainedModel, token_ids: Tensor, count: int = 1) -> Tensor:
    """Logits at the last `count` of [length] token ids, from one forward without a cache, [count, vocab].

    A float64 model stays in float64 throughout.
    """
    with float64_throughout(model):
        output = model(input_ids=token_ids[None], use_cache=False, **only_last(model, count))
    return output.logits[0, -count:]


def only_last(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Spares the logits of a whole prompt where the model knows how."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def precise_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """A copy in float64, else in float32, else the model itself; and why it is not float64."""
    problems: list[str] = []
    for dtype in (torch.float64, torch.float32):
        if model.dtype == dtype:
            return model, "; ".join(problems)
        problem = lacking_memory(model, dtype)
        if not problem:
            try:
                exact = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
                last_logits(exact, torch.zeros(1, dtype=torch.long, device=model.device))
                return exact, "; ".join(problems)
            except (RuntimeError, TypeError) as error:  # a kernel without this dtype, or out of memory after all
                problem = str(error).partition("\n")[0][:200]
        problems.append(f"no {name_of(dtype)}: {problem}")
    return model, "; ".join(problems)


def lacking_memory(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Why a copy in `dtype` does not fit, as text; empty if it fits."""
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    available = free_bytes(model.device)
    if needed <= available:
        return ""
    return f"a copy needs {needed / 2**30:.1f} GiB of {available / 2**30:.1f} GiB available"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
