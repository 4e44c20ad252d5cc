"""Logits processors that remember what they were asked, each kept in another way; made anew for each call."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

NEVER = float("-inf")


class Parity(LogitsProcessor):
    """Even ids at its even calls, odd ids at its odd ones."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        is_other = torch.arange(scores.shape[1], device=scores.device) % 2 != self.num_calls % 2
        self.num_calls += 1
        return scores.masked_fill(is_other, NEVER)


class FollowsScores(LogitsProcessor):
    """Less of what was likely before, to a running mean that it changes in place."""

    def __init__(self):
        self.mean = None

    def __call__(self, input_ids, scores):
        self.mean = torch.zeros_like(scores) if self.mean is None else self.mean
        found = scores - 0.8 * self.mean
        self.mean.mul_(0.5).add_(0.5 * scores)
        return found


class Matcher:
    """Stands for a compiled grammar: it refuses tokens that it has not allowed, and copies itself by `fork` alone."""

    __slots__ = ("state",)

    def __init__(self, state=0):
        self.state = state

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle a Matcher")

    def fork(self):
        return Matcher(self.state)

    def is_allowed(self, scores):
        return torch.arange(scores.shape[1], device=scores.device) % 5 != self.state % 5

    def accept(self, token):
        assert token % 5 != self.state % 5
        self.state = 3 * self.state + token + 1


class Grammar(LogitsProcessor):
    """Built like xgrammar's own: its matcher is made when it is first asked, and is told each token once."""

    def __init__(self):
        self.matchers, self.texts = [], []

    def __call__(self, input_ids, scores):
        text = input_ids[0].tolist()
        if not self.matchers:
            self.matchers.append(Matcher())
        else:
            assert text[:-1] == self.texts[-1], "asked twice about a place, or about one before the place before it"
            self.matchers[0].accept(text[-1])
        self.texts.append(text)
        return scores.masked_fill_(~self.matchers[0].is_allowed(scores), NEVER)


def closure():
    """A function whose state is a variable that it closes over."""
    last = None

    def processor(input_ids, scores):
        nonlocal last
        found = scores if last is None else scores.scatter(1, last, NEVER)
        last = found.argmax(1, keepdim=True)
        return found

    return processor


MAKERS = {"parity": Parity, "scores": FollowsScores, "grammar": Grammar, "closure": closure}
