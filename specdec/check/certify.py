"""The referee of other engines: are these completions what the target's plain greedy decoding writes?

Nothing is generated. One teacher-forced pass of the target over prompt and completion says at every position which
token the target would have written after exactly that text. A row is equal if it holds that token at every position and
ends where greedy decoding ends. Where it holds another token, the margin is computed in float64. Rounding explains a
margin within a few times its usual effect on margins in the target's own dtype, which is measured on the positions of
the rows in doubt: such a difference is a tie, any other a bug. Each position is judged after the engine's own text, so
the text after a tie is judged as strictly as the text before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.check.outputs import OutputRow
from specdec.check.progress import now
from specdec.check.referee import name_of, precise_copy
from specdec.check.settings import ends_of, greedy_settings
from specdec.check.teacher_forcing import pieces
from specdec.errors import ConfigError, InputError, NumericalError
from specdec.files.environment import versions
from specdec.network.base import evaluating, num_embeddings_of
from specdec.network.refusals import check_model

EQUAL, TIE, BUG = "equal", "tie", "bug"
# A tie's margin is at most this many standard deviations of what rounding does to a margin. An engine's tie beyond it
# is one in 50 000 for errors that are normal; at this place errors may be larger than elsewhere, so the error measured
# here, times OWN_ERRORS, is allowed too.
TIE_SIGMAS, OWN_ERRORS = 4, 2
# The least error of a margin: of its two logits, half a unit in the last place each, on either side.
ROUNDINGS = 2
TEXT_ROUNDS = 16  # rereadings of a text whose tokens are not those that the tokenizer makes of it

OnRows = Callable[[str, int], None]


@dataclass(frozen=True)
class Finding:
    """One place where a row is not what plain greedy decoding writes.

    position: 0-based, among the completion's tokens. reason: "token" (another token than the target's), "ends_early",
    "too_long" (beyond max_new_tokens) or "behind_end" (tokens after an end of sequence). expected_token_id: the
    target's own, None where nothing may stand; actual_token_id: None where the completion has ended. margin: the
    target's largest logit minus that of the actual token, limit: up to which rounding explains it; both None where no
    logits decide.
    """

    position: int
    kind: str
    reason: str
    expected_token_id: int | None
    actual_token_id: int | None
    margin: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class RowVerdict:
    """kind: equal, tie or bug. finding: the first bug, else the first tie. num_ties: of the whole row."""

    index: int
    place: str
    kind: str
    num_tokens: int
    finding: Finding | None
    num_ties: int


@dataclass(frozen=True)
class Certificate:
    """What `certify` found. rounding: the standard deviation of what rounding does to a margin, None if nothing was in
    doubt. seconds: of all passes. ignored_settings: of the model's generation config, which greedy decoding ignores."""

    rows: list[RowVerdict]
    max_new_tokens: int
    rounding: float | None
    margin_dtype: str | None
    margin_note: str
    dtype: str
    device: str
    seconds: float
    ignored_settings: dict[str, Any] = field(default_factory=dict)

    def count(self, kind: str) -> int:
        return sum(row.kind == kind for row in self.rows)

    @property
    def certified(self) -> bool:
        """Whether every row is equal, or differs by ties only."""
        return not self.count(BUG)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the versions that produced it."""
        counts = {f"num_{kind}": self.count(kind) for kind in (EQUAL, TIE, BUG)}
        return {"certified": self.certified, **counts, "num_rows": len(self.rows), **asdict(self),
                "tie_sigmas": TIE_SIGMAS, "versions": versions()}  # fmt: skip


class Margin(NamedTuple):
    """size: the target's largest logit minus that of the actual token. limit: up to this size it is a tie."""

    size: float
    limit: float


@dataclass(frozen=True)
class Margins:
    """of: by row and position, of all places in doubt. rounding, dtype, note: see `Certificate`."""

    of: dict[tuple[int, int], Margin]
    rounding: float | None = None
    dtype: str | None = None
    note: str = ""


