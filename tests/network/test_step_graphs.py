"""Captured steps without a GPU: a capture runs the step once, a replay nothing."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from specdec.network.base import NetworkOutput
from specdec.network.captured import graphs as step_graphs
from specdec.network.captured.graphs import MAX_STEP_WIDTH, StepGraphs


class FakeStream:
    def wait_stream(self, other):
        pass


@contextmanager
def running(*arguments, **options):
    yield


@pytest.fixture
def graphs(monkeypatch):
    fake = SimpleNamespace(
        graph_pool_handle=lambda: None,
        Stream=FakeStream,
        current_stream=FakeStream,
        stream=running,
        graph=running,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
    )
    monkeypatch.setattr(step_graphs, "torch", SimpleNamespace(**vars(torch) | {"cuda": fake}))
    return StepGraphs(SimpleNamespace(num_slots=500, device=torch.device("cpu")))


def forward(token_ids, starts, used_slots, layers):
    return NetworkOutput(torch.zeros(*token_ids.shape, 7), ())


def test_a_shape_is_captured_once_and_said_so(graphs, caplog):
    with caplog.at_level(logging.INFO, "specdec"):
        for rows, width in ((3, 2), (4, 2), (3, 2), (5, 2)):
            token_ids, starts = torch.ones(rows, width, dtype=torch.long), torch.full((rows,), 9)
            assert graphs.replay(forward, token_ids, starts, 20, ()).logits.shape == (rows, width, 7)
    begun = [record.getMessage() for record in caplog.records if "capturing" in record.getMessage()]
    assert [message.split(";")[0] for message in begun] == [
        "capturing step 1: 4 rows x 2 tokens over 500 slots",
        "capturing step 2: 8 rows x 2 tokens over 500 slots",
    ]
    assert sum("captured in" in record.getMessage() for record in caplog.records) == 2


def test_rows_that_pad_a_bucket_start_behind_the_texts(graphs):
    for rows in (4, 2, 3):
        graphs.replay(forward, torch.ones(rows, 1, dtype=torch.long), torch.full((rows,), 9), 20, ())
    (step,) = [step for step in graphs.captured.values() if len(step.starts) == 4]
    assert step.starts.tolist() == [9, 9, 9, 500 - MAX_STEP_WIDTH]
