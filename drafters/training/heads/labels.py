"""The drafter's proposal after every prefix of a text, and whether the target would accept it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.training.data import TrainBatch
from specdec.kernels.commit.token_statistics import token_statistics


@dataclass(frozen=True)
class Proposals:
    """One proposal after each prefix; column j follows token j of the text. Shapes are [rows, columns - 1] unless
    given.

    hidden: [.., hidden] float32, the drafter's last hidden state after its final norm. logits: [.., vocab], the
    drafter's. token_ids: int64, the proposed tokens. statistics: [.., 3] float32, from `token_statistics`: the
    drafter's log q of them and of the best other tokens, and its entropy.
    acceptance: float32, the probability that the target accepts them: min(1, p / q) for samples; for the drafter's
    argmax under greedy decoding 1 if the target's argmax is the same, else 0.
    counted: bool, whether the target wrote the text's next token.
    """

    hidden: Tensor
    logits: Tensor
    token_ids: Tensor
    statistics: Tensor
    acceptance: Tensor
    counted: Tensor


@torch.no_grad()
def propose_everywhere(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    batch: TrainBatch,
    is_sampled: Tensor,
    generator: torch.Generator,
    mix_share: float = 0.0,
) -> Proposals:
    """Two forwards over a text that the target wrote.

    is_sampled: [rows] bool, whether the row's proposals are samples of q or its argmax.
    mix_share: probability with which a token of the text is replaced by the drafter's proposal for it before the
    drafter reads the text (1 - r of SpecDec++, section 3.3); the target always reads the original text. With 0, the
    drafter sees the same text as in decoding while all its tokens are accepted.
    """
    text = batch.token_ids
    target_logits = target(input_ids=text[:, :-1], use_cache=False).logits.float()
    hidden, logits = read(draft, text[:, :-1], target_logits.shape[-1])
    log_q = logits.log_softmax(-1)
    proposed = torch.where(is_sampled[:, None], sample(log_q, generator), log_q.argmax(-1))
    log_p = target_logits.log_softmax(-1)
    ratio = (gather(log_p, proposed) - gather(log_q, proposed)).clamp(max=0).exp()
    agrees = (proposed == target_logits.argmax(-1)).float()
    acceptance = torch.where(is_sampled[:, None], ratio, agrees)
    if mix_share > 0:
        replace = torch.rand(text.shape, generator=generator, device=text.device) < mix_share
        before = torch.cat([text[:, :1], proposed], 1)
        hidden, logits = read(draft, torch.where(replace & batch.counted, before, text)[:, :-1], log_p.shape[-1])
    statistics = token_statistics(logits.flatten(0, 1), proposed.flatten()).view(*proposed.shape, 3)
    return Proposals(hidden, logits, proposed, statistics, acceptance, batch.predicts)


def read(draft: PreTrainedModel, token_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits, float32; only the logits of tokens that the target has too."""
    known = token_ids.masked_fill(token_ids >= draft.get_input_embeddings().weight.shape[0], 0)
    output = draft(input_ids=known, use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1].float(), output.logits[..., :vocab_size].float()


def sample(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """[...] int64 from [..., vocab]."""
    flat = log_probs.flatten(0, -2).exp()
    return torch.multinomial(flat, 1, generator=generator).view(log_probs.shape[:-1])


def gather(values: Tensor, token_ids: Tensor) -> Tensor:
    return values.gather(-1, token_ids[..., None])[..., 0]


def draft_places(accepted: Tensor, counted: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """The place of each position in a draft, if its text is decoded with `max_tokens` drafted tokens per step.

    accepted, counted: [rows, columns] bool, as in `Proposals`. Returns the token's place in its draft ([rows, columns]
    int64, from 0), and whether it has one: the prefill's token and the bonus token after a full draft are not drafted.
    """
    place = torch.zeros(len(accepted), dtype=torch.long, device=accepted.device)
    skip = torch.ones_like(place, dtype=torch.bool)
    places, drafted = [], []
    for column in range(accepted.shape[1]):
        here = counted[:, column] & ~skip
        places.append(place)
        drafted.append(here)
        goes_on = here & accepted[:, column]
        is_full = goes_on & (place + 1 == max_tokens)
        skip = ~counted[:, column] | is_full
        place = torch.where(goes_on & ~is_full, place + 1, 0)
    return torch.stack(places, 1), torch.stack(drafted, 1)
