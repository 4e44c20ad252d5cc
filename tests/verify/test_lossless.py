"""Sampled verification is lossless: by exact enumeration, by simulation, and with planted bugs that both find.

The simulation decodes 150 000 rows of 4 tokens over a vocabulary of 3 and compares the 81 sequences with the enumerated
joint by chi-square at alpha = 1e-3; a deviation of total variation 0.013 is found with probability 0.99 or more
(`test_power`). Planted bugs must fail it by far, with a third of the rows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from verification import ALPHA, LENGTH, NUM_ROWS, VOCAB, K, behind, joint, of_probs, p_value, run, simulate, tables

from specdec.kernels.commit import sampled_commit as module
from specdec.kernels.commit.greedy_commit import NO_TOKEN
from specdec.kernels.commit.sampled_commit import block_chances, final_mass, sampled_commit, token_chances
from specdec.verify.random_streams import Purpose

# ---- by exact enumeration: no randomness, the accept decisions are integrated out


def acceptance(chances, verification):
    """P(number accepted = i | draft) for i = 0 .. k: [rows, k + 1]."""
    rows = len(chances)
    ones, zeros = chances.new_ones(rows, 1), chances.new_zeros(rows, 1)
    if verification == "token":
        return torch.cat([ones, chances.cumprod(1)], 1) * torch.cat([1 - chances, ones], 1)
    none_behind = torch.cat([(1 - chances).flip(1).cumprod(1).flip(1), ones], 1)  # no i' >= i + 1 is accepted
    return torch.cat([ones, chances], 1) * none_behind if rows else zeros


def one_step(p, q, num_drafted, verification, width=K):
    """(P(sequence of num_drafted + 1 tokens), E[accepted]) of one step, continued by p where it committed fewer."""
    vocab = p.shape[0]
    drafts = torch.tensor(list(itertools.product(range(vocab), repeat=num_drafted))).long()
    drafts = drafts.reshape(vocab**num_drafted, num_drafted)
    start = torch.zeros(len(drafts), 2, dtype=torch.long)
    weights = behind(q, start, drafts)[:, :-1].gather(2, drafts[..., None]).prod(1).squeeze(1)
    padded = torch.nn.functional.pad(drafts, (0, width - num_drafted), value=NO_TOKEN)
    target, draft = behind(p, start, padded), behind(q, start, padded)[:, :-1].clone()
    target[:, num_drafted + 1 :], draft[:, num_drafted:] = torch.nan, torch.nan  # may not be read
    chances, scales = (token_chances if verification == "token" else block_chances)(of_probs(target), padded, draft)
    ends = acceptance(chances[:, :num_drafted], verification)
    out = dict.fromkeys(joint(p, num_drafted + 1), 0.0)
    for i in range(num_drafted + 1):
        mass = final_mass(of_probs(target), padded, draft, torch.full((len(drafts),), i), scales)
        final = mass / mass.sum(1, keepdim=True)
        for row, token in itertools.product(range(len(drafts)), range(vocab)):
            prefix = (*drafts[row, :i].tolist(), token)
            share = float(weights[row] * ends[row, i] * final[row, token])
            for tail in itertools.product(range(vocab), repeat=num_drafted - i):
                history, probability = (0, 0, *prefix), share
                for t in tail:
                    probability *= float(p[history[-2], history[-1], t])
                    history += (t,)
                out[history[2:]] += probability
    return out, float((weights[:, None] * ends).mul(torch.arange(num_drafted + 1)).sum())


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("num_drafted", range(K + 1))
def test_one_step_is_exactly_the_target(verification, num_drafted):
    """Rounding aside, on random pairs, with rows that have fewer drafts than the batch is wide."""
    for seed in range(3):
        p, q = tables(seed, vocab=2)
        emitted, _ = one_step(p, q, num_drafted, verification)
        assert emitted == pytest.approx(joint(p, num_drafted + 1), abs=1e-13)


def test_enumeration_finds_a_wrong_residual(monkeypatch):
    p, q = tables(0, vocab=2)
    monkeypatch.setitem(globals(), "final_mass", target_instead_of_residual)
    emitted, _ = one_step(p, q, 2, "block")
    assert emitted != pytest.approx(joint(p, 3), abs=1e-3)


def expected_accepted(p, q, k, verification):
    return one_step(p, q, k, verification)[1]


def test_block_verification_never_accepts_fewer_in_expectation():
    gains = []
    for seed in range(40):
        p, q = tables(seed, vocab=2 + seed % 2, sharpness=0.5 + seed % 4)
        gains.append(expected_accepted(p, q, 2, "block") - expected_accepted(p, q, 2, "token"))
    assert min(gains) > -1e-12 and max(gains) > 0.05


def test_textbook_pair():
    """Sun et al. 2024, section 2: 11/9 tokens accepted by block verification, 10/9 by token."""
    p = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64).expand(2, 2, 2)
    q = p.flip(-1)
    assert expected_accepted(p, q, 2, "token") == pytest.approx(10 / 9, abs=1e-12)
    assert expected_accepted(p, q, 2, "block") == pytest.approx(11 / 9, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    rows = 100_000
    drafts = (torch.rand(rows, 2, generator=generator) > 2 / 3).long()
    numbers = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    start = torch.zeros(rows, 2, dtype=torch.long)
    for verification, mean in (("token", 10 / 9), ("block", 11 / 9)):
        probs = behind(p, start, drafts), drafts, behind(q, start, drafts)[:, :-1]
        accepted = run(*probs, numbers, verification=verification)[0].num_accepted.double()
        assert abs(accepted.mean() - mean) < 3.3 * accepted.std() / rows**0.5  # alpha = 1e-3


# ---- by simulation: the whole loop, decoding rows to their end


def test_power():
    """4 n d^2 bounds the noncentrality of a deviation of total variation d from below (Cauchy-Schwarz)."""
    freedom = VOCAB**LENGTH - 1
    noncentrality = 4 * NUM_ROWS * 0.013**2
    assert stats.ncx2.sf(stats.chi2.isf(ALPHA, freedom), freedom, noncentrality) > 0.99


def keep_through_doubt(probs):
    """Stop behind the first token below 0.4: it was sampled, so it is verified. Lossless."""
    doubt = (probs < 0.4).long()
    return doubt.cumsum(1) - doubt == 0


def drop_doubt(probs):
    """Stop before it: what is handed over is then no sample of q."""
    return (probs < 0.4).long().cumsum(1) == 0


SERVED = {
    "sampled": {},
    "sampled, ragged": {"ragged": True},
    "sampled, stopped behind a doubtful token": {"keep": keep_through_doubt},
    "sampled, ends of sequence": {"eos": (2,), "ragged": True},
    "deterministic": {"sampled": False},
    "deterministic, ragged": {"sampled": False, "ragged": True},
}


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("name", SERVED)
def test_whole_sequences_follow_the_target(name, verification):
    p, q = tables(1)
    options = SERVED[name]
    emitted = simulate(p, q, verification, seed=5, **options)
    assert p_value(emitted, p, options.get("eos", ())) > ALPHA


def place_uniforms(streams, row_ids, lengths):
    """The mistake that RowStreams warns of: the number of a draft belongs to its place, whatever the step."""
    numbers = [streams.uniforms(row_ids, lengths + j, 1, Purpose.VERIFY) for j in range(K)]
    return torch.cat([streams.uniforms(row_ids, lengths, 1, Purpose.DRAFT), *numbers], 1)


def target_instead_of_residual(target, draft_ids, draft_probs, num_accepted, scales):
    return target.at(num_accepted)


def without_bonus(chances_of):
    """The last draft is always replaced by a recovered token: no place for a bonus."""

    def chances(target, draft_ids, draft_probs, *lenience):
        out, scales = chances_of(target, draft_ids, draft_probs, *lenience)
        is_last = torch.arange(draft_ids.shape[1]) == (draft_ids != NO_TOKEN).sum(1, keepdim=True) - 1
        return out.masked_fill(is_last, 0), scales

    return chances


def unnormalised(target, draft_ids, draft_probs, *others):
    return sampled_commit(target, draft_ids, 1.2 * draft_probs, *others)


def unscaled(*arguments):
    chances, scales = block_chances(*arguments)
    return chances, torch.ones_like(scales)


def broken_at_the_first_failure(accepted):
    return accepted.long().cumprod(1).sum(1)


# name: (verifications, drafts, what is replaced in the module, what is passed to simulate)
BUGS = {
    "wrong residual": ("token block", "sampled deterministic", {"final_mass": target_instead_of_residual}, {}),
    "missing bonus, token": ("token", "sampled deterministic", {"token_chances": without_bonus(token_chances)}, {}),
    "missing bonus, block": ("block", "sampled", {"block_chances": without_bonus(block_chances)}, {}),
    "unnormalised q": ("token block", "sampled", {}, {"verify": unnormalised}),
    "dropped doubtful token": ("token block", "sampled", {}, {"keep": drop_doubt}),
    "unscaled residual": ("block", "sampled", {"block_chances": unscaled}, {}),
    "broken at the first failure": ("block", "sampled", {"_longest": broken_at_the_first_failure}, {}),
    "numbers used again": ("block", "sampled", {}, {"uniforms": place_uniforms}),
}
PLANTED = [
    (name, verification, drafts)
    for name, (verifications, kinds, _, _) in BUGS.items()
    for verification in verifications.split()
    for drafts in kinds.split()
]


@pytest.mark.parametrize(("name", "verification", "drafts"), PLANTED)
def test_planted_bugs_are_found(name, verification, drafts, monkeypatch):
    _, _, replaced, options = BUGS[name]
    for attribute, bug in replaced.items():
        monkeypatch.setattr(module, attribute, bug)
    p, q = tables(1)
    emitted = simulate(p, q, verification, sampled=drafts == "sampled", seed=5, rows=NUM_ROWS // 3, **options)
    assert p_value(emitted, p) < 1e-6


@pytest.mark.parametrize("verification", ["token", "block"])
def test_rows_permuted_with_their_seeds_permute_the_output(verification):
    p, q = tables(2)
    generator = torch.Generator().manual_seed(3)
    rows, order = 64, torch.randperm(64, generator=generator)
    start = torch.randint(VOCAB, (rows, 2), generator=generator)
    seeds, offsets = torch.randint(1000, (rows,), generator=generator), torch.arange(rows)

    def decode(index):
        return simulate(
            p, q, verification, ragged=True, rows=len(index), seed=seeds[index].tolist(), start=start[index],
            offsets=offsets[index], eos=(1,),
        )  # fmt: skip

    everything = decode(torch.arange(rows))
    assert torch.equal(decode(order), everything[order])
    for row in range(5):
        assert torch.equal(decode(torch.tensor([row])), everything[row : row + 1])
