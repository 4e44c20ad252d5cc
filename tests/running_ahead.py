"""Networks that run ahead on a CPU, where a forward is over when it returns, because a test says so.

As on a GPU, where a replayed graph writes where it wrote before, what a network returned is gone with its next forward.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

from specdec.drafters.draft_model import DraftModel
from specdec.engine import ahead, decode
from specdec.engine.ahead import Early
from specdec.network.invariant.network import InvariantNetwork


@contextmanager
def running_ahead():
    """Yields how many forwards of the target were launched ahead, how many of them were used, and of draft models."""
    counts = {"begun": 0, "used": 0, "drafts": 0}
    forward, begin_draft = InvariantNetwork.forward, DraftModel.begin
    launch, fits = ahead.launch_early, Early.fits

    def overwriting(self, *arguments, **options):
        last = getattr(self, "last_output", None)
        if last is not None:
            for tensor in (last.logits, *last.hidden_states):
                tensor.fill_(float("nan"))
        self.last_output = forward(self, *arguments, **options)
        return self.last_output

    def counted_launch(*arguments, **options):
        early = launch(*arguments, **options)
        counts["begun"] += early is not None
        return early

    def counted_fits(self, *arguments):
        is_used = fits(self, *arguments)
        counts["used"] += is_used
        return is_used

    def counted_draft(self, rows):
        begin_draft(self, rows)
        counts["drafts"] += self._launched is not None

    with (
        mock.patch.object(InvariantNetwork, "runs_ahead", True),
        mock.patch.object(InvariantNetwork, "forward", overwriting),
        mock.patch.object(decode, "launch_early", counted_launch),
        mock.patch.object(Early, "fits", counted_fits),
        mock.patch.object(DraftModel, "begin", counted_draft),
    ):
        yield counts
