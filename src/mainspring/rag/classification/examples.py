"""Queries to learn from: about the corpus, made of its sentences, and of the kinds that need no document.

The second are templates of mathematics, code, writing and small talk. Those for testing are other templates with other
words than those for training, so that a test does not ask what was learnt by heart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.chunking.sentences import sentences

_ABOUT = (
    "{sentence}",
    "Is it true that {lower}?",
    "Where does it say that {lower}?",
    "What is meant by {phrase}?",
    "What about {phrase}?",
    "How does {phrase} work?",
    "When and why {phrase}?",
    "Tell me about {phrase}",
    "Which {phrase}?",
    "Explain {phrase} to me",
)

_TRAIN = (
    "What is {a} + {b}?", "What is {a} times {b}?", "Solve {a}x + {b} = {c} for x", "How much is {a}% of {b}?",
    "Differentiate x^{a} + {b}x", "Is {a} a prime number?", "Calculate the square root of {a}",
    "Convert {a} kilometres to miles", "What is the area of a circle with radius {a}?",
    "Write a {language} function that {task}", "How do I {task} in {language}?",
    "Fix this code: for i in range({a}) print(i)",
    "Give me a regular expression that matches {thing}s", "Write a unit test for a function that {task}",
    "Write a poem about {thing}", "Translate 'where is the {thing}' into {tongue}",
    "Write a short email about my {thing}",
    "Make this sentence shorter: I would like to tell you that the {thing} is here", "Give me {a} names for my {thing}",
    "Hello, how are you?", "Tell me a joke about a {thing}", "Thank you, that was helpful", "Good morning!",
    "What is your name?", "Do you like my {thing}?", "I am bored, talk to me", "Who made you?", "See you tomorrow",
)  # fmt: skip
_TEST = (
    "Compute {a} minus {b}", "If I have {a} apples and eat {b}, how many are left?", "What is {a} divided by {b}?",
    "Integrate {a}x^2 from 0 to {b}", "Simplify ({a} + {b}) * {c}", "Round {a}.{b} to the nearest whole number",
    "Implement a class in {language} that can {task}", "Refactor this: if x == True: return {a}",
    "Can you code something in {language} to {task}?", "Why does print({a} / 0) fail?",
    "Compose a song about a {thing}", "How do you say {thing} in {tongue}?",
    "Rewrite politely: give me the {thing} now",
    "Invent a story with a {thing} and a dragon", "Hi there", "You are very kind", "Let us play a game",
    "What do you think about love?", "Bye, have a nice evening", "Are you a human?",
)  # fmt: skip


@dataclass(frozen=True)
class _Words:
    languages: tuple[str, ...]
    tasks: tuple[str, ...]
    things: tuple[str, ...]
    tongues: tuple[str, ...]


_TRAIN_WORDS = _Words(
    ("Python", "Java", "C++", "JavaScript"),
    (
        "reverse a list",
        "sort numbers",
        "count the words of a string",
        "find duplicates",
        "check a palindrome",
    ),
    ("cat", "birthday", "summer holiday", "holiday photo", "bicycle", "garden", "cake"),
    ("French", "German", "Spanish"),
)
_TEST_WORDS = _Words(
    ("Rust", "Go", "Ruby"),
    ("merge two dictionaries", "compute factorials", "shuffle a deck of cards", "parse dates"),
    ("dog", "wedding", "train ticket", "piano", "pizza"),
    ("Italian", "Polish", "Dutch"),
)


@dataclass(frozen=True)
class Examples:
    """Queries that need the documents, and queries that do not."""

    needing: tuple[str, ...]
    free: tuple[str, ...]


def make_examples(chunks: Iterable[Chunk], count: int = 400, seed: int = 0) -> tuple[Examples, Examples]:
    """(to train on, to test on): at most `count` and a quarter of it of each kind, no sentence or template in both."""
    generator = Random(seed)
    found = dict.fromkeys(s for chunk in chunks for s in map(_clean, sentences(chunk.text)) if _usable(s))
    pool = list(found)
    generator.shuffle(pool)
    testing = min(count // 4, len(pool) // 5)
    parts = (pool[testing : testing + count], pool[:testing])
    kinds = ((_TRAIN, _TRAIN_WORDS, count), (_TEST, _TEST_WORDS, count // 4))
    train, test = (
        Examples(
            tuple(_about(sentence, generator) for sentence in part),
            tuple(_filled(generator.choice(templates), words, generator) for _ in range(size)),
        )
        for part, (templates, words, size) in zip(parts, kinds, strict=True)
    )
    return train, test


def _about(sentence: str, generator: Random) -> str:
    """A query about what a sentence says. Its phrase is a stretch of it, of three to six words."""
    words = re.sub(r"[.!?]+$", "", sentence).split()
    length = min(len(words), generator.randint(3, 6))
    first = generator.randint(0, len(words) - length)
    phrase = " ".join(words[first : first + length]).strip(",;:()")
    plain = " ".join(words)
    template = generator.choice(_ABOUT)
    return template.format(sentence=sentence, lower=plain[:1].lower() + plain[1:], phrase=phrase)


def _filled(template: str, words: _Words, generator: Random) -> str:
    a, b, c = (generator.randint(2, 999) for _ in range(3))
    return template.format(
        a=a,
        b=b,
        c=c,
        language=generator.choice(words.languages),
        task=generator.choice(words.tasks),
        thing=generator.choice(words.things),
        tongue=generator.choice(words.tongues),
    )


def _clean(sentence: str) -> str:
    return " ".join(sentence.split()).lstrip("#*-> ")


def _usable(sentence: str) -> bool:
    """Words rather than a table, a formula or a line of code, and not too many."""
    words: Sequence[str] = sentence.split()
    letters = sum(c.isalpha() or c.isspace() for c in sentence)
    return 4 <= len(words) <= 40 and letters >= 0.85 * len(sentence)
