"""Sampled verification: lossless by exact enumeration and by simulation, planted bugs found, kernel against reference.

The simulation decodes 150 000 rows of 4 tokens over a vocabulary of 3 and compares the 81 sequences with the enumerated
joint by chi-square at alpha = 1e-3; a deviation of total variation 0.013 is found with probability 0.99 or more
(`test_power`). Planted bugs must fail it by far, with a third of the rows.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from scipy import stats

from specdec.kernels import sampled_commit as module
from specdec.kernels.dispatch import triton
from specdec.kernels.greedy_commit import NO_TOKEN
from specdec.kernels.sampled_commit import block_chances, final_mass, sample_tokens, sampled_commit, token_chances
from specdec.random_streams import Purpose, RowStreams

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NO_EOS = torch.empty(0, dtype=torch.long)
ALPHA = 1e-3
NUM_ROWS, LENGTH, K, VOCAB = 150_000, 4, 3, 3


def run(target_probs, draft_ids, draft_probs, uniforms, eos=(), lengths=None, limits=None, **options):
    rows = len(draft_ids)
    device = draft_ids.device
    tokens = torch.full((rows, 60), 77, device=device)
    lengths = torch.full((rows,), 3, device=device) if lengths is None else lengths.clone()
    limits = torch.full((rows,), 50, device=device) if limits is None else limits
    eos = torch.tensor(eos, dtype=torch.long, device=device)
    out = sampled_commit(target_probs, draft_ids, draft_probs, uniforms, eos, tokens, lengths, limits, **options)
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
    chances, scales = (token_chances if verification == "token" else block_chances)(target, padded, draft)
    ends = acceptance(chances[:, :num_drafted], verification)
    out = dict.fromkeys(joint(p, num_drafted + 1), 0.0)
    for i in range(num_drafted + 1):
        mass = final_mass(target, padded, draft, torch.full((len(drafts),), i), scales)
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
            target_probs, draft, draft_probs if sampled else None, numbers, torch.tensor(eos, dtype=torch.long),
            own, length, limits[alive], verification,
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


def place_uniforms(streams, row_ids, lengths):
    """The mistake that RowStreams warns of: the number of a draft belongs to its place, whatever the step."""
    numbers = [streams.uniforms(row_ids, lengths + j, 1, Purpose.VERIFY) for j in range(K)]
    return torch.cat([streams.uniforms(row_ids, lengths, 1, Purpose.DRAFT), *numbers], 1)


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


def target_instead_of_residual(target_probs, draft_ids, draft_probs, num_accepted, scales):
    return target_probs[torch.arange(len(num_accepted)), num_accepted].double()


def without_bonus(chances_of):
    """The last draft is always replaced by a recovered token: no place for a bonus."""

    def chances(target_probs, draft_ids, draft_probs):
        out, scales = chances_of(target_probs, draft_ids, draft_probs)
        is_last = torch.arange(draft_ids.shape[1]) == (draft_ids != NO_TOKEN).sum(1, keepdim=True) - 1
        return out.masked_fill(is_last, 0), scales

    return chances


def unnormalised(target_probs, draft_ids, draft_probs, *others):
    return sampled_commit(target_probs, draft_ids, 1.2 * draft_probs, *others)


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


# ---- one step, by hand


def one_row(target, draft_ids, draft, numbers, **options):
    to = lambda rows: torch.tensor([rows], dtype=torch.float32)  # noqa: E731
    ids = torch.tensor([draft_ids], dtype=torch.long)
    numbers = torch.tensor([numbers], dtype=torch.float64)
    return run(to(target), ids, None if draft is None else to(draft), numbers, **options)


def test_full_acceptance_commits_the_bonus():
    target = [[0.5, 0.5, 0], [0.2, 0.8, 0], [0.1, 0.1, 0.8]]
    out, tokens, lengths = one_row(target, [0, 1], [[1, 0, 0], [0, 1, 0]], [0.3, 0.4, 0.7])
    assert out.token_ids.tolist() == [[0, 1, 2]] and tokens[0, 3:6].tolist() == [0, 1, 2]
    assert (out.num_accepted.item(), out.num_committed.item(), lengths.item()) == (2, 3, 6)


def test_first_rejection_commits_a_recovered_token():
    """(p - q)+ at place 0 is (0, .2, .3): token 2 from 0.4 on."""
    target = [[0.2, 0.4, 0.4], [1, 0, 0], [1, 0, 0]]
    for number, token in ((0.39, 1), (0.41, 2)):
        out, _, lengths = one_row(target, [0, 0], [[0.7, 0.2, 0.1], [1, 0, 0]], [number, 0.9, 0.0])
        assert out.token_ids.tolist() == [[token, NO_TOKEN, NO_TOKEN]]
        assert (out.num_accepted.item(), lengths.item()) == (0, 4)


def test_a_rejected_deterministic_draft_is_not_its_own_recovery():
    for number in (0.0, 0.5, 1 - 2**-53):
        out, _, _ = one_row([[0.4, 0.6], [1, 0]], [1], None, [number, 0.7])
        assert out.token_ids.tolist() == [[0, NO_TOKEN]]


def test_block_verification_does_not_stop_at_the_first_failure():
    """r_1 = .5, R_1 = (.5 * .9 - .1)+ = .35, h_1 = .35 / .85; r_2 = min(1, .5 * .9 / .1) = 1."""
    target, draft = [[0.4, 0.6], [0.9, 0.1], [0, 1]], [[0.8, 0.2], [0.1, 0.9]]
    assert one_row(target, [0, 0], draft, [0.5, 0.99, 0.99], verification="block")[0].num_accepted.item() == 2
    assert one_row(target, [0, 0], draft, [0.5, 0.99, 0.99], verification="token")[0].num_accepted.item() == 0


def test_ends_of_sequence_and_limits_cut_the_commit():
    target = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    out, _, lengths = one_row(target, [0, 1], None, [0.5, 0.5, 0.5], eos=(1,))
    assert out.token_ids.tolist() == [[0, 1, NO_TOKEN]] and out.finished.item() and lengths.item() == 5
    out, _, lengths = one_row(target, [0, 1], None, [0.5, 0.5, 0.5], limits=torch.tensor([4]))
    assert out.token_ids.tolist() == [[0, NO_TOKEN, NO_TOKEN]] and out.finished.item() and lengths.item() == 4


def test_places_behind_the_commit_hold_valid_tokens():
    """They are fed to embeddings by drafters that read past a row's length."""
    _, tokens, _ = one_row([[0.0, 1.0]] * 4, [0, NO_TOKEN, NO_TOKEN], None, [0.5] * 4)
    assert tokens[0, 3:7].ge(0).all()


