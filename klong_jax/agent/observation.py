"""Fitting what a tool says into the room there is for it."""

from klong_jax.text.tokenizer import Tokenizer

# Characters per token allowed for before anything is encoded; more is hopeless or not text.
_DENSEST = 16


def fit(text: str, limit: int, tokenizer: Tokenizer) -> str:
    """The text, or its beginning and end with a mark between, in at most `limit` tokens.

    Args:
        text: What the tool said.
        limit: Tokens there is room for.
        tokenizer: Counts them.
    """
    # A byte-level token is at least one byte; a sentencepiece may add one for the word's start.
    if len(text) * 4 < limit or len(text.encode()) < limit:
        return text
    if limit <= 0:
        return ""
    keep = min(len(text), limit * _DENSEST)
    while True:
        shown = _shorten(text, keep)
        used = len(tokenizer.encode(shown, specials=False))
        if used <= limit:
            return shown
        if not keep:
            return ""
        # Below proportion, since the mark costs too and ratios vary; always less than before.
        keep = min(keep - 1, keep * limit * 9 // (used * 10))


def _shorten(text: str, keep: int) -> str:
    if keep >= len(text):
        return text
    head, tail = text[: keep - keep // 2], text[len(text) - keep // 2 :]
    return f"{head}\n[{len(text) - keep} characters left out]\n{tail}"
