"""What is kept with a model: made once, made anew once its state differs, freed with the model."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import nn

from specdec.kept import kept_with


def test_made_once_for_each_model_and_key():
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    first = kept_with(one, "list", list)
    assert kept_with(one, "list", list) is first
    assert kept_with(one, "another", list) is not first
    assert kept_with(other, "list", list) is not first


def test_another_state_replaces_what_was_made():
    model = nn.Linear(1, 1)
    first = kept_with(model, "list", list, state=1)
    second = kept_with(model, "list", list, state=2)
    assert kept_with(model, "list", list, state=2) is second is not first
    assert kept_with(model, "list", list, state=1) is not first, "the old one was let go"


def test_an_error_keeps_nothing():
    model = nn.Linear(1, 1)
    with pytest.raises(ZeroDivisionError):
        kept_with(model, "number", lambda: 1 // 0)
    assert kept_with(model, "number", lambda: 1) == 1


def test_a_model_is_not_kept_alive():
    model = nn.Linear(1, 1)
    kept_with(model, "list", list)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