@pytest.mark.parametrize("verification", ["token", "block"])
def test_equal_distributions_accept_everything(verification):
    probs = (5 * torch.randn(200, 6, 50)).softmax(-1)
    drafts = torch.multinomial(probs[:, :-1].flatten(0, 1), 1).view(200, 5)
    numbers = torch.rand(200, 6, dtype=torch.float64)
    numbers[0] = 1 - 2**-53
    out, _, _ = run(probs, drafts, probs[:, :-1], numbers, verification=verification)
    assert out.num_accepted.eq(5).all() and out.num_committed.eq(6).all()


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_rejection_that_leaves_nothing_to_recover_samples_the_target(verification):
    """q exceeds p everywhere by rounding, so that (p - q)+ is zero."""
    target = [[0.25, 0.25, 0.5]] * 2
    draft = [[0.2500001, 0.2500001, 0.5000001]]
    for number, token in ((0.2, 0), (0.3, 1), (0.9, 2)):
        out, _, _ = one_row(target, [2], draft, [number, 1 - 2**-53], verification=verification)
        assert out.token_ids.tolist() == [[token, NO_TOKEN]]


def test_sampling_never_chooses_a_token_without_mass():
    mass = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0]])
    for number, token in ((0.0, 2), (0.29, 2), (0.31, 4), (1 - 2**-53, 4)):
        assert sample_tokens(mass, torch.tensor([number], dtype=torch.float64)).item() == token


def test_sampling_resolves_a_large_vocabulary():
    """In float32 the running sum would be off by several tokens of 5e-6 each."""
    vocab = 200_000
    wanted = torch.tensor([0, 1, 77_777, 150_001, vocab - 1])
    numbers = (wanted.double() + 0.5) / vocab
    assert torch.equal(sample_tokens(torch.full((5, vocab), 1 / vocab), numbers), wanted)


# ---- the kernel


