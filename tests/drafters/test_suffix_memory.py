"""The memory of the suffix drafter: what stays, what leaves, and its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import specdec
from specdec import Suffix, SuffixMemory
from specdec.drafters.memory import file as memory_file
from specdec.errors import ConfigError, DrafterError, InputError
from tests.drafters.test_suffix import drafts_of, texts_in


def tokenizer_of(size, letter="a"):
    words = {f"{letter}{index}": index for index in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token=f"{letter}0")))


def random_texts(count, length, seed=0):
    return list(np.random.default_rng(seed).integers(0, 60, (count, length)))


@given(st.lists(st.integers(1, 70), max_size=60), st.integers(3, 400))
@settings(max_examples=60, deadline=None)
def test_it_is_bounded_and_its_segments_are_few(lengths, room):
    memory = SuffixMemory(room)
    for number, length in enumerate(lengths):
        memory.add(torch.full((length,), number))
        assert memory.num_tokens <= room
        if length > 1:
            newest = texts_in(memory)[-1]
            assert newest == [number] * min(length, room - 1), "what was added last is there"
    assert len(memory.segments) <= 3 * 8 + 8
    assert len(memory) == len(texts_in(memory)) and memory.num_bytes == 8 * memory.num_tokens


def test_few_segments_of_many_small_texts():
    memory = SuffixMemory(80_000)
    for text in random_texts(500, 9):
        memory.add(text)
    assert [len(segment) for segment in memory.segments] == sorted((len(s) for s in memory.segments), reverse=True)
    assert len(memory.segments) <= 10 and len(memory) == 500
    assert all(
        older > 2 * newer for older, newer in zip(*(list(map(len, memory.segments))[i:] for i in (0, 1)), strict=False)
    )


def test_the_least_recently_used_leaves_first():
    memory = SuffixMemory(400)  # segments of 50
    old = random_texts(8, 47)
    for text in old:
        memory.add(text)
    assert len(memory.segments) == 8
    drafts_of(Suffix(memory, learn=False), [old[0][:20].tolist()], 4)
    memory.add(random_texts(1, 47, seed=1)[0])
    assert texts_in(memory)[0] == old[0].tolist() and old[1].tolist() not in texts_in(memory)
    assert len(memory) == 8


def test_extending_is_adding_at_once():
    one, many, texts = SuffixMemory(), SuffixMemory(), random_texts(20, 30)
    for text in texts:
        one.add(text)
    many.extend(texts)
    assert texts_in(one) == texts_in(many) and len(many.segments) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([1, -2], "holds ids -2 to 1; token ids are 0 to"),
        ([1, 2**31], "token ids are 0 to 2147483645"),
        ([[1, 2]], r"has shape \[1, 2\]"),
        ([1.5, 2.0], r"type float64; pass \[length\] token ids"),
    ],
)
def test_what_is_no_text_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        SuffixMemory().add(text)


def test_a_file_holds_the_memory_for_other_processes(tmp_path):
    memory, path = SuffixMemory(5000, tokenizer_of(60)), tmp_path / "work.npz"
    memory.extend(random_texts(40, 25))
    drafts_of(Suffix(memory, learn=False), [random_texts(1, 25)[0][:9].tolist()], 4)
    memory.save(path)
    code = (
        "import sys, json; from specdec import SuffixMemory; m = SuffixMemory.load(sys.argv[1]); "
        "print(json.dumps([m.max_tokens, m.num_tokens, len(m), str(m.tokenizer), [s.last_used for s in m.segments]]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    used = [segment.last_used for segment in memory.segments]
    assert json.loads(out.stdout) == [5000, memory.num_tokens, 40, str(memory.tokenizer), used]
    loaded = SuffixMemory.load(path)
    assert texts_in(loaded) == texts_in(memory) and os.listdir(tmp_path) == ["work.npz"]
    prompts = [text[:12].tolist() for text in random_texts(5, 25)]
    assert drafts_of(Suffix(loaded), prompts, 6) == drafts_of(Suffix(memory), prompts, 6)
    smaller = SuffixMemory.load(path, max_tokens=700)
    assert smaller.max_tokens == 700 and smaller.num_tokens <= 700


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """A write that fails, at any moment, leaves the old file and nothing beside it."""
    memory, path = SuffixMemory(tokenizer=tokenizer_of(60)), tmp_path / "work.npz"
    memory.add([1, 2, 3])
    memory.save(path)
    before = path.read_bytes()
    memory.add([4, 5, 6])
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(memory_file.os, name, fails)
            with pytest.raises(InputError, match=r"work.npz' cannot be written: No space left"):
                memory.save(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["work.npz"]
    memory.save(path)
    assert len(SuffixMemory.load(path)) == 2
    with pytest.raises(InputError, match=r"nowhere/work.npz' cannot be written: No such file"):
        memory.save(tmp_path / "nowhere" / "work.npz")


def fails(*_):
    raise OSError(28, "No space left on device")


def test_damage_is_named(tmp_path):
    """Cut at any place, or one byte changed anywhere: refused, or nothing is different."""
    memory, path = SuffixMemory(tokenizer=tokenizer_of(60)), tmp_path / "work.npz"
    memory.extend(random_texts(3, 40))
    memory.save(path)
    whole, kept = path.read_bytes(), texts_in(memory)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"work.npz' is damaged, or no memory at all \(.*build it again"):
            SuffixMemory.load(path)
    num_refused = 0
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = SuffixMemory.load(path)
        except InputError as error:
            assert "work.npz" in str(error)
            num_refused += 1
        else:  # a date, or other notes of the archive
            assert texts_in(found) == kept
    assert num_refused > len(whole) / 37 / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes_0": np.array([3, 9, 1], np.int32)}, "leads out of its texts"),
        ({"suffixes_0": np.array([2, 0, 3], np.int32)}, "leads out of its texts"),
        ({"suffixes_0": np.array([2, 0, -1], np.int32)}, "leads out of its texts"),
        ({"suffixes_0": np.array([2, 0], np.int32)}, "holds other arrays"),
        ({"suffixes_0": np.array([2, 0, 1], np.int64)}, "holds other arrays"),
        ({"kind": "a list"}, "is not a memory of `specdec memory build`, but 'a list'"),
        ({"version": 7}, "has format 7, and this specdec .* reads 1; build it again"),
    ],
)
def test_what_compiled_code_could_not_follow_is_refused(tmp_path, change, message):
    memory, path = SuffixMemory(tokenizer=tokenizer_of(60)), tmp_path / "work.npz"
    memory.add([5, 3])
    memory.save(path)
    arrays = dict(np.load(path))
    header = json.loads(arrays["header"].tobytes())
    header |= {name: value for name, value in change.items() if name in header}
    arrays |= {name: value for name, value in change.items() if name not in header}
    np.savez(path, **{**arrays, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    with pytest.raises(InputError, match=message):
        SuffixMemory.load(path)


def test_places_in_a_wrong_order_cost_speed_only(tmp_path):
    """Whoever made the file: compiled code ends, and every draft is a list of tokens."""
    memory = SuffixMemory(tokenizer=tokenizer_of(60))
    memory.extend(random_texts(20, 40))
    np.random.default_rng(0).shuffle(memory.segments[0].suffixes)
    memory.segments[0].codes[:] = np.roll(memory.segments[0].codes, 3)
    memory.segments[0].codes[-1] = 0
    memory.save(tmp_path / "work.npz")
    model, ids = tiny_llama(0), torch.tensor([[5, 6, 7, 5]])
    options = dict(max_new_tokens=30, eos_token_id=None)
    found = specdec.generate(model, ids, drafter=Suffix(SuffixMemory.load(tmp_path / "work.npz")), **options)
    assert torch.equal(found, specdec.generate(model, ids, **options))


def test_a_memory_of_another_tokenizer_is_refused(tmp_path):
    model, ids = tiny_llama(0), torch.tensor([[5, 6, 7]])
    for name, size in (("one", 61), ("other", 60)):
        model.save_pretrained(tmp_path / name)
        tokenizer_of(size).save_pretrained(tmp_path / name)
    one, other = (type(model).from_pretrained(tmp_path / name).eval() for name in ("one", "other"))
    memory = SuffixMemory()
    with pytest.raises(ConfigError, match="does not know whose token ids it holds; pass save"):
        memory.save(tmp_path / "work.npz")
    specdec.generate(one, ids, drafter=Suffix(memory), max_new_tokens=5)
    message = r"of another tokenizer: one \(61 tokens, \w+\), and the target's is other \(60 tokens, \w+\)"
    with pytest.raises(DrafterError, match=message):
        specdec.generate(other, ids, drafter=Suffix(memory), max_new_tokens=5)

    memory.save(tmp_path / "work.npz")
    with pytest.raises(DrafterError, match=message):
        specdec.generate(other, ids, drafter=f"suffix:memory={tmp_path / 'work.npz'}", max_new_tokens=5)
    with pytest.raises(DrafterError, match=r"work.npz' holds token ids of another tokenizer"):
        SuffixMemory.load(tmp_path / "work.npz", tokenizer=tokenizer_of(61, "b"))
    specdec.generate(one, ids, drafter=f"suffix:memory={tmp_path / 'work.npz'}", max_new_tokens=5)


def test_ids_beyond_the_targets_are_refused():
    memory = SuffixMemory()
    memory.add([5, 61, 4])
    with pytest.raises(DrafterError, match="holds token id 61, and the target knows 61 tokens"):
        specdec.generate(tiny_llama(0), torch.tensor([[5, 6]]), drafter=Suffix(memory), max_new_tokens=4)
