"""The rule of `specdec.Suffix` in plain Python: every place of every text is tried. Slow, and plainly right."""

from __future__ import annotations

from collections import Counter


def followed(texts, context):
    """(text, place) of each token that follows an occurrence of the context, in order. The row's own text is first."""
    size = len(context)
    return [
        (index, place)
        for index, text in enumerate(texts)
        for place in range(size, len(text))
        if text[place - size : place] == context
    ]


def longest(texts, text, max_match):
    """The places after the longest suffix that occurs, and its length."""
    for size in range(min(max_match, len(text)), 0, -1):
        found = followed(texts, text[len(text) - size :])
        if found:
            return found, size
    return [], 0


def draft_by_hand(own, remembered, max_tokens, max_match, max_factor, min_probability, vocab_size):
    texts, draft = [own, *remembered], []
    found, size = longest(texts, own, max_match)
    limit, probability = min(max_tokens, int(max_factor * size)), 1.0
    while len(draft) < limit:
        if not found:
            found, _ = longest(texts, own + draft, max_match)
            if not found:
                break
        counts = Counter(texts[index][place] for index, place in found)
        latest = {texts[0][place]: place for index, place in found if index == 0}
        token = min(counts, key=lambda token: (-counts[token], -latest.get(token, -1), token))
        probability *= counts[token] / len(found)
        if probability < min_probability or token >= vocab_size:
            break
        draft.append(token)
        found = [
            (index, place + 1)
            for index, place in found
            if texts[index][place] == token and place + 1 < len(texts[index])
        ]
    return draft
