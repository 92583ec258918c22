"""Prompts of generators: every combination of a topic, a reader, a tone and a form, in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

TOPICS = """
how rainbows form|why the moon has phases|how bridges carry weight|what a vaccine does|how bread rises|the water cycle
how computers store numbers|why leaves change color|how a bicycle stays upright|the life of bees|how glaciers move
what makes a good question|how to save money|the history of writing|how maps are made|why we sleep
how music affects mood|growing tomatoes|the first day at a new school|a lost dog that finds its way home
two sisters who build a boat|a lighthouse keeper in a storm|a train journey at night|a village that shares one well
an old clockmaker and his apprentice|how prime numbers are used|what probability means|the Pythagorean theorem
how to add fractions|how percentages mislead|how sorting algorithms work|what recursion is|how to test a program
why passwords are hashed|how the internet finds a page|how a kettle boils water|what friction does|how magnets work
why the sky is blue|how sound travels|what gravity is|the causes of the French Revolution|trade along the Silk Road
how democracy began in Athens|the invention of printing|how a law is made|what inflation is|how supply meets demand
what insurance is for|how to read a contract|packing for a week in the mountains|cooking soup from leftovers
repairing a torn jacket|keeping a diary|planning a garden|how to apologize|how to listen well|working in a team
dealing with a deadline|giving a short speech|learning a language|how the heart works|what bones are made of
how eyes see color|why exercise helps|how wounds heal|what antibiotics do|photosynthesis|how birds migrate
life in a coral reef|how trees talk through roots|why wolves live in packs|the desert at night|how a camera works
why batteries run down|how planes fly|what a telescope shows|how a lock opens|how paper is made|choosing a first pet
moving to a new city|a misunderstanding between friends|a contest that nobody wins|a letter that came late
"""
READERS = (
    "a curious child",
    "a teenager",
    "a college student",
    "a busy parent",
    "an expert in another field",
    "someone who has never heard of it",
    "a teacher who will explain it further",
    "an older neighbor",
)
TONES = (
    "plain and friendly",
    "precise and sober",
    "lively, with examples",
    "patient, one step after the other",
    "humorous",
    "full of small observations",
    "critical, weighing both sides",
    "warm and personal",
)
FORMS = (
    "a short textbook section",
    "a dialogue between two people",
    "a story with a beginning, a middle and an end",
    "a list of questions with their answers",
    "a blog post",
    "an exercise with its worked solution",
    "a letter",
    "a numbered guide",
    "a summary with a conclusion",
    "a short essay",
)
PLAIN = "Write {form} about {topic} for {reader}. The style is {tone}."


def topics() -> list[str]:
    """Returns all topics."""
    return [topic.strip() for line in TOPICS.strip().splitlines() for topic in line.split("|")]


class Prompts:
    """Numbered prompts; the first ``len(self)`` are distinct, then the order repeats.

    Args:
        seed: Seed of the order.
    """

    def __init__(self, seed: int | str) -> None:
        self.seed = seed
        self._lists: Sequence[Sequence[str]] = (FORMS, topics(), READERS, TONES)

    def __len__(self) -> int:
        count = 1
        for words in self._lists:
            count *= len(words)
        return count

    @cached_property
    def _order(self) -> list[int]:
        order = list(range(len(self)))
        random.Random(self.seed).shuffle(order)
        return order

    def __getitem__(self, number: int) -> str:
        place = self._order[number % len(self)]
        chosen = []
        for words in self._lists:
            place, at = divmod(place, len(words))
            chosen.append(words[at])
        form, topic, reader, tone = chosen
        return PLAIN.format(form=form, topic=topic, reader=reader, tone=tone)
