"""What the tests of sampled verification share: toy distributions, their enumerated joint, one step, whole decoding."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy import stats

from specdec.kernels.commit.distribution import Distribution
from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.kernels.commit.sample import sample_tokens
from specdec.kernels.commit.sampled_commit import sampled_commit
from specdec.verify.random_streams import Purpose, RowStreams

NO_EOS = torch.empty(0, dtype=torch.long)
ALPHA = 1e-3
NUM_ROWS, LENGTH, K, VOCAB = 150_000, 4, 3, 3


def of_probs(probs):
    """The distribution whose probabilities these are, [rows, places, vocab]."""
    zeros = torch.zeros_like(probs[..., 0])
    mass = torch.ones_like(zeros, dtype=torch.float64).masked_fill(probs.isnan().any(-1), torch.nan)
    temperature = torch.ones(len(probs), dtype=torch.float64, device=probs.device)
    return Distribution(probs.log(), temperature, zeros - torch.inf, zeros, mass)


def run(target, draft_ids, draft_probs, uniforms, eos=(), lengths=None, limits=None, **options):
    rows = len(draft_ids)
    device = draft_ids.device
    tokens = torch.full((rows, 60), 77, device=device)
    lengths = torch.full((rows,), 3, device=device) if lengths is None else lengths.clone()
    limits = torch.full((rows,), 50, device=device) if limits is None else limits
    eos = torch.tensor(eos, dtype=torch.long, device=device)
    target = target if isinstance(target, Distribution) else of_probs(target)
    out = sampled_commit(target, draft_ids, draft_probs, uniforms, eos, tokens, lengths, limits, **options)
    return out, tokens, lengths


def tables(seed, vocab=VOCAB, sharpness=1.5):
    """p(. | last two tokens) and q likewise, [vocab, vocab, vocab] float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, vocab, vocab, vocab)
    return (sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1).unbind(0)


def behind(table, start, token_ids):
    """table's distributions behind `start` and behind each of the tokens: [rows, k + 1, vocab]."""
    history = torch.cat([start, token_ids.clamp(min=0)], 1)
    return table[history[:, :-1], history[:, 1:]]


def joint(p, length, eos=()):
    """{sequence: probability} behind (0, 0); a sequence ends behind its first token of `eos`."""
    out = {}
    for tokens in itertools.product(range(p.shape[0]), repeat=length):
        history, probability = (0, 0), 1.0
        for i, token in enumerate(tokens):
            probability *= float(p[history[0], history[1], token])
            history = (history[1], token)
            if token in eos:
                tokens = tokens[: i + 1]
                break
        out[tokens] = probability  # found again for every tail behind an end, with the same value
    return out


def simulate(
    p, q, verification, sampled=True, ragged=False, keep=None, seed=0, eos=(), rows=NUM_ROWS, start=None, offsets=None,
    uniforms=None, verify=sampled_commit,
):  # fmt: skip
    """LENGTH tokens behind `start` for every row: [rows, LENGTH], NO_TOKEN behind an end of sequence.

    keep: draft probabilities of the drafted tokens [rows, K] -> [rows, K] bool, which drafts are handed over.
    """
    tokens = torch.zeros(rows, 2 + LENGTH + K + 1, dtype=torch.long)
    if start is not None:
        tokens[:, :2] = start
    offsets = torch.arange(rows) if offsets is None else offsets
    lengths, limits = torch.full((rows,), 2), torch.full((rows,), 2 + LENGTH)
    streams, alive = RowStreams(seed, rows), torch.arange(rows)
    while len(alive):
        own, length = tokens[alive], lengths[alive]
        last = own.gather(1, length[:, None] + torch.tensor([-2, -1]))
        draft = propose(q, last, streams.uniforms(alive.numpy(), length.numpy(), K, Purpose.DRAFT), sampled)
        target_probs, draft_probs = behind(p, last, draft).float(), behind(q, last, draft)[:, :-1].float()
        kept = torch.ones_like(draft, dtype=torch.bool)
        if ragged:
            kept &= torch.arange(K) < ((offsets[alive] + length) % (K + 1))[:, None]
        if keep is not None:
            kept &= keep(draft_probs.gather(2, draft[..., None]).squeeze(2))
        draft = draft.masked_fill(~kept, NO_TOKEN)
        target_probs[:, 1:][~kept] = torch.nan
        draft_probs[~kept] = torch.nan
        numbers = (uniforms or step_uniforms)(streams, alive.numpy(), length.numpy())
        done = verify(
            of_probs(target_probs), draft, draft_probs if sampled else None, numbers,
            torch.tensor(eos, dtype=torch.long), own, length, limits[alive], verification,
        )  # fmt: skip
        tokens[alive], lengths[alive] = own, length
        alive = alive[~done.finished]
    behind_end = torch.arange(2 + LENGTH) >= lengths[:, None]
    return tokens[:, : 2 + LENGTH].masked_fill(behind_end, NO_TOKEN)[:, 2:]


def propose(q, last, numbers, sampled):
    """K tokens from q, or its favourites, behind the last two: [rows, K]."""
    history = last
    for j in range(K):
        probs = q[history[:, -2], history[:, -1]].float()
        token = sample_tokens(probs, numbers[:, j]) if sampled else probs.argmax(1)
        history = torch.cat([history, token[:, None]], 1)
    return history[:, 2:]


def step_uniforms(streams, row_ids, lengths):
    return streams.uniforms(row_ids, lengths, K + 1, Purpose.VERIFY)


def p_value(emitted, p, eos=()):
    """Chi-square of the emitted sequences against the enumerated joint; cells that expect fewer than 10 are pooled."""
    expected = joint(p, LENGTH, eos)
    cells = {sequence: i for i, sequence in enumerate(expected)}
    found, counts = np.unique(emitted.numpy(), axis=0, return_counts=True)
    observed = np.zeros(len(cells))
    for sequence, count in zip(found.tolist(), counts, strict=True):
        observed[cells[tuple(t for t in sequence if t != NO_TOKEN)]] = count
    expectation = np.array(list(expected.values())) * len(emitted)
    small = expectation < 10
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expectation = np.append(expectation[~small], expectation[small].sum())
    return stats.chisquare(observed, expectation * (observed.sum() / expectation.sum())).pvalue
