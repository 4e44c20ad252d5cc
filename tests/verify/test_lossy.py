"""Lossy acceptance does what its formulas say, is not lossless, and is named wherever it was used."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from tiny import left_pad, plain_greedy, tiny_llama
from verification import of_probs, run

import specdec
from specdec.draft import NO_TOKEN
from specdec.errors import ConfigError
from specdec.kernels.commit.sampled_commit import final_mass, token_chances
from specdec.verify.lossy import Lenient, TopBeta, Typical, verification_named
from specdec.verify.verification import lets_pass, typical_prefix

TARGET = tiny_llama(0, eos_token_id=None)
DRAFT = tiny_llama(1, num_hidden_layers=1, eos_token_id=None)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 5, 6, 7], [9], [11, 12, 13, 11])]
IDS, MASK = left_pad(PROMPTS)
ALPHA = 1e-3  # seeds are fixed, so a pass stays a pass


def generate(**options):
    return specdec.generate(
        TARGET, IDS, MASK, drafter=DRAFT, max_new_tokens=20, pad_token_id=0, return_dict_in_generate=True, **options
    )


def random_pair(seed, vocab=5):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, vocab, generator=generator, dtype=torch.float64)).softmax(-1)


def lenient_step(p, q, lenience):
    """The distribution of the first token behind one draft sampled from q, the coins integrated out."""
    vocab = len(p)
    drafts = torch.arange(vocab)[:, None]
    target, draft_probs = of_probs(p.expand(vocab, 2, vocab)), q.expand(vocab, 1, vocab)
    chances, scales = token_chances(target, drafts, draft_probs, lenience)
    mass = final_mass(target, drafts, draft_probs, torch.zeros(vocab, dtype=torch.long), scales)
    return q * chances[:, 0] + (q * (1 - chances[:, 0])) @ (mass / mass.sum(1, keepdim=True))


@pytest.mark.parametrize("lenience", [0.9, 0.5, 0.1])
def test_lenience_by_its_formula(lenience):
    for seed in range(10):
        p, q = random_pair(seed)
        accepted = torch.minimum(q, p / lenience)
        residual = (p - lenience * q).clamp(min=0)
        expected = accepted + (1 - accepted.sum()) * residual / residual.sum()
        found = lenient_step(p, q, lenience)
        assert torch.allclose(found, expected, atol=1e-12) and found.sum() == pytest.approx(1)
        assert (found <= p / lenience + 1e-12).all(), "no token has more than p / l"
        assert (found - p).abs().max() > 1e-4
    p, q = random_pair(0)
    assert torch.allclose(lenient_step(p, q, 1.0), p, atol=1e-12)


def test_lenience_in_the_commit():
    """By simulation, deterministic drafts included: accepted with probability min(1, p / l)."""
    p, q = random_pair(3, vocab=4)
    rows = 40_000
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    drafts = torch.multinomial(q, rows, replacement=True, generator=generator)[:, None]
    target = of_probs(p.expand(rows, 2, 4).float())
    options = {"lenience": 0.4}
    out, _, _ = run(target, drafts, q.expand(rows, 1, 4).float(), numbers, **options)
    counts = out.token_ids[:, 0].bincount(minlength=4).double()
    assert chisquare(counts, rows * lenient_step(p, q, 0.4)).pvalue > ALPHA
    assert chisquare(counts, rows * p).pvalue < 1e-6
    fixed = torch.full_like(drafts, int(p.argmin()))
    accepted = run(target, fixed, None, numbers, **options)[0].num_accepted.double().mean()
    chance = min(1.0, float(p.min()) / 0.4)
    assert abs(accepted - chance) < 3.3 * (chance * (1 - chance) / rows) ** 0.5


def test_typical_acceptance_by_its_formula():
    p = torch.stack([random_pair(seed, vocab=6)[0] for seed in range(60)]).view(20, 3, 6)
    drafts = torch.multinomial(p.flatten(0, 1), 1, generator=torch.Generator().manual_seed(1)).view(20, 3)
    drafts[:4, 2] = NO_TOKEN
    rule = Typical(epsilon=0.2, delta=0.5)
    found = typical_prefix(rule, of_probs(p.float()), drafts)
    for row in range(20):
        kept = []
        for place in range(3):
            probs = p[row, place].tolist()
            entropy = -sum(x * math.log(x) for x in probs)
            token = int(drafts[row, place])
            if token == NO_TOKEN or probs[token] < min(0.2, 0.5 * math.exp(-entropy)):
                break
            kept.append(token)
        assert found[row].tolist() == kept + [NO_TOKEN] * (3 - len(kept))
    lengths = (found != NO_TOKEN).sum(1)
    assert lengths.min() == 0 and lengths.max() == 3


def test_top_beta_by_its_formula():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(30, 3, 7, generator=generator).mul(2).round()  # ties among them
    scores[0, 0, 4] = -torch.inf
    drafts = torch.randint(7, (30, 3), generator=generator)
    drafts[0, 0], drafts[1, 1] = 4, NO_TOKEN
    for beta, tau in itertools.product((1, 2, 4), (0, 1.0, 3.0)):
        found = lets_pass(TopBeta(beta, tau), drafts, scores)
        for row, place in itertools.product(range(30), range(3)):
            token, here = int(drafts[row, place]), scores[row, place].tolist()
            ranked = sorted(range(7), key=lambda t: (-here[t], t))
            wanted = token >= 0 and token in ranked[:beta] and max(here) - here[token] <= tau
            assert bool(found[row, place]) == wanted
    assert torch.equal(
        lets_pass(Lenient(math.exp(-1)), drafts, scores),
        lets_pass(TopBeta(7, 1.0), drafts, scores),
    )


def test_the_first_rank_alone_is_greedy_decoding():
    expected = [plain_greedy(TARGET, prompt, max_new_tokens=20, pad_token_id=0) for prompt in PROMPTS]
    assert generate(verification=TopBeta(1, 5.0)).sequences[:, IDS.shape[1] :].tolist() == expected
    assert generate(verification=TopBeta(8, 9.0)).sequences[:, IDS.shape[1] :].tolist() != expected


def test_every_token_of_a_greedy_rule_passes_it():
    """By the target's own logits on the finished text."""
    out = generate(verification=TopBeta(4, 2.5)).sequences
    ranks = []
    for row, prompt in enumerate(PROMPTS):
        ids = out[row, IDS.shape[1] - len(prompt) :]
        logits = TARGET(ids[None]).logits[0, len(prompt) - 1 : -1]
        drafted = logits.gather(1, ids[len(prompt) :, None])
        assert (logits.amax(1) - drafted[:, 0] <= 2.5 + 1e-4).all()
        ranks += (logits > drafted).sum(1).tolist()
    assert max(ranks) in (1, 2, 3)


