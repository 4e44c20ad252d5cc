"""Copies of processors are independent, keep what they hold in common, and share what never changes."""

from __future__ import annotations

import threading
from collections import Counter, deque
from functools import partial

import pytest
import torch
from tiny import tiny_llama

import specdec
from specdec.verify.forks import fork

MODEL = tiny_llama(0)


class Counts:
    """A processor whose state is a number, held wherever `make` puts it."""

    def __init__(self):
        self.count = 0

    def __call__(self, ids, scores):
        self.count += 1
        return self.count


class InSlots:
    """What is in private slots, and knows how to copy itself, is found."""

    __slots__ = ("__matcher", "other")

    def __init__(self):
        self.__matcher = WithFork()

    def __call__(self, ids, scores):
        return self.__matcher.advance()


class Compiled:
    """Stands for a class of compiled code: nothing of it can be seen, and it knows how to copy itself."""

    __slots__ = ("count",)

    def __init__(self, count=0):
        self.count = count

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle a Compiled")

    def advance(self):
        self.count += 1
        return self.count


class WithFork(Compiled):
    __slots__ = ()

    def fork(self):
        return WithFork(self.count)


class WithDeepCopy(Compiled):
    __slots__ = ()

    def deep_copy(self):
        return WithDeepCopy(self.count)


class WithClone(Compiled):
    __slots__ = ()

    def clone(self):
        return WithClone(self.count)


class Holds:
    """A library's processor for transformers: matchers in a list, made when it is first asked."""

    def __init__(self, make):
        self.make, self.matchers, self.module = make, [], threading

    def __call__(self, ids, scores):
        if not self.matchers:
            self.matchers.append(self.make())
        return self.matchers[0].advance()


class ShallowCopy(Counts):
    """Python's own classes often offer a copy that is not independent."""

    def __init__(self):
        self.seen = []

    def copy(self):
        other = ShallowCopy()
        other.seen = self.seen
        return other

    def __call__(self, ids, scores):
        self.seen.append(0)
        return len(self.seen)


class Switches:
    """Asks by a method of its own that it chose when it was first asked."""

    def __init__(self):
        self.count = 0

    def advance(self):
        self.count += 1
        return self.count

    def __call__(self, ids, scores):
        self.chosen = getattr(self, "chosen", self.advance)
        return self.chosen()


class OfTensors:
    def __init__(self):
        self.count, self.history = torch.zeros(1), deque(maxlen=4)

    def __call__(self, ids, scores):
        self.count += 1
        self.history.append(Counter({0: 1}))
        return int(self.count) if len(self.history) == min(int(self.count), 4) else -1


def closure():
    count, seen = 0, []

    def processor(ids, scores):
        nonlocal count
        count += 1
        seen.append(count)
        return len(seen) if len(seen) == count else -1

    return processor


def through_partial():
    return partial(lambda counts, ids, scores: counts(ids, scores), Counts())


def of_a_builtin_method():
    seen = []
    push = seen.append

    def processor(ids, scores):
        push(0)
        return len(seen)

    return processor


def recursive():
    count = 0

    def processor(ids, scores, depth=1):
        nonlocal count
        count += depth
        return processor(ids, scores, 0) if depth else count

    return processor


MAKERS = {
    "attribute": Counts,
    "slots": InSlots,
    "fork": lambda: Holds(WithFork),
    "deep_copy": lambda: Holds(WithDeepCopy),
    "clone": lambda: Holds(WithClone),
    "shallow_copy": ShallowCopy,
    "bound_method": Switches,
    "tensors": OfTensors,
    "closure": closure,
    "partial": through_partial,
    "builtin_method": of_a_builtin_method,
    "recursive": recursive,
    "method": lambda: Counts().__call__,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_a_copy_goes_its_own_way(kind, num_before):
    def ask(one):
        return one(None, None)

    original = MAKERS[kind]()
    assert [ask(original) for _ in range(num_before)] == list(range(1, num_before + 1))
    copies = [fork([original])[0] for _ in range(2)]
    assert [ask(copies[0]) for _ in range(3)] == [num_before + i for i in (1, 2, 3)]
    # A copy of the copy, while neither the original nor the other copy has moved.
    assert [ask(fork([copies[0]])[0]) for _ in range(2)] == [num_before + 4] * 2
    assert ask(copies[0]) == num_before + 4
    assert ask(copies[1]) == ask(original) == num_before + 1


def test_what_processors_hold_together_their_copies_hold_together():
    shared = WithFork()

    def first(ids, scores):
        return shared.advance()

    def second(ids, scores):
        return shared.advance()

    one, two = fork([first, second])
    assert [one(0, 0), two(0, 0), one(0, 0)] == [1, 2, 3] and shared.count == 0
    again, same = fork([one, one])
    assert again is same and again is not one


def test_what_does_not_change_is_shared():
    """A model is not copied, nor a module's weights; its buffers are."""

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.register_buffer("seen", torch.zeros(1))
            self.model, self.lock = MODEL, threading.RLock()

    original = Scorer()
    (made,) = fork([original])
    assert made is not original and made.model is MODEL and made.linear.weight is original.linear.weight
    made.seen += 1
    assert original.seen == 0
    (kept,) = fork([original], unchanging=[original])
    assert kept is original


@torch.no_grad()
def decorated(ids, scores):
    """Closes over the function that was decorated."""
    return scores


def test_functions_without_variables_of_their_own_are_shared():
    """One of them copied would be one that its module does not know."""
    assert fork([closure]) == [closure]
    assert decorated.__closure__ and fork([decorated]) == [decorated]
    without = lambda ids, scores: scores  # noqa: E731
    assert fork([without]) == [without]


def holds_generator():
    numbers = (i for i in range(9))
    return lambda ids, scores: next(numbers)


class BadFork(Counts):
    def fork(self):
        return None


@pytest.mark.parametrize(
    "make, message",
    [
        (
            holds_generator,
            r"holds_generator.*lambda.* cannot be copied \(TypeError: cannot pickle 'generator' object\)",
        ),
        (lambda: Holds(Compiled()), r"logits processor Holds .*Compiled.* a method fork\(\)"),
        (BadFork, r"BadFork.fork\(\) returned a NoneType"),
    ],
)
def test_the_processor_that_cannot_be_copied_is_named(make, message):
    with pytest.raises(specdec.ConfigError, match=message):
        fork([Counts(), make(), Counts()])
