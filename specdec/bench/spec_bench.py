"""Spec-Bench's answer files: one line per question, as its own evaluation scripts read them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from transformers import PreTrainedTokenizerBase

from specdec.bench.measure import Result
from specdec.bench.suite import Suite


def write_answers(
    folder: Path, suite: Suite, results: Sequence[Result], tokenizer: PreTrainedTokenizerBase
) -> list[Path]:
    """A file for each timed method.

    wall_time of a turn is that of the call that decoded it: its median over repeats if a call holds one prompt, and the
    row's own time in the observed run in larger batches. accept_lengths has an entry for each target forward, including
    the one over the prompt, so it sums to new_tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        if result.is_timed and result.observed is not None:
            path = folder / f"{file_name(result)}.jsonl"
            lines = [json.dumps(line, ensure_ascii=False) for line in answers(suite, result, tokenizer)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            paths.append(path)
    return paths


def file_name(result: Result) -> str:
    return re.sub(r"[^\w.=]+", "-", result.method.label).strip("-")


def answers(suite: Suite, result: Result, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    assert result.observed is not None
    walls = [row.last_token for row in result.observed.rows]
    if result.method.batch_size == 1:
        walls = [median(repeat[index] for repeat in result.seconds) for index in range(len(suite.prompts))]
    found: dict[str | int, dict] = {}
    for index, asked in enumerate(suite.asked):
        line = found.setdefault(asked.question_id, new_line(asked.question_id, asked.category, result.method.label))
        choice, lengths = line["choices"][0], result.observed.rows[index].accept_lengths
        choice["turns"].append(tokenizer.decode(result.outputs[index], skip_special_tokens=True))
        choice["decoding_steps"].append(len(lengths))
        choice["new_tokens"].append(len(result.outputs[index]))
        choice["wall_time"].append(walls[index])
        choice["accept_lengths"] += lengths
    return list(found.values())


def new_line(question_id: str | int, category: str | None, model_id: str) -> dict:
    choice: dict = {"index": 0, "turns": [], "decoding_steps": [], "new_tokens": [], "wall_time": []}
    choice["accept_lengths"] = []
    return {
        "question_id": question_id,
        "category": category,
        "answer_id": f"{model_id}/{question_id}",
        "model_id": model_id,
        "choices": [choice],
        "tstamp": time.time(),
    }