@pytest.mark.parametrize(
    ("sampled", "rules"),
    [
        (True, [Lenient(0.9), Lenient(0.3), Lenient(0.01)]),
        (True, [Typical(0.5, 1.0), Typical(0.1, 0.3), Typical(1e-4, 0.3)]),
        (False, [Lenient(0.9), Lenient(0.1), Lenient(1e-4)]),
        (False, [TopBeta(1, 9.0), TopBeta(3, 9.0), TopBeta(20, 9.0)]),
    ],
)
def test_laxer_rules_accept_more_and_are_named(sampled, rules):
    options = {"do_sample": True, "seed": 3, "top_k": 0} if sampled else {}
    lengths = []
    for rule in rules:
        found = generate(verification=rule, **options).speculation
        lengths.append(found.mean_acceptance_length)
        assert not found.is_lossless and found.verification == str(rule)
        assert found.to_dict()["verification"] == str(rule) and found.to_dict()["is_lossless"] is False
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "greedy"), ({"do_sample": True}, "token"), ({"do_sample": True, "verification": "block"}, "block")],
)
def test_lossless_ones_are_named_too(options, name):
    found = generate(**options).speculation
    assert found.is_lossless and found.verification == name


def test_in_continuous_batches_and_inside_transformers():
    rule = TopBeta(4, 3.0)
    expected = generate(verification=rule)
    done = specdec.generate_many(
        TARGET, PROMPTS, drafter=DRAFT, max_new_tokens=20, max_rows=4, verification=rule, in_order=True
    )
    assert [one.token_ids for one in done] == expected.sequences[:, IDS.shape[1] :].tolist()
    assert done.speculation.verification == str(rule) and not done.speculation.is_lossless
    inside = TARGET.generate(
        IDS, attention_mask=MASK, max_new_tokens=20, pad_token_id=0,
        custom_generate=specdec.speculative(DRAFT, verification=rule),
    )  # fmt: skip
    assert torch.equal(inside, expected.sequences)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"verification": Typical(0.1, 0.3)}, "pass do_sample=True"),
        ({"verification": TopBeta(2, 1.0), "do_sample": True}, "rule of greedy decoding"),
        ({"verification": Lenient(0.5), "drafter": None}, "nothing to accept"),
        ({"verification": Lenient}, "'token' or 'block'"),
        ({"verification": "typical"}, "specdec.Lenient, Typical or TopBeta"),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, part):
    with pytest.raises(ConfigError, match=part):
        specdec.generate(TARGET, IDS, MASK, **{"drafter": DRAFT, **options})


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Lenient(0.0), "lenience=0.0"),
        (lambda: Lenient(1.0), "verification='token'"),
        (lambda: Lenient(True), "lenience=True"),
        (lambda: Typical(0.0, 0.3), "epsilon=0.0"),
        (lambda: Typical(2, 0.3), "at most 1"),
        (lambda: Typical(0.1, math.inf), "delta=inf"),
        (lambda: TopBeta(0, 1.0), "beta=0"),
        (lambda: TopBeta(1.5, 1.0), "beta=1.5"),
        (lambda: TopBeta(2, -1.0), "tau=-1.0"),
        (lambda: verification_named("typical:0.1"), "typical:EPSILON:DELTA"),
        (lambda: verification_named("top_beta:x:1"), "top_beta:BETA:TAU"),
    ],
)
def test_numbers_outside_their_limits_are_refused(make, part):
    with pytest.raises(ConfigError, match=part):
        make()


def test_names_on_a_command_line():
    assert verification_named("block") == "block"
    assert verification_named("lenient:0.5") == Lenient(0.5)
    assert verification_named("typical:0.09:0.3") == Typical(0.09, 0.3)
    assert verification_named("top_beta:3:2") == TopBeta(3, 2.0)


def test_infilling_stays_exact():
    from tiny_xlnet import tiny_xlnet

    model = tiny_xlnet()
    ids = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="infilling is exact"):
        specdec.infill(model, ids, ids == 3, mask_token_id=0, verification=Lenient(0.5))


def test_nothing_here_is_a_default():
    assert specdec.generate.__kwdefaults__["verification"] == "token"
    assert specdec.generate_many.__kwdefaults__["verification"] == "token"