def random_case(vocab, k, seed, device="cpu"):
    """Five rows: ragged drafts, NaN where nothing may be read; row 0 has q = p, row 1 a target without some tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = 5
    logits = 2 * torch.randn(2, rows, k + 1, vocab, generator=generator)
    logits[1] = 0.6 * logits[0] + 0.4 * logits[1]
    logits[1, 0] = logits[0, 0]
    logits[0, 1, :, vocab // 2 + 1 :] = -torch.inf
    target, draft = logits.softmax(-1).unbind(0)
    draft = draft[:, :k].clone()
    ids = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(rows, k) if k else NO_EOS.view(0, 0)
    ids = ids.reshape(rows, k)
    nothing = torch.arange(k) >= torch.randint(k + 1, (rows, 1), generator=generator)
    nothing[:2] = False
    draft[nothing] = torch.nan
    target[:, 1:][nothing] = torch.nan
    lengths = torch.randint(1, 20, (rows,), generator=generator)
    limits = lengths + torch.randint(1, k + 4, (rows,), generator=generator)
    numbers = torch.rand(rows, k + 1, generator=generator, dtype=torch.float64)
    case = target, ids.masked_fill(nothing, NO_TOKEN), draft, numbers, lengths, limits
    return [tensor.to(device) for tensor in case]


def nothing_to_recover():
    """One row whose only draft is rejected although q equals p but for rounding."""
    target = torch.tensor([[[0.25, 0.25, 0.5]] * 2])
    numbers = torch.tensor([[0.3, 1 - 2**-53]], dtype=torch.float64)
    return target, torch.tensor([[2]]), target[:, :1] + 1e-7, numbers, torch.tensor([3]), torch.tensor([9])


def compare(target, ids, draft, numbers, lengths, limits):
    device = target.device
    for verification, probs in (("token", draft), ("block", draft), ("block", None)):
        options = {"eos": (0, 5), "lengths": lengths, "limits": limits, "verification": verification}
        expected, tokens, ends = run(target, ids, probs, numbers, implementation="torch", **options)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and the largest integers
        try:
            out, kernel_tokens, kernel_ends = run(target, ids, probs, numbers, implementation="triton", **options)
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip((*out, kernel_ends), (*expected, ends), strict=True):
            assert torch.equal(a, b)
        committed = torch.arange(60, device=device) < ends[:, None]
        assert torch.equal(kernel_tokens[committed], tokens[committed])
        assert kernel_tokens[~committed].eq(77).all()


@pytest.mark.skipif(not INTERPRET or triton is None, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("vocab", [1, 7, 1000])
@pytest.mark.parametrize("k", range(9))
def test_kernel_in_the_interpreter_equals_the_reference(vocab, k, monkeypatch):
    monkeypatch.setattr(module, "VOCAB_BLOCK", 256)
    compare(*random_case(vocab, k, seed=10 * k + vocab))


@pytest.mark.skipif(not INTERPRET or triton is None, reason="needs TRITON_INTERPRET=1")
def test_kernel_in_the_interpreter_equals_the_reference_where_nothing_is_left_to_recover():
    compare(*nothing_to_recover())


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1, 7, 1000, 151_936])
@pytest.mark.parametrize("k", range(9))
def test_kernel_on_a_gpu_equals_the_reference(vocab, k):
    for seed in range(3):
        compare(*random_case(vocab, k, seed, "cuda"))


def test_interpreter_run(run_in_subprocess):
    """The interpreter must be chosen before triton is imported, hence another process."""
    run_in_subprocess("tests/test_sampled_commit.py", "-k", "interpreter_equals", TRITON_INTERPRET="1")


def test_wrong_arguments_are_named():
    target, ids, numbers = torch.full((1, 2, 2), 0.5), torch.zeros(1, 1).long(), torch.zeros(1, 2).double()
    with pytest.raises(ValueError, match=r"target_probs has shape \(1, 1, 2\); 1 rows of 1 drafts need \(1, 2, 2\)"):
        run(target[:, :1], ids, None, numbers)
    with pytest.raises(ValueError, match="draft_probs has shape"):
        run(target, ids, target, numbers)
    with pytest.raises(ValueError, match=r"uniforms has shape \(1, 1\)"):
        run(target, ids, None, numbers[:, :1])
    with pytest.raises(ValueError, match=r"torch.float32; pass float64"):
        run(target, ids, None, numbers.float())
    with pytest.raises(ValueError, match="verification='blocks'"):
        run(target, ids, None, numbers, verification="blocks")
    with pytest.raises(ValueError, match="choose 'auto'"):
        run(target, ids, None, numbers, implementation="cuda")
