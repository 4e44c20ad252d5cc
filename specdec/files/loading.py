"""Checkpoints and prompt files from disk, for the command line. Errors name the file and the problem."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specdec.errors import ConfigError, DrafterError, InputError
from specdec.files.fingerprint import TokenizerPrint
from specdec.files.gguf import find_gguf, holds_gguf_alone, is_gguf, now_plain
from specdec.kept import kept_with

DTYPES = ("float32", "bfloat16", "float16", "float64")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
IGNORED_IN_FILES = ("_from_model_config", "_commit_hash", "transformers_version")  # only say where a file comes from
# The errors transformers raises for missing, damaged, foreign and mismatched files.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class Prompt:
    """place: where the text is in its file, for messages. id: the file's name for it, if any. chat: the messages of a
    conversation that the model is to answer, of which `text` is the last; None for a text that is continued."""

    text: str
    place: str
    id: str | int | None = None
    chat: tuple[dict[str, Any], ...] | None = None


def find_checkpoint(name: str, role: str) -> Path:
    """The folder of a checkpoint: `name` itself, or the cached snapshot of the Hugging Face repository `name`. Of GGUF
    checkpoints the file, see `find_gguf`.

    Nothing is downloaded. Raises InputError if there is no such folder or it holds no checkpoint.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, HFValidationError):  # not in the cache, or not a valid repository name
            raise InputError(
                f"{role} {name!r} is neither a folder nor a repository in the Hugging Face cache; pass the folder of a "
                "checkpoint, or run `hf download` on the repository first"
            ) from None
    if is_gguf(folder) or (folder.is_dir() and holds_gguf_alone(folder)):
        return find_gguf(folder, role)
    if not folder.is_dir():
        raise InputError(
            f"{role} {name!r} is a file; pass the folder of a checkpoint, the one with config.json, or a .gguf file"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{role} {name!r} is not a checkpoint: the folder has no config.json, and no .gguf file")
    return folder


def resolve_device(name: str) -> torch.device:
    """Raises ConfigError for a device that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} is not usable here ({reason}); pass --device cpu") from None
    return device


def load_model(folder: Path, role: str, device: torch.device, dtype: str | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    folder: of `find_checkpoint`. dtype: one of `DTYPES`; None means float32 on a CPU, and the stored dtype on other
        devices. Weights from GGUF are dequantised, by default to float32.
    Raises InputError for a checkpoint that does not load or lacks weights.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    wanted: Any = getattr(torch, dtype) if dtype else torch.float32 if device.type == "cpu" else "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **_place(folder),
            dtype=wanted,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except LOADING_ERRORS as error:
        raise InputError(f"{role} {str(folder)!r} does not load: {first_line(error)}") from error
    model, info = loaded
    if info["mismatched_keys"]:
        name, stored, expected = min(info["mismatched_keys"])
        raise InputError(
            f"{role} {str(folder)!r} holds {len(info['mismatched_keys'])} weights of other sizes than its config says, "
            f"for example {name}: {list(stored)} in the file, {list(expected)} in the model; is the config another's?"
        )
    if len(info["missing_keys"]) > len(model.state_dict()) / 2:
        raise InputError(
            f"{role} {str(folder)!r} holds a head, or another part, and no whole {type(model).__name__}: "
            f"{len(info['missing_keys'])} of its {len(model.state_dict())} weights are missing, for example "
            f"{min(info['missing_keys'])}; pass the folder of a whole model"
        )
    if info["missing_keys"]:
        example = min(info["missing_keys"])
        raise InputError(
            f"{role} {str(folder)!r} lacks {len(info['missing_keys'])} weights, for example {example}; "
            "they would be random, so download the checkpoint again"
        )
    return now_plain(model).to(device).eval() if is_gguf(folder) else model.to(device).eval()


def _place(folder: Path) -> dict[str, Any]:
    """Where transformers finds a checkpoint, as keywords of `from_pretrained`."""
    if is_gguf(folder):
        return {"pretrained_model_name_or_path": folder.parent, "gguf_file": folder.name}
    return {"pretrained_model_name_or_path": folder}


def load_tokenizer(folder: Path, role: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_place(folder), local_files_only=True)
        return tokenizer
    except LOADING_ERRORS as error:
        raise InputError(f"{role} {str(folder)!r} has no usable tokenizer: {first_line(error)}") from error


def tokenizer_print_of(model: PreTrainedModel) -> TokenizerPrint | None:
    """The tokenizer in the folder that a model was loaded from; None where there is none. Read once for a model."""

    def read() -> TokenizerPrint | None:
        try:
            folder = find_checkpoint(model.name_or_path, "target")
        except InputError:  # made in memory, or its files are gone
            return None
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
        return TokenizerPrint.of(load_tokenizer(folder, "target")) if has_tokenizer else None

    return kept_with(model, tokenizer_print_of, read, model.name_or_path)


def check_same_tokenizer(target: PreTrainedTokenizerBase, draft_folder: Path) -> None:
    """Raise DrafterError if the draft model's folder has a tokenizer with other tokens or other ids.

    A folder without a tokenizer passes, and so does a different padding token.
    """
    if not is_gguf(draft_folder) and not any((draft_folder / name).is_file() for name in TOKENIZER_FILES):
        return
    draft = load_tokenizer(draft_folder, "draft")
    padding = {target.pad_token, draft.pad_token}
    ours, theirs = target.get_vocab(), draft.get_vocab()
    differing = {token for token, _ in ours.items() ^ theirs.items()} - padding
    if not differing:
        return
    token = min(differing, key=lambda token: (ours.get(token, len(ours)), theirs.get(token, 0)))
    raise DrafterError(
        f"the draft model's tokenizer is different: {len(differing)} tokens differ; for example, {token!r} is "
        f"{ours.get(token, 'missing')} in the target's and {theirs.get(token, 'missing')} in the draft's; "
        "pass a draft model that was trained with the target's tokenizer, or --drafter prompt_lookup"
    )


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a .txt (one per line), .json (list of strings) or .jsonl file (`prompt`, the first of `turns`, or
    `messages`, a conversation).

    limit: read only the first `limit` prompts. Raises InputError that names the file and the line or item.
    """
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"prompt file {str(path)!r} is not one of {', '.join(readers)}; convert it to one of them")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"prompt file {str(path)!r} cannot be read: {error.strerror or error}") from None
    prompts = reader(path, content)
    if not prompts:
        raise InputError(f"prompt file {str(path)!r} is empty; it must hold at least one prompt")
    for prompt in prompts:
        if not prompt.text:
            raise InputError(f"{prompt.place} is an empty prompt; remove it or give it at least one token")
    return prompts[:limit]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], is_chat: bool = False, system: str | None = None
) -> list[Tensor]:
    """[length] int64 token ids each, never truncated, with the special tokens that the tokenizer adds by itself.

    Conversations go into the tokenizer's chat template, up to where the answer begins.

    is_chat: each text is a user's message too. system: the message before every conversation.
    Raises ConfigError where a template is needed and there is none, or where it does not take these messages.
    """
    if system is not None and not is_chat and all(prompt.chat is None for prompt in prompts):
        raise ConfigError("--system is a message before a conversation; add --chat, or pass prompts with `messages`")
    encoded = []
    for prompt in prompts:
        if is_chat or prompt.chat is not None:
            messages = prompt.chat or ({"role": "user", "content": prompt.text},)
            encoded.append(encode_chat(tokenizer, with_system(messages, system, prompt.place), prompt.place))
            continue
        ids = tokenizer(prompt.text, truncation=False)["input_ids"]
        if not ids:
            raise InputError(f"{prompt.place} has no tokens ({prompt.text[:40]!r}); remove it or add text")
        encoded.append(torch.tensor(ids, dtype=torch.long))
    return encoded


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], place: str) -> Tensor:
    """A conversation in the tokenizer's chat template, up to where the answer begins: [length] int64."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "the target's tokenizer has no chat template; leave --chat out, or pass an "
            "instruct model (`messages` need one)"
        )
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"{place}: the chat template does not take these messages: {first_line(error)}") from error
    # The template writes the special tokens itself.
    ids = tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def with_system(messages: Sequence[dict[str, Any]], system: str | None, place: str) -> list[dict[str, Any]]:
    """The messages after a system prompt. Raises ConfigError if they begin with one of their own."""
    if system is None:
        return list(messages)
    if messages[0]["role"] == "system":
        raise ConfigError(f"{place} has a system message of its own; leave --system out, or remove that message")
    return [{"role": "system", "content": system}, *messages]


def read_generation_config(path: Path) -> GenerationConfig:
    """Read a generation_config.json. Raises InputError for another kind of file, or for unknown options."""
    items = read_json(path, "generation config")
    if not isinstance(items, dict):
        raise InputError(f"generation config {str(path)!r} holds a JSON {_kind(items)}; it must be an object")
    known = vars(GenerationConfig())
    unknown = [name for name in items if name not in known and name not in IGNORED_IN_FILES]
    if unknown:
        raise InputError(f"generation config {str(path)!r}: {unknown[0]!r} is not an option of transformers; remove it")
    try:
        return GenerationConfig.from_dict(items)
    except LOADING_ERRORS as error:
        raise InputError(f"generation config {str(path)!r} is not usable: {first_line(error)}") from error


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file. Raises InputError that names the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from None
    whole = f"{what} {str(path)!r}"
    return _parse(_decode(content, whole), whole)


def read_json_lines(path: Path, what: str) -> list[tuple[Any, str]]:
    """Each line's JSON and its place, for messages. what: the kind of file, for the same messages.

    Raises InputError that names the line, or for a file that cannot be read or holds nothing.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from None
    items = [(_parse(text, place), place) for text, place in _lines(path, content, what)]
    if not items:
        raise InputError(f"{what} {str(path)!r} is empty; it must hold at least one line of JSON")
    return items


