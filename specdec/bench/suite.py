"""The text to decode: questions of one or several turns, as prompts in token ids with the reference's answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.check.oracle import run_plain
from specdec.errors import ConfigError, InputError
from specdec.files.loading import Prompt, encode_chat, encode_prompts, read_json_lines, read_prompts, with_system

OnPrompt = Callable[[str, int], None]


@dataclass(frozen=True)
class Question:
    """turns: the user's messages, in order. is_chat: whether the model's chat template applies, if it has one; a plain
    prompt is continued as it stands. place: where the question is in its file, for messages. before: the messages of a
    conversation before the first turn. needs_template: a model without a template is refused."""

    id: str | int
    category: str | None
    turns: tuple[str, ...]
    is_chat: bool
    place: str
    before: tuple[dict[str, Any], ...] = ()
    needs_template: bool = False


@dataclass(frozen=True)
class Asked:
    """Which turn of which question one prompt is."""

    question_id: str | int
    category: str | None
    turn: int


@dataclass(frozen=True)
class Suite:
    """prompts: [length] int64 token ids each, all first turns, then all second ones. asked: one per prompt. reference:
    the output of transformers' plain greedy decoding of that prompt alone. num_shortened: prompts cut at their front.
    """

    name: str
    prompts: list[Tensor]
    asked: list[Asked]
    reference: list[list[int]]
    num_shortened: int = 0

    @property
    def digest(self) -> str:
        """Identifies the prompts: other prompts have another digest."""
        return hashlib.sha256(str([prompt.tolist() for prompt in self.prompts]).encode()).hexdigest()[:16]

    @property
    def categories(self) -> list[str]:
        """In the order of their first question; empty if the questions have none."""
        return list(dict.fromkeys(asked.category for asked in self.asked if asked.category is not None))


def read_questions(
    path: Path, limit: int | None = None, is_chat: bool = False, system: str | None = None
) -> list[Question]:
    """Spec-Bench's JSONL (`question_id`, `category`, `turns`), or any prompt file of `specdec generate`.

    is_chat: plain prompts are a user's messages. system: the message before every conversation.
    Raises InputError that names the line, and ConfigError for a system message where there is no conversation.
    """
    questions = _read_questions(path, limit)
    if is_chat:
        questions = [replace(question, is_chat=True, needs_template=True) for question in questions]
    if system is None:
        return questions
    if not any(question.is_chat for question in questions):
        raise ConfigError("--system is a message before a conversation; add --chat, or pass prompts with `messages`")
    return [_after_system(question, system) if question.is_chat else question for question in questions]


def _after_system(question: Question, system: str) -> Question:
    messages = with_system([*question.before, {"role": "user", "content": question.turns[0]}], system, question.place)
    return replace(question, before=tuple(messages[:-1]), needs_template=True)


def _read_questions(path: Path, limit: int | None) -> list[Question]:
    if path.suffix.lower() == ".jsonl":
        items = read_json_lines(path, "prompt file")
        if any(isinstance(item, dict) and "turns" in item for item, _ in items):
            questions = [question_of(item, place) for item, place in items]
            check_ids(questions)
            return questions[:limit]
    prompts = read_prompts(path, limit)
    return [plain_question(prompt, index) for index, prompt in enumerate(prompts)]


def plain_question(prompt: Prompt, index: int) -> Question:
    name, chat = index if prompt.id is None else prompt.id, prompt.chat or ()
    if chat and chat[-1]["role"] != "user":
        raise InputError(f"{prompt.place} ends with a message of {chat[-1]['role']!r}; end with the user's")
    return Question(name, None, (prompt.text,), bool(chat), prompt.place, chat[:-1], bool(chat))


def question_of(item: Any, place: str) -> Question:
    turns = item.get("turns") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise InputError(f"{place} has no list of texts `turns`; Spec-Bench's lines have question_id, category, turns")
    category, name = item.get("category"), item.get("question_id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise InputError(f"{place} has question_id {name!r}; give it a number or a text")
    if not isinstance(category, str | None):
        raise InputError(f"{place} has category {category!r}; give it a text, or leave it out")
    return Question(name, category, tuple(turns), True, place)


def check_ids(questions: Sequence[Question]) -> None:
    seen: dict[str | int, str] = {}
    for question in questions:
        if question.id in seen:
            raise InputError(f"{question.place} repeats question_id {question.id!r} of {seen[question.id]}")
        seen[question.id] = question.place


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    max_prompt_tokens: int | None = None,
    on_progress: OnPrompt | None = None,
) -> Suite:
    """Decode all turns plainly, one prompt at a time; a turn's prompt holds the model's answers to the turns before it.

    Every method is then given the same prompts. A method whose outputs are equal would have written these answers
    itself, so it decodes its own conversation; a method of ours whose outputs differ is not timed. Call this within
    `greedy_settings`. max_prompt_tokens: longer prompts keep only their last max_prompt_tokens.
    """
    suite = Suite("prompts", [], [], [])
    said: dict[str | int, list[str]] = {question.id: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if turn < len(question.turns)]
        prompts = [encode(tokenizer, question, said[question.id]) for question in asked]
        kept = [prompt if max_prompt_tokens is None else prompt[-max_prompt_tokens:] for prompt in prompts]
        check_room(model, asked, kept, max_new_tokens)
        answers = run_plain(model, kept, max_new_tokens, on_progress).outputs
        for question, answer in zip(asked, answers, strict=True):
            said[question.id].append(tokenizer.decode(answer, skip_special_tokens=True))
        suite = replace(
            suite,
            prompts=suite.prompts + kept,
            asked=suite.asked + [Asked(question.id, question.category, turn) for question in asked],
            reference=suite.reference + answers,
            num_shortened=suite.num_shortened + sum(len(a) < len(b) for a, b in zip(kept, prompts, strict=True)),
        )
    return suite


def encode(tokenizer: PreTrainedTokenizerBase, question: Question, answers: Sequence[str]) -> Tensor:
    """The prompt of the turn after `answers`: by the chat template, or turns and answers joined by newlines."""
    turns = question.turns[: len(answers) + 1]
    if question.needs_template or (question.is_chat and tokenizer.chat_template):
        messages = [*question.before, {"role": "user", "content": turns[0]}]
        for answer, turn in zip(answers, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        return encode_chat(tokenizer, messages, question.place)
    pieces = [turns[0]]
    for answer, turn in zip(answers, turns[1:], strict=True):
        pieces += [answer, turn]
    return encode_prompts(tokenizer, [Prompt("\n".join(pieces), question.place)])[0]


def check_room(
    model: PreTrainedModel, questions: Sequence[Question], prompts: Sequence[Tensor], max_new_tokens: int
) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for question, prompt in zip(questions, prompts, strict=True):
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"{question.place} has {len(prompt)} tokens; with {max_new_tokens} new ones the model's {limit} "
                "positions are not enough; pass --max-prompt-tokens to keep the last tokens of longer prompts"
            )


def of_length(suite: Suite, num_tokens: int, model: PreTrainedModel, max_new_tokens: int) -> Suite:
    """The same number of prompts of `num_tokens` each: a prompt preceded by the suite's others, cut at the front."""
    prompts = []
    for index in range(len(suite.prompts)):
        ids = suite.prompts[index]
        other = index
        while len(ids) < num_tokens:
            other = (other - 1) % len(suite.prompts)
            ids = torch.cat([suite.prompts[other], ids])
        prompts.append(ids[-num_tokens:])
    reference = run_plain(model, prompts, max_new_tokens).outputs
    return Suite(f"context {num_tokens}", prompts, suite.asked, reference)
