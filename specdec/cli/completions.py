"""Decodes prompts in batches and prints each completion as soon as it is done."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import typer
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from specdec.api.generate import generate
from specdec.batch.report import StepReport
from specdec.check.equivalence import check_prompts
from specdec.check.padding import left_pad
from specdec.check.progress import now, tell
from specdec.check.settings import greedy_settings
from specdec.cli.common import Models, check_temperature, say_ignored, stage_bars
from specdec.drafter import NoDrafts
from specdec.engine.metrics import Speculation
from specdec.errors import ConfigError
from specdec.files.loading import Prompt, read_generation_config
from specdec.options.generation import whole_number
from specdec.options.speculation import speculative_config
from specdec.verify.lossy import GREEDY, SAMPLED, Lossy, verification_named

DEFAULT_NEW_TOKENS = 128


@dataclass
class PromptCompletion:
    """The continuation of one prompt so far, and how much of it was drafted."""

    index: int
    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    speculation: Speculation = field(default_factory=Speculation)

    def add(self, report: StepReport, slot: int) -> None:
        """Add one row of a step."""
        self.token_ids += report.token_ids[slot, : report.num_committed[slot]].tolist()
        arrays = {f.name: getattr(report, f.name) for f in fields(report) if f.name != "is_prefill"}
        row = {name: array[slot : slot + 1] for name, array in arrays.items() if array is not None}
        self.speculation.add(replace(report, **row))

    def print(self, tokenizer: PreTrainedTokenizerBase, as_json: bool) -> None:
        text = tokenizer.decode(self.token_ids, skip_special_tokens=True)
        if not as_json:
            typer.echo(f"--- prompt {self.index} ---\n{text}")
            return
        counts = self.speculation.to_dict()
        del counts["num_target_calls"], counts["num_draft_calls"]  # these count for the whole batch
        named = {} if self.prompt.id is None else {"id": self.prompt.id}
        own: dict[str, Any] = {"index": self.index, **named, "prompt": self.prompt.text, "completion": text}
        typer.echo(json.dumps({**own, "completion_ids": self.token_ids, **counts}))


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode, if not plain greedy. config: read from a file. sampling: options that imply do_sample."""

    config: GenerationConfig | None = None
    sampling: tuple[tuple[str, Any], ...] = ()
    seed: int | None = None
    verification: str | Lossy = "token"

    @staticmethod
    def of(path: Path | None, sampling: dict[str, Any], seed: int | None, verification: str) -> DecodingOptions:
        given = tuple((name, value) for name, value in sampling.items() if value is not None)
        config = None if path is None else read_generation_config(path)
        check_temperature(sampling.get("temperature"), "leave it out")
        found = DecodingOptions(config, given, seed, verification_named(verification))
        rule = found.verification
        is_of_samples = rule == "block" or (isinstance(rule, SAMPLED) and not isinstance(rule, GREEDY))
        for name, is_given in ((f"--seed {seed}", seed is not None), (f"--verification {verification}", is_of_samples)):
            if is_given and not found.samples:
                raise ConfigError(f"{name} applies only to sampling; add --temperature, --top-k or --top-p")
        if found.samples and isinstance(rule, GREEDY) and not isinstance(rule, SAMPLED):
            raise ConfigError(f"--verification {verification} is for greedy decoding; remove the sampling options")
        return found

    @property
    def samples(self) -> bool:
        return bool(self.sampling) or (self.config is not None and bool(self.config.do_sample))

    def statistics(self) -> Speculation:
        """Counts of zero, with the name of the verification rule."""
        is_lossy = not isinstance(self.verification, str)
        name = str(self.verification) if self.samples or is_lossy else "greedy"
        return Speculation(verification=name, is_lossless=not is_lossy)

    def limit(self, max_new_tokens: int | None, longest: int) -> tuple[dict[str, Any], int]:
        """Length keywords for `generate`, and the most tokens that may follow the longest prompt.

        max_new_tokens: from the command line; without it the file's lengths apply.
        """
        if max_new_tokens is None and self.config is not None:
            if self.config.max_new_tokens is not None:
                return {}, self.config.max_new_tokens
            if self.config.max_length is not None:
                room = whole_number("max_length", self.config.max_length) - longest
                if room < 1:
                    raise ConfigError(
                        f"max_length={self.config.max_length} of the generation config leaves no room after a prompt "
                        f"of {longest} tokens; raise it, or pass --max-new-tokens"
                    )
                return {}, room
        number = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        return {"max_new_tokens": number}, number

    def options(self, rows: range) -> dict[str, Any]:
        """Keywords of `generate` for some of the prompts, without lengths."""
        found = {"generation_config": self.config, **dict(self.sampling)}
        if self.sampling:
            found["do_sample"] = True
            if self.config is None:
                found.setdefault("top_k", 0)  # not transformers' default of 50, which was not requested
        if self.seed is not None:
            found["seed"] = [(self.seed << 32) + row for row in rows]
        return {**found, "verification": self.verification}


def print_completions(
    models: Models,
    prompts: list[Prompt],
    batch_size: int,
    num_speculative_tokens: int | None,
    max_new_tokens: int | None,
    as_json: bool,
    layout: str = "ragged",
    length_policy: str | None = None,
    decoding: DecodingOptions | None = None,
    exact: bool = True,
) -> None:
    """Stream the text of a single prompt, or print several as they finish; a summary goes to stderr."""
    model, token_ids, decoding = models.target, models.encode(prompts), decoding or DecodingOptions()
    choice: dict[str, Any] = {"layout": layout, "length_policy": length_policy}
    speculation = speculative_config(models.drafter, num_speculative_tokens, decoding.config, target=model, **choice)
    lengths, most = decoding.limit(max_new_tokens, max(map(len, token_ids)))
    check_prompts(model, token_ids, speculation, batch_size, most)
    streams = len(prompts) == 1 and not as_json
    streamer = TextStreamer(models.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    total = decoding.statistics()
    # On a terminal the completions themselves show the progress.
    bars = nullcontext() if streams or sys.stdout.isatty() else stage_bars({"speculative": len(prompts)})
    with greedy_settings(model) as ignored, bars as on_progress:
        say_ignored(ignored)
        begin = now(model)
        for first in range(0, len(prompts), batch_size):
            batch = range(first, min(first + batch_size, len(prompts)))
            completions = [
                PromptCompletion(index, prompts[index], speculation=decoding.statistics()) for index in batch
            ]

            def on_commit(report: StepReport, completions: list[PromptCompletion] = completions) -> None:
                total.add(report)
                for slot, row in enumerate(report.row_ids):
                    completions[row].add(report, slot)
                    if report.finished[slot] and not streams:
                        completions[row].print(models.tokenizer, as_json)
                tell(on_progress, "speculative", int(report.finished.sum()))

            ids, mask = left_pad([token_ids[index] for index in batch], 0, model.device)
            generate(
                model,
                ids,
                mask,
                drafter=models.drafter,
                num_speculative_tokens=num_speculative_tokens,
                **choice,
                **lengths,
                streamer=streamer,
                exact=exact,
                on_commit=on_commit,
                **decoding.options(batch),
            )
        print_summary(total, now(model) - begin, not isinstance(speculation.drafter, NoDrafts))


def print_summary(total: Speculation, seconds: float, drafted: bool) -> None:
    acceptance = f", mean acceptance length {total.mean_acceptance_length:.2f}" if drafted else ""
    if not total.is_lossless:
        acceptance += f", LOSSY: {total.verification}"
    rate = total.num_new_tokens / seconds
    typer.echo(f"{total.num_new_tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s{acceptance}", err=True)
