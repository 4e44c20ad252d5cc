"""What most often followed the longest known suffix of a text, in compiled code on the host.

Texts are codes: a token's id plus 1, so that 0 can stand behind the end of each remembered text. A segment of the
memory is such codes with their suffix array, and all occurrences of a context are one run of it, sorted by what
follows them. So contexts are found, and continuations counted, by binary search.

`tests/drafters/suffix_oracle.py` says the same in plain Python, by trying all places.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

compiled = njit(cache=True, nogil=True)
SLACK = 1 - 1e-9  # thresholds in floating point are lowered by it, so that they exclude nothing by rounding


@intrinsic
def _pointer(typing_context, address):
    """An integer as an address. Segments come and go, and a table of addresses fits any number of them."""

    def convert(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), convert


@compiled
def _codes(segments, s):
    return carray(_pointer(segments[s, 0]), (segments[s, 2],), np.int32)  # type: ignore[call-arg]


@compiled
def _suffixes(segments, s):
    return carray(_pointer(segments[s, 1]), (segments[s, 2],), np.int32)  # type: ignore[call-arg]


@compiled
def _compare(codes, start, query, begin, count):
    """The sign of codes[start : start + count] - query[begin : begin + count], in lexical order."""
    for j in range(count):
        if start + j >= len(codes):
            return -1
        difference = codes[start + j] - query[begin + j]
        if difference != 0:
            return -1 if difference < 0 else 1
    return 0


@compiled
def _code_at(codes, place):
    return codes[place] if place < len(codes) else 0


@compiled
def _first_followed(codes, suffixes, query, begin, count):
    """Where the run of suffixes begins that start with query[begin : begin + count] and go on with a token."""
    low, high = 0, len(suffixes)
    while low < high:
        middle = (low + high) // 2
        start = suffixes[middle]
        sign = _compare(codes, start, query, begin, count)
        if sign < 0 or (sign == 0 and _code_at(codes, start + count) == 0):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _end_of_context(codes, suffixes, low, query, begin, count):
    """Where that run ends, if it begins at `low`; it is as long as it has to be looked at."""
    step, high = 1, low
    while high < len(suffixes) and _compare(codes, suffixes[high], query, begin, count) == 0:
        low = high + 1
        high += step
        step *= 2
    high = min(high, len(suffixes))
    while low < high:
        middle = (low + high) // 2
        if _compare(codes, suffixes[middle], query, begin, count) == 0:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _bound(codes, suffixes, low, high, depth, code):
    """The first place of low .. high whose suffix has at least `code` at `depth`."""
    while low < high:
        middle = (low + high) // 2
        if _code_at(codes, suffixes[middle] + depth) < code:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _occurs(codes, suffixes, query, length, count):
    """Whether the last `count` codes of the query occur, followed by a token."""
    low = _first_followed(codes, suffixes, query, length - count, count)
    return low < len(suffixes) and _compare(codes, suffixes[low], query, length - count, count) == 0


@compiled
def _longer(codes, suffixes, query, length, known, most):
    """The longest suffix of the query in a segment, if it is longer than `known`; else `known`."""
    good, bad, step = known, most + 1, 1
    while good + 1 < bad:
        middle = min(good + step, most) if bad > most else (good + bad) // 2
        if _occurs(codes, suffixes, query, length, middle):
            good = middle
            step *= 2
        else:
            bad = middle
    return good


@compiled
def _matches_in_text(text, num_text, query, length, most, matched, table):
    """matched[e] = how many of the tokens before place e of the text equal the query's last ones, at most `most`.

    For places 1 .. num_text - 1, which a token follows: the Z-algorithm over the reversed text, in linear time.
    table: scratch of at least `most` numbers. Returns the largest.
    """
    table[0] = most
    left = right = 0
    for i in range(1, most):
        same = min(right - i, table[i - left]) if i < right else 0
        while i + same < most and query[length - 1 - same] == query[length - 1 - i - same]:
            same += 1
        if i + same > right:
            left, right = i, i + same
        table[i] = same

    best = left = right = 0
    for i in range(num_text - 1):
        end = num_text - 1 - i
        same = min(right - i, table[i - left]) if i < right else 0
        if i + same >= right:
            while same < most and same < end and text[end - 1 - same] == query[length - 1 - same]:
                same += 1
            left, right = i, i + same
        matched[end] = same
        best = max(best, same)
    return best


@compiled
def _find(text, num_text, query, length, segments, max_match, runs, places, scratch):
    """Find the longest suffix of the query that occurs, at most `max_match` tokens, each time followed by a token.

    runs: [segments, 2], filled with its run in each segment. places: filled with those of the text that follow it.
    Returns its length and the number of such places.
    """
    most = min(max_match, length)
    matched, table = scratch[0], scratch[1]
    best = own = _matches_in_text(text, num_text, query, length, most, matched, table)
    for s in range(len(segments) - 1, -1, -1):
        best = _longer(_codes(segments, s), _suffixes(segments, s), query, length, best, most)

    num_places = 0
    runs[:] = 0
    if best == 0:
        return 0, 0
    if own == best:
        for place in range(1, num_text):
            if matched[place] == best:
                places[num_places] = place
                num_places += 1
    for s in range(len(segments)):
        codes, suffixes, begin = _codes(segments, s), _suffixes(segments, s), length - best
        low = _first_followed(codes, suffixes, query, begin, best)
        runs[s, 0], runs[s, 1] = low, _end_of_context(codes, suffixes, low, query, begin, best)
    return best, num_places


@compiled
def _add_candidate(candidates, count, code):
    for i in range(count):
        if candidates[i] == code:
            return count
    candidates[count] = code
    return count + 1


@compiled
def _frequent_in_run(codes, suffixes, low, high, depth, share, candidates, count):
    """Add the codes at `depth` that make up `share` of a run. Only every so manyth place has to be looked at."""
    least = max(int((high - low) * share * SLACK), 1)
    while low + least <= high:
        code = _code_at(codes, suffixes[low + least - 1] + depth)
        low = _bound(codes, suffixes, low, low + least - 1, depth, code)
        if low + least <= high and _code_at(codes, suffixes[low + least - 1] + depth) == code:
            count = _add_candidate(candidates, count, code)
            low = _bound(codes, suffixes, low + least, high, depth, code + 1)
    return count


@compiled
def _most_frequent(text, places, num_places, segments, runs, depth, share, counts, candidates):
    """The code that most often comes next, and how often, if that is `share` of all times; else 0 and less.

    What makes up a share of the whole makes up that share of the text's own places or of some segment's run. Of codes
    with one count, the one that followed latest in the text comes first, then the smallest. counts: zeros; they are
    zeros again afterwards.
    """
    count = 0
    for i in range(num_places):
        counts[text[places[i]]] += 1
    least = max(int(num_places * share * SLACK), 1)
    for i in range(num_places):
        if counts[text[places[i]]] >= least:
            count = _add_candidate(candidates, count, text[places[i]])
    for s in range(len(segments)):
        codes, suffixes = _codes(segments, s), _suffixes(segments, s)
        count = _frequent_in_run(codes, suffixes, runs[s, 0], runs[s, 1], depth, share, candidates, count)

    best, best_total, best_latest = 0, 0, -1
    for i in range(count):
        code = candidates[i]
        total = counts[code] if code < len(counts) else 0
        for s in range(len(segments)):
            if runs[s, 0] < runs[s, 1]:
                codes, suffixes = _codes(segments, s), _suffixes(segments, s)
                low = _bound(codes, suffixes, runs[s, 0], runs[s, 1], depth, code)
                total += _bound(codes, suffixes, low, runs[s, 1], depth, code + 1) - low
        if total < best_total:
            continue
        latest = num_places - 1
        while latest >= 0 and text[places[latest]] != code:
            latest -= 1
        is_ahead = latest > best_latest or (latest == best_latest and code < best)
        if total > best_total or is_ahead:
            best, best_total, best_latest = code, total, latest

    for i in range(num_places):
        counts[text[places[i]]] = 0
    return best, best_total


@compiled
def _advance(text, num_text, places, num_places, segments, runs, depth, code):
    """Keep the occurrences that `code` follows and another token after it. Returns the number of places left."""
    kept = 0
    for i in range(num_places):
        if text[places[i]] == code and places[i] + 1 < num_text:
            places[kept] = places[i] + 1
            kept += 1
    for s in range(len(segments)):
        codes, suffixes = _codes(segments, s), _suffixes(segments, s)
        low = _bound(codes, suffixes, runs[s, 0], runs[s, 1], depth, code)
        high = _bound(codes, suffixes, low, runs[s, 1], depth, code + 1)
        runs[s, 0], runs[s, 1] = _bound(codes, suffixes, low, high, depth + 1, 1), high
    return kept


@compiled
def _total(runs, num_places):
    total = num_places
    for s in range(len(runs)):
        total += runs[s, 1] - runs[s, 0]
    return total


@compiled
def draft_after(
    text, num_text, segments, max_tokens, max_match, max_factor, min_probability, vocab_size, counts, scratch, used
):
    """The draft after a text, [tokens] int64 ids; see `Suffix` for the rule.

    text: [>= num_text] int32 codes. segments: [segments, 3] int64, the addresses of codes and suffix array (int32
        each) and their length. vocab_size: the draft ends before an id that is not below it.
    counts: int32 zeros, one for every code of the text. scratch: [3, >= num_text and max_match] int32.
    used: [segments] bool, set where the suffix was found.
    """
    draft = np.empty(max_tokens, dtype=np.int64)
    runs = np.zeros((len(segments), 2), dtype=np.int64)
    candidates = np.empty((len(segments) + 1) * (int(2 / min_probability) + 2), dtype=np.int32)
    kept = min(num_text, max_match)
    query = np.empty(kept + max_tokens, dtype=np.int32)
    query[:kept] = text[num_text - kept : num_text]
    places = scratch[2]

    depth, num_places = _find(text, num_text, query, kept, segments, max_match, runs, places, scratch)
    for s in range(len(segments)):
        if runs[s, 0] < runs[s, 1]:
            used[s] = True
    limit = min(max_tokens, int(max_factor * depth))
    probability, size = 1.0, 0
    while size < limit:
        total = _total(runs, num_places)
        if total == 0:  # nothing followed all of that: go on with a shorter suffix
            depth, num_places = _find(text, num_text, query, kept + size, segments, max_match, runs, places, scratch)
            total = _total(runs, num_places)
            if total == 0:
                break

        share = min_probability / probability
        code, count = _most_frequent(text, places, num_places, segments, runs, depth, share, counts, candidates)
        probability *= count / total
        if probability < min_probability or not 0 < code <= vocab_size:
            break
        draft[size] = code - 1
        query[kept + size] = code
        size += 1
        num_places = _advance(text, num_text, places, num_places, segments, runs, depth, code)
        depth += 1
    return draft[:size]
