"""Streamers of a batch: each gets its row's prompt, its tokens as they are committed, and its end."""

from __future__ import annotations

import pytest
import torch
from tiny import left_pad, plain_greedy, tiny_llama
from transformers import TextStreamer

import specdec

TARGET = tiny_llama(0)
OTHER = tiny_llama(1, num_hidden_layers=1)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 5, 6, 7], [9], [11, 12, 13, 11, 12])]


class Heard:
    """A streamer that writes down what it is told, into one common list."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def put(self, value):
        assert value.device.type == "cpu"
        self.log.append((self.name, value.flatten().tolist()))

    def end(self):
        self.log.append((self.name, "end"))


def told(log, name):
    return [what for who, what in log if who == name]


@pytest.mark.parametrize("face", ["generate", "speculative"])
def test_each_row_has_its_streamer(face):
    options = {"max_new_tokens": 16, "pad_token_id": 0}
    eos = plain_greedy(TARGET, PROMPTS[1], **options)[3]
    expected = [plain_greedy(TARGET, prompt, eos_token_id=eos, **options) for prompt in PROMPTS]
    assert len(set(map(len, expected))) > 1
    log: list = []
    streamer = [Heard(row, log) for row in range(3)]
    ids, mask = left_pad(PROMPTS)
    if face == "generate":
        specdec.generate(TARGET, ids, mask, drafter=OTHER, streamer=streamer, eos_token_id=eos, **options)
    else:
        loop = specdec.speculative(OTHER, streamer=streamer)
        TARGET.generate(ids, attention_mask=mask, custom_generate=loop, eos_token_id=eos, **options)
    for row, tokens in enumerate(expected):
        assert told(log, row) == [PROMPTS[row].tolist(), *([token] for token in tokens), "end"]
    # While others still run: the shortest row ends before the longest has all its tokens.
    ends = {name: place for place, (name, what) in enumerate(log) if what == "end"}
    assert min(ends.values()) < len(log) - 3


def test_a_streamer_for_every_return_sequence():
    log: list = []
    options = {"do_sample": True, "seed": 1, "max_new_tokens": 5, "eos_token_id": None, "num_return_sequences": 2}
    ids, mask = left_pad(PROMPTS[:2])
    streamer = [Heard(row, log) for row in range(4)]
    out = specdec.generate(TARGET, ids, mask, drafter=OTHER, streamer=streamer, **options)
    for row in range(4):
        prompt, *tokens, end = told(log, row)
        assert prompt == PROMPTS[row // 2].tolist() and end == "end"
        assert [token for piece in tokens for token in piece] == out[row, ids.shape[1] :].tolist()


def test_a_list_of_one_is_one(capsys):
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    plain = plain_greedy(TARGET, PROMPTS[0], max_new_tokens=5)
    specdec.generate(
        TARGET, PROMPTS[0][None], streamer=[TextStreamer(Words(), skip_prompt=True)], max_new_tokens=5, drafter=OTHER
    )
    assert capsys.readouterr().out == "".join(f"{token} " for token in plain) + "\n"


@pytest.mark.parametrize(
    ("streamer", "message"),
    [
        (Heard(0, []), "one streamer for 3 rows; pass a list with a streamer for each row"),
        ([Heard(0, [])], "1 streamers for 3 rows"),
        ([Heard(0, []), print, Heard(0, [])], "needs transformers' put"),
    ],
)
def test_refusals(streamer, message, monkeypatch):
    monkeypatch.setattr("specdec.network.base.Network.prefill", None)  # no token may be generated
    ids, mask = left_pad(PROMPTS)
    with pytest.raises(specdec.ConfigError, match=message):
        specdec.generate(TARGET, ids, mask, drafter=OTHER, streamer=streamer, max_new_tokens=4)
