"""Tokens of the Python source found on this machine (see python_corpus.py), packed for `specdec train ... --text`.

    python benchmarks/pack_corpus.py --tokenizer specdec/assets/demo_pair/target --out demo_tokens.npy

Only files of distributions that are not held out are packed: the pairs' `prompts.json` come from the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from python_corpus import encode_stream, load_corpus
from transformers import AutoTokenizer

from specdec.drafters.training.data import save_stream


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack Python source as tokens.")
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True, help="folders with a tokenizer")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="a .npy file for each")
    parser.add_argument("--max-bytes", type=int, default=2_000_000_000, help="of source, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.tokenizer) != len(options.out):
        parser.error(f"{len(options.tokenizer)} tokenizers, but {len(options.out)} files in --out")
    texts = [document.text for document in load_corpus(options.max_bytes, options.seed).training]
    for folder, path in zip(options.tokenizer, options.out, strict=True):
        tokens = encode_stream(AutoTokenizer.from_pretrained(folder), texts, "cpu").numpy()
        save_stream(path, tokens)
        print(f"{path}: {len(texts)} files, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
