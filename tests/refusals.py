"""Many refusals in one test, each named when it does not come."""

from __future__ import annotations

import re

import pytest


def assert_refused(error, match, call, *arguments, **options):
    """call(*arguments, **options) must raise `error` with a message that the pattern `match` is found in."""
    try:
        call(*arguments, **options)
    except error as caught:
        assert re.search(match, str(caught)), f"{match!r} not in {caught}"
    else:
        pytest.fail(f"{arguments}, {options} was not refused; expected {match!r}")