def _read_txt(path: Path, content: bytes) -> list[Prompt]:
    return [Prompt(text, place) for text, place in _lines(path, content)]


def _read_json(path: Path, content: bytes) -> list[Prompt]:
    if not content.strip():
        return []
    whole = f"prompt file {str(path)!r}"
    items = _parse(_decode(content, whole), whole)
    if not isinstance(items, list):
        raise InputError(f"{whole} holds a JSON {_kind(items)}; it must be a list of strings")
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise InputError(f"{whole}, item {index} (from 0) is a JSON {_kind(item)}; it must be a string")
    return [Prompt(item, f"{whole}, item {index} (from 0)") for index, item in enumerate(items)]


def _read_jsonl(path: Path, content: bytes) -> list[Prompt]:
    items = [(_parse(text, place), place) for text, place in _lines(path, content)]
    return [_prompt_of(item, place) for item, place in items]


def _id_of(item: dict) -> str | int | None:
    """Spec-Bench's `question_id`, or `id`."""
    found = item.get("question_id", item.get("id"))
    return found if isinstance(found, str | int) else None


def _prompt_of(item: Any, place: str) -> Prompt:
    """`prompt`, the first turn of Spec-Bench's `turns`, or a conversation in `messages`."""
    if not isinstance(item, dict):
        raise InputError(f"{place} is a JSON {_kind(item)}; it must be an object with `prompt`, `turns` or `messages`")
    given = [name for name in ("prompt", "messages") if name in item]
    if len(given) > 1:
        raise InputError(f"{place} has both `prompt` and `messages`; remove one of them")
    if "messages" in item:
        messages = chat_of(item["messages"], place)
        return Prompt(messages[-1]["content"], place, _id_of(item), messages)
    turns = item.get("turns")
    text = item["prompt"] if "prompt" in item else turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(text, str):
        raise InputError(f"{place} has neither a string `prompt`, nor lists `turns` (of strings) or `messages`")
    return Prompt(text, place, _id_of(item))


def chat_of(messages: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Checks a conversation: objects with `role` and a text `content`, which the model is to answer."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place} has `messages` that are not a list of at least one message")
    for number, message in enumerate(messages, 1):
        is_whole = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_whole:
            raise InputError(f"{place}, message {number} needs a string `role` and a string `content`")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{place} ends with the assistant's message; end with the one that it is to answer")
    return tuple(messages)


def _lines(path: Path, content: bytes, what: str = "prompt file") -> list[tuple[str, str]]:
    """Each line and its place. Only line feeds end lines, and blank lines at the end of the file do not count."""
    lines = content.rstrip(b"\r\n").split(b"\n") if content.strip(b"\r\n") else []
    places = [f"{what} {str(path)!r}, line {number}" for number in range(1, len(lines) + 1)]
    return [(_decode(line.removesuffix(b"\r"), place), place) for line, place in zip(lines, places, strict=True)]


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"{place} is not JSON: {error.msg} at {where}column {error.colno}") from None


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def first_line(error: BaseException) -> str:
    """The message of an error, short enough for one line; some errors say the main thing on the second line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
