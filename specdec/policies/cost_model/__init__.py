"""The length policy that measures: it drafts the number of tokens that gives the most tokens per second, perhaps none.

It times drafts and verifications while they happen (`costs.py`). It learns how many tokens are accepted from earlier
drafts and, while drafting, from an acceptance head or the drafter's own probability. A step that drafts w tokens is
expected to give G(w) = sum over rows of 1 + P(1 accepted) + ... + P(w accepted) tokens in T(w) seconds; the best rate
is the largest G(w) / T(w), and w = 0 is plain decoding (`forecast.py`). An estimate refines this token by token:
drafting goes on while the tokens it is expected to add are worth more than the seconds it adds, each second counted at
the best rate (the marginal value theorem).

It is not slower than plain decoding, whatever the drafter: each step that drafts is compared with plain steps, and
drafts may lose only what a budget allows (`knowledge.py`). So a drafter that never gains loses in n steps at most
0.005 n + 3 plain steps and one step's excess: 3 % of 128 steps, about 1 % of 500, and less where no trial seems worth
its price. What drafts have gained they may lose again, up to a limit. Only the first few steps of a pair are free.

`states.py` names the states that a step can be in, `planning.py` chooses among them, and `policy.py` connects them to
the steps of a generation.

Where networks time their captured steps by themselves, on a GPU, none of this is needed: `tables.py` knows what each
step costs, `records.py` keeps what was learned of acceptance, and `chooser.py` chooses a step ahead. A list of drafters
is always chosen from by it, with the costs of `timed.py` where steps have to be timed.
"""

from specdec.policies.cost_model.knowledge import Knowledge, LossBudget, knowledge_of
from specdec.policies.cost_model.policy import CostModel

__all__ = ["CostModel", "Knowledge", "LossBudget", "knowledge_of"]
