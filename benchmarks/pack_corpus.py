"""Tokens of the Python source found on this machine (see python_corpus.py), packed for `specdec train ... --text`.

    python benchmarks/pack_corpus.py --tokenizer specdec/assets/demo_pair/target --out demo_tokens.npy

Only files of distributions that are not held out are packed: the demo pair's `prompts.json` come from the held-out
ones. `--without prompts.json` also leaves out distributions that contain one of these prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from python_corpus import Document, encode_stream, load_corpus
from transformers import AutoTokenizer

from specdec.drafters.training.data import save_stream
from specdec.files.loading import read_prompts


def without(documents: Sequence[Document], prompts: Sequence[str]) -> list[Document]:
    """The documents of distributions in which no prompt occurs."""
    found = {document.source for document in documents if any(prompt in document.text for prompt in prompts)}
    print(f"left out, because prompts occur in them: {', '.join(sorted(found)) or 'none'}")
    return [document for document in documents if document.source not in found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack Python source as tokens.")
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True, help="folders with a tokenizer")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="a .npy file for each")
    parser.add_argument("--max-bytes", type=int, default=2_000_000_000, help="of source, chosen by the seed")
    parser.add_argument("--without", type=Path, nargs="*", default=(), help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.tokenizer) != len(options.out):
        parser.error(f"{len(options.tokenizer)} tokenizers, but {len(options.out)} files in --out")
    documents = load_corpus(options.max_bytes, options.seed).training
    if options.without:
        documents = without(documents, [prompt.text for path in options.without for prompt in read_prompts(path)])
    texts = [document.text for document in documents]
    for folder, path in zip(options.tokenizer, options.out, strict=True):
        tokens = encode_stream(AutoTokenizer.from_pretrained(folder), texts, "cpu").numpy()
        save_stream(path, tokens)
        print(f"{path}: {len(texts)} files, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
