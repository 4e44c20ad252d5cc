"""The training loop and its data: a killed run ends as an unbroken one, and rows come in a fixed order."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from specdec.drafters.training import trainer
from specdec.drafters.training.checkpoint import load_checkpoint, save_checkpoint, written_whole
from specdec.drafters.training.data import TokenStream, pad_right, read_stream, save_stream
from specdec.drafters.training.loss_guard import LossGuard
from specdec.drafters.training.trainer import CHECKPOINT, TrainConfig, finish, make_accelerator, read_losses, train
from specdec.errors import ConfigError, InputError, NumericalError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = TrainConfig(num_steps=23, learning_rate=0.05, checkpoint_every=5)


class Buffer:
    """A state beside the weights: the running mean of what the steps saw."""

    def __init__(self):
        self.mean = torch.zeros(4)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class Killed(Exception):
    pass


def run(folder, config=CONFIG, kill_at=None, settings=None):
    """A small regression whose loss also depends on all three random generators and on a buffer."""
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    module[0].bias.requires_grad_(False)
    buffer = Buffer()

    def loss_of(model, step):
        if step.index == kill_at:
            raise Killed
        x = torch.from_numpy(np.random.default_rng(step.shard).normal(size=(6, 4))).float()
        buffer.mean = 0.9 * buffer.mean + 0.1 * x.mean(0)
        noise = random.random() + np.random.random()
        return (model(x + buffer.mean) - x.sum(1, keepdim=True) - noise).square().mean()

    record = train(module, loss_of, config, folder, make_accelerator(CPU), settings, buffer)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}, record


def test_a_run_learns_and_logs_each_step_once(tmp_path):
    weights, record = run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(23))
    assert record.last_loss < record.first_loss and record.resumed_at == 0
    assert [line["learning_rate"] for line in lines] == [CONFIG.learning_rate_at(step) for step in range(23)]
    torch.manual_seed(7)
    assert torch.equal(weights["0.bias"], nn.Linear(4, 8).bias)  # asked for no gradient


@pytest.mark.parametrize("kill_at", [3, 5, 11, 19])
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, kill_at):
    """Would catch a generator, an optimizer moment, a buffer or a learning rate that is not restored."""
    expected, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", kill_at=kill_at)
    torch.manual_seed(99)
    random.seed(99)
    weights, record = run(tmp_path / "broken")
    assert record.resumed_at == kill_at // 5 * 5
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (tmp_path / "broken/losses.jsonl").read_text() == (tmp_path / "whole/losses.jsonl").read_text()


def test_a_finished_run_leaves_no_checkpoint(tmp_path):
    run(tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    finish(tmp_path, make_accelerator(CPU))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.jsonl"]


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, settings={"data": "a"})
    with pytest.raises(ConfigError, match=r"data was 'a', is 'b'; .*choose another folder"):
        run(tmp_path, settings={"data": "b"})
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.05, is 0\.1"):
        run(tmp_path, TrainConfig(num_steps=23, learning_rate=0.1, checkpoint_every=5), settings={"data": "a"})


def test_a_broken_checkpoint_is_refused(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"PK broken")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_before_its_checkpoint(tmp_path):
    module = nn.Linear(1, 1)
    with pytest.raises(NumericalError, match=r"the loss at step 4 is nan; lower learning_rate=0\.05"):
        train(
            module,
            lambda model, step: model(torch.ones(1, 1)).sum() * (float("nan") if step.index == 4 else 1.0),
            CONFIG,
            tmp_path,
            make_accelerator(CPU),
        )
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_run_that_diverges_is_ended_and_keeps_its_checkpoint(tmp_path):
    """Planted: from step 200 on the weights are thrown far away."""
    config = TrainConfig(num_steps=1000, learning_rate=0.01, checkpoint_every=100)
    bad_from, weight = 200, nn.Parameter(torch.tensor([5.0]))
    module = nn.ParameterList([weight])

    def loss_of(model, step):
        if step.index >= bad_from:
            with torch.no_grad():
                weight.fill_(9.0)
        return weight.abs().sum() + 0.1 * random.random()

    with pytest.raises(NumericalError, match=r"diverged: 9.* up to step 249, after .* lower learning_rate=0\.01"):
        train(module, loss_of, config, tmp_path, make_accelerator(CPU))
    assert load_checkpoint_steps(tmp_path) == 200 and len(read_losses(tmp_path / "losses.jsonl")) == 250


def load_checkpoint_steps(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)["num_steps_done"]


def judged(losses, learning_rate=0.01):
    """Whether the guard lets them pass."""
    try:
        LossGuard(learning_rate).add(losses)
    except NumericalError:
        return False
    return True


@pytest.mark.parametrize("high", [9.5, 7.4])
def test_divergence_as_it_was_measured(high):
    """From 5.0 to 9.5 behind the warm-up; and to the loss of one who knows how frequent tokens are, no more."""
    noise = np.random.default_rng(0).normal(0, 0.15, 1000)
    learning = 5 + 4 * np.exp(-np.arange(300) / 60)
    assert judged([*(learning + noise[:300])])
    assert not judged([*(learning + noise[:300]), *(high + noise[300:450])])


def test_a_loss_that_explodes_within_a_window_is_seen_soon():
    with pytest.raises(NumericalError, match="step 149"):
        LossGuard(1.0).add([*np.linspace(9, 5, 100), *np.geomspace(5, 1e9, 100)])


STEPS = np.arange(1000)
NOISY = {
    "noisy": lambda rng, noise: 2 * np.exp(-STEPS / 300) + 1 + noise,
    "around zero": lambda rng, noise: noise,  # as a policy gradient's
    "heavy tails": lambda rng, noise: rng.lognormal(-2, 1.5, 1000),
    "slow rise": lambda rng, noise: 0.2 + 0.03 * STEPS / 1000 + 0.02 * noise,  # on-policy text that gets harder
    "spikes": lambda rng, noise: 1 + 100 * (STEPS % 70 < 10) + 0.1 * noise,
    "near zero": lambda rng, noise: 0.7 * np.exp(-STEPS / 50) + 0.01 * rng.gamma(1, 1, 1000),
}


@pytest.mark.parametrize("kind", NOISY)
def test_noisy_losses_pass(kind):
    """20 runs of 1000 steps each."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=1000)
        assert judged(NOISY[kind](rng, noise).tolist()), f"seed {seed}"