def certify(
    model: PreTrainedModel,
    rows: Sequence[OutputRow],
    max_new_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_progress: OnRows | None = None,
) -> Certificate:
    """Judge each row against plain greedy decoding by `model`, in the model's own dtype.

    max_new_tokens: what the engine was asked for; by default the longest row's. tokenizer: needed for rows with text.

    Raises SpecDecError before any work if a row cannot be judged, NumericalError if the model's logits are NaN.
    """
    check_model(model)
    if not rows:
        raise InputError("there are no rows to certify; pass at least one")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if tokenizer is None and any(row.text is not None for row in rows):
        raise InputError("rows with text need the target's tokenizer; pass tokenizer=")

    vocab_size = num_embeddings_of(model)
    for row in rows:
        wrong = next((t for t in row.prompt_ids + row.completion_ids if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise InputError(f"{row.place} holds {wrong}, outside the target's vocabulary 0..{vocab_size - 1}")

    rows = list(rows)
    begin = now(model)
    with greedy_settings(model) as ignored, evaluating(model):
        ends = set(ends_of(model))
        predicted = target_tokens(model, rows, on_progress)
        if tokenizer is not None:
            reread_texts(model, rows, predicted, tokenizer)

        limit = max_new_tokens or max(max(len(row.completion_ids) for row in rows), 1)
        found = [shape_faults(row, ids, ends, limit) for row, ids in zip(rows, predicted, strict=True)]
        doubts = {index: places for index, row in enumerate(rows) if (places := doubtful(row, predicted[index], ends))}
        margins = judge(model, rows, predicted, doubts)

    for (index, position), margin in margins.of.items():
        kind = TIE if margin.size <= margin.limit else BUG
        expected, actual = int(predicted[index][position]), rows[index].completion_ids[position]
        found[index].append(Finding(position, kind, "token", expected, actual, margin.size, margin.limit))
    verdicts = [row_verdict(index, row, found[index]) for index, row in enumerate(rows)]

    return Certificate(
        rows=verdicts,
        max_new_tokens=limit,
        rounding=margins.rounding,
        margin_dtype=margins.dtype,
        margin_note=margins.note,
        dtype=name_of(model.dtype),
        device=str(model.device),
        seconds=now(model) - begin,
        ignored_settings=ignored,
    )


def row_verdict(index: int, row: OutputRow, findings: list[Finding]) -> RowVerdict:
    findings = sorted(findings, key=lambda finding: finding.position)
    bugs = [finding for finding in findings if finding.kind == BUG]
    first = next(iter(bugs or findings), None)
    kind = EQUAL if first is None else first.kind
    return RowVerdict(index, row.place, kind, len(row.completion_ids), first, len(findings) - len(bugs))


def target_tokens(model: PreTrainedModel, rows: Sequence[OutputRow], on_progress: OnRows | None) -> list[Tensor]:
    """The target's own token at each position of each completion and after it, [completion + 1] int64 each."""
    sequences, starts = [row.prompt_ids + row.completion_ids for row in rows], [len(row.prompt_ids) for row in rows]
    tokens = [torch.full((len(row.completion_ids) + 1,), -1) for row in rows]
    for piece in pieces(model, sequences, starts):
        best, bad = piece.logits.argmax(-1).cpu(), piece.logits.isnan().any(-1).cpu()
        for slot, index in enumerate(piece.indices):
            own, place = overlap(piece.first_column, best.shape[1], starts[index], len(sequences[index]))
            tokens[index][place] = best[slot, own]
            if bad[slot, own].any():
                raise NumericalError(f"the target's logits are NaN in {rows[index].place}; check the weights and dtype")
            if on_progress is not None and own.stop > own.start and place.stop == len(tokens[index]):
                on_progress("certifying", 1)
    return tokens


def overlap(first_column: int, width: int, start: int, length: int) -> tuple[slice, slice]:
    """Which of a piece's columns predict a sequence's completion or its end, and which positions these are.

    >>> overlap(4, 10, 6, 9)
    (slice(1, 5, None), slice(0, 4, None))
    """
    begin, end = max(first_column, start - 1), min(first_column + width, length)
    end = max(begin, end)
    return slice(begin - first_column, end - first_column), slice(begin - start + 1, end - start + 1)


def judged_length(row: OutputRow, ends: set[int]) -> int:
    """Tokens up to and with the first end of sequence."""
    return next((i + 1 for i, token in enumerate(row.completion_ids) if token in ends), len(row.completion_ids))


def shape_faults(row: OutputRow, predicted: Tensor, ends: set[int], max_new_tokens: int) -> list[Finding]:
    """Bugs that no logits are needed for: tokens after the end, too many, too few."""
    ids, end = row.completion_ids, judged_length(row, ends)
    ended = end > 0 and ids[end - 1] in ends
    if ended and end < len(ids):
        return [Finding(end, BUG, "behind_end", None, ids[end])]
    if len(ids) > max_new_tokens:
        return [Finding(max_new_tokens, BUG, "too_long", None, ids[max_new_tokens])]
    own = int(predicted[len(ids)])
    # A text shows no end of sequence; there the target's own token must be one.
    if not ended and len(ids) < max_new_tokens and not (row.text is not None and own in ends):
        return [Finding(len(ids), BUG, "ends_early", own, None)]
    return []


def doubtful(row: OutputRow, predicted: Tensor, ends: set[int]) -> list[int]:
    """Positions where another token stands than the target's own in its dtype."""
    judged = torch.tensor(row.completion_ids[: judged_length(row, ends)], dtype=torch.long)
    return (judged != predicted[: len(judged)]).nonzero()[:, 0].tolist()


def judge(
    model: PreTrainedModel, rows: Sequence[OutputRow], predicted: Sequence[Tensor], doubts: dict[int, list[int]]
) -> Margins:
    """The margins of all places in doubt. doubts: positions by row."""
    if not doubts:
        return Margins({})

    exact, note = precise_copy(model)
    order = list(doubts)
    starts = [len(rows[index].prompt_ids) for index in order]
    sequences = [rows[index].prompt_ids + rows[index].completion_ids[: doubts[index][-1] + 1] for index in order]
    walks = pieces(model, sequences, starts), pieces(exact, sequences, starts, plan_for=model)

    errors: list[Tensor] = []
    measured: dict[tuple[int, int], Margin] = {}
    for own, precise in zip(*walks, strict=True):
        for slot, which in enumerate(own.indices):
            columns, place = overlap(own.first_column, own.logits.shape[1], starts[which], len(sequences[which]))
            rough, fine = own.logits[slot, columns].double(), precise.logits[slot, columns].double()
            errors.append(errors_of_margins(rough, fine).cpu())

            index = order[which]
            for position in doubts[index]:
                if place.start <= position < place.stop:
                    at = position - place.start
                    tokens = int(predicted[index][position]), rows[index].completion_ids[position]
                    measured[index, position] = measured_margin(rough[at], fine[at], tokens, model.dtype)

    rounding = torch.cat(errors).square().mean().sqrt().item()
    margins = {
        place: Margin(margin.size, max(TIE_SIGMAS * rounding, margin.limit)) for place, margin in measured.items()
    }
    return Margins(margins, rounding, name_of(exact.dtype), note)


def errors_of_margins(rough: Tensor, fine: Tensor) -> Tensor:
    """What rounding did to the margin between the two best tokens of each position, [positions].

    rough, fine: [positions, vocab] float64 logits, computed in the model's own dtype and in the precise one.
    """
    top, best = fine.topk(2, -1)
    gap = rough.gather(1, best)
    return gap[:, 0] - gap[:, 1] - top[:, 0] + top[:, 1]


def measured_margin(rough: Tensor, fine: Tensor, tokens: tuple[int, int], dtype: torch.dtype) -> Margin:
    """The margin at one position, and the limit that the rounding at this position alone allows.

    rough, fine: [vocab], as for `errors_of_margins`. tokens: the target's own and the actual one.
    """
    (rough_own, rough_actual), (fine_own, fine_actual) = rough[list(tokens)], fine[list(tokens)]
    error = (rough_own - rough_actual - fine_own + fine_actual).abs().item()
    largest = fine.max()
    ulp = torch.finfo(dtype).eps * largest.abs().item()
    return Margin((largest - fine_actual).item(), max(OWN_ERRORS * error, ROUNDINGS * ulp))


def reread_texts(
    model: PreTrainedModel, rows: list[OutputRow], predicted: list[Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Replace, in place, token ids that differ from the target's only in how they cut the same text.

    An engine's tokens need not be those that the tokenizer makes of their text. Where the target's own token continues
    the text as it stands, it is taken in place of the tokenizer's, and what follows is read again.
    """
    for _ in range(TEXT_ROUNDS):
        changed = []
        for index, row in enumerate(rows):
            again = reread(row, predicted[index], tokenizer) if row.text is not None else None
            if again is not None:
                rows[index] = replace(row, completion_ids=again)
                changed.append(index)
        if not changed:
            return
        fresh = target_tokens(model, [rows[index] for index in changed], None)
        for index, tokens in zip(changed, fresh, strict=True):
            predicted[index] = tokens


def reread(row: OutputRow, predicted: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ids with the target's own token at the first place of doubt, if the text goes on with it; else None."""
    places = doubtful(row, predicted, set())
    if not places:
        return None
    kept = row.completion_ids[: places[0]]
    text = row.text or ""
    before, after = (written(row.prompt_ids, ids, tokenizer) for ids in (kept, [*kept, int(predicted[places[0]])]))
    if len(after) <= len(before) or not text.startswith(after):
        return None
    rest = tokenizer(text[len(after) :], add_special_tokens=False)["input_ids"]
    return [*kept, int(predicted[places[0]]), *rest]


def written(prompt_ids: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of `ids` after the prompt: some tokenizers drop a space where a text begins."""
    return tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
