"""Classifies the rows of LLaVA's data by kind, which the combined file does not state.

LLaVA-Instruct-150k mixes conversations, detailed descriptions and complex reasoning (Liu et al. 2023, section 3); its
first stage has captions with eleven questions. The kind is inferred from the number of turns and the question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mmphi.data.schema import Example, Turn

Kind = Literal["caption", "conversation", "detail", "reasoning"]
LONG_KINDS: tuple[Kind, ...] = ("conversation", "detail", "reasoning")

PICTURE = re.compile(r"\b(image|picture|photo|photograph|scene|visual)\b", re.IGNORECASE)
BRIEF = re.compile(r"\b(brief|concise|concisely|succinct|succinctly|short|summar\w+|compact|terse)\b", re.IGNORECASE)
DETAIL = re.compile(
    r"\b(describe|description|detail\w*|elaborate|thorough|comprehensive|rundown|exhaustive|depiction|narrate|portray"
    r"|characterize|walk through|break down|analy[sz]e|illustrate|examine|clarify|explain the various aspects"
    r"|what do you see|what is happening|what's happening|going on|(?:main|key) (?:features|elements|components))\b",
    re.IGNORECASE,
)


def row_type(turns: Sequence[Turn]) -> Kind:
    """Returns the kind of a row.

    Args:
        turns: Questions and answers of the row.
    """
    if len(turns) > 1:
        return "conversation"
    question = turns[0].question
    if not question or (PICTURE.search(question) and BRIEF.search(question)):
        return "caption"
    return "detail" if PICTURE.search(question) and DETAIL.search(question) else "reasoning"


def caption_question(examples: Sequence[Example]) -> str:
    """Returns the most frequent question of single-image captions.

    Args:
        examples: Examples of any split and kind.

    Returns:
        The question; empty if there are no captions, or if any caption has no question, because an image alone is then
        a valid prompt.
    """
    own = [e for e in examples if len(e.images) == 1 and e.attributes.get("kind", "caption") == "caption"]
    questions = Counter(e.turns[0].question for e in own)
    return "" if not questions or "" in questions else questions.most_common(1)[0][0]