def test_what_the_guard_saw_before_a_kill_counts(tmp_path):
    losses = [9.0] * 50 + [5.0] * 70 + [8.0] * 80
    module = nn.Linear(1, 1)

    def resumable(kill_at):
        def loss_of(model, step):
            if step.index == kill_at:
                raise Killed
            return 0 * model(torch.ones(1, 1)).sum() + losses[step.index]

        config = TrainConfig(num_steps=200, learning_rate=0.01, checkpoint_every=30)
        return train(module, loss_of, config, tmp_path, make_accelerator(CPU))

    with pytest.raises(Killed):
        resumable(130)
    with pytest.raises(NumericalError, match="up to step 199, after 5 at best and 9 at first"):
        resumable(None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    save_checkpoint(tmp_path / "file", {"settings": {}, "value": torch.arange(3)})
    with pytest.raises(Killed), written_whole(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise Killed
    assert torch.equal(load_checkpoint(tmp_path / "file", {})["value"], torch.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no parameter of Linear requires gradients"):
        frozen = nn.Linear(1, 1).requires_grad_(False)
        train(frozen, lambda model, step: model(torch.ones(1, 1)).sum(), CONFIG, tmp_path, make_accelerator(CPU))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_steps": 0}, "num_steps=0 is below 1"), ({"learning_rate": 0.0}, "not positive"), ({"seed": -1}, "seed=-1")],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"num_steps": 1, "learning_rate": 1.0, **options})


SCRIPT = """
import sys, time, torch
from pathlib import Path
from torch import nn
from specdec.drafters.training.trainer import TrainConfig, make_accelerator, train
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
def loss_of(model, step):
    time.sleep(float(sys.argv[2]))
    return (model(torch.randn(6, 4)) - 1).square().mean()
train(module, loss_of, TrainConfig(num_steps=60, learning_rate=0.05, checkpoint_every=3), Path(sys.argv[1]),
      make_accelerator(torch.device("cpu")))
torch.save(module.state_dict(), Path(sys.argv[1]) / "final.pt")
"""


def test_a_run_killed_by_the_system_resumes(tmp_path):
    """SIGKILL, wherever it hits: in a step, in a checkpoint, in the log."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder, sleep):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(sleep)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=ROOT)

    killed, whole = start(tmp_path / "killed", 0.01), start(tmp_path / "whole", 0)
    while not (tmp_path / "killed" / CHECKPOINT).exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.002)
    time.sleep(random.Random().uniform(0, 0.15))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start(tmp_path / "killed", 0)
    for process in (again, whole):
        _, error = process.communicate()
        assert process.returncode == 0, error
    results = [torch.load(tmp_path / name / "final.pt") for name in ("killed", "whole")]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])
    assert len(read_losses(tmp_path / "killed" / "losses.jsonl")) == 60
    assert (tmp_path / "killed/losses.jsonl").read_text() == (tmp_path / "whole/losses.jsonl").read_text()


@given(st.integers(2, 7), st.integers(20, 90), st.integers(0, 50), st.integers(1, 9), st.integers(0, 3))
def test_rows_are_a_function_of_their_number(row_tokens, num_tokens, first, count, seed):
    stream = TokenStream(np.arange(num_tokens, dtype=np.int32), row_tokens, seed)
    rows = stream.rows(first, count)
    assert rows.shape == (count, row_tokens) and rows.dtype == torch.int64
    assert torch.equal(rows - rows[:, :1], torch.arange(row_tokens).expand(count, -1))  # pieces of the stream
    assert all(torch.equal(stream.rows(first + i, 1)[0], rows[i]) for i in range(count))


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order():
    stream = TokenStream(torch.arange(103), 10)
    epochs = [stream.rows(epoch * 9, 9) for epoch in range(2)]
    for epoch in epochs:
        assert len(set(epoch.flatten().tolist())) == 90  # no token twice
    assert epochs[0][:, 0].tolist() != epochs[1][:, 0].tolist()


def test_a_stream_that_is_too_short_is_refused():
    with pytest.raises(InputError, match="has 7 tokens, but two rows of 4 are needed"):
        TokenStream(np.zeros(7, dtype=np.int32), 4)


def test_padding_and_prompts_are_not_counted():
    batch = pad_right([torch.tensor([5, 6, 7]), torch.tensor([8])], [1, 0], pad_token_id=9)
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.counted.tolist() == [[False, True, True], [True, False, False]]
    assert batch.predicts.tolist() == [[True, True], [False, False]]


def test_text_files_become_one_stream(tmp_path):
    (tmp_path / "b.py").write_text("w3 w4")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "w5"}\n\n{"prompt": "w6 w7"}\n')
    (tmp_path / "a.json").write_text('["w8", {"text": "w9"}]')
    tokens = read_stream([tmp_path], word_tokenizer(), 61)
    assert tokens.tolist() == [8, 2, 9, 2, 3, 4, 2, 5, 2, 6, 7, 2]
    save_stream(tmp_path / "packed.npy", tokens)
    assert read_stream([tmp_path / "packed.npy"], word_tokenizer(), 61).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "does not exist"),
        ("a.jsonl", b'{"text": "w3"}\n{"text"', "line 2 is not JSON"),
        ("a.json", b"[3]", "neither a string nor"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.npy", b"nothing", "cannot be read"),
        ("empty.txt", b"", "no training text"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_stream([tmp_path / name], word_tokenizer(), 61)


def test_tokens_of_another_vocabulary_are_refused(tmp_path):
    save_stream(tmp_path / "a.npy", np.array([3, 61], dtype=np.uint16))
    with pytest.raises(InputError, match="holds token 61, but the model has 61 tokens"):
        read_stream([tmp_path / "a.npy"], word_tokenizer(), 61)
    (tmp_path / "b.txt").write_text("w3")
    with pytest.raises(InputError, match="must be the only training file"):
        read_stream([tmp_path / "a.npy", tmp_path / "b.txt"], word_tokenizer(), 61)


@pytest.mark.parametrize("rank, chosen", [(None, [torch.device("cuda:1")]), ("0", [])])
def test_the_gpu_that_was_asked_for_is_trained_on(monkeypatch, rank, chosen):
    """accelerate takes the current GPU; under `accelerate launch` each process has its own."""
    seen = []
    monkeypatch.setattr(trainer.torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(trainer, "Accelerator", lambda **options: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    trainer.make_accelerator(torch.device("cuda:1"))
    assert seen == chosen
