"""Tiny checkpoints on disk, with a tokenizer of words: "w3 w4" is tokens 3 and 4."""

from __future__ import annotations

from pathlib import Path

from tiny import VOCAB, tiny_llama
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PROMPTS = [
    "w5 w6 w7",
    "w11",
    "w40 w3 w9 w22 w31",
    "w17 w17",
    "w8 w50 w4",
    "w29 w30",
    "w12 w13 w14 w15",
    "w60",
    "w33 w5",
]
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]  # as in tiny_llama: 0, 1, 2


def word_tokenizer(vocab_size: int = VOCAB, first: int = 0, **options) -> PreTrainedTokenizerFast:
    """first: by how much ids are shifted; it makes another tokenizer."""
    tokens = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(len(SPECIAL_TOKENS), vocab_size))]
    vocab = {token: (index + first) % vocab_size for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = Fuse()
    defaults = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **options})


def save_checkpoint(folder: Path, model=None, tokenizer=None, **options) -> Path:
    """`options` go to `tiny_llama`; tokenizer=False leaves it out."""
    (model or tiny_llama(**options)).save_pretrained(folder)
    if tokenizer is not False:
        (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder
