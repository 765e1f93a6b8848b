"""Long prompts made from a seed: one number among many (needle), and a chain of facts to follow (hops).

lm-eval calls `needle` and `hops` with a task file's metadata and takes the datasets that they return. The lengths are
in words, and no tokenizer makes fewer tokens than words of this text. The hay is plain sentences that answer nothing;
the facts lie in it at random places, among others of the same form. The same documents come out everywhere.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

Doc = dict[str, Any]  # Any: question, answer and facts about a document


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WHO = _words("farmer baker sailor teacher painter miller hunter doctor singer weaver gardener driver")
DID = _words("carried counted washed watched painted lifted bought found moved cleaned opened followed")
WHAT = _words("basket ladder barrel lantern blanket bucket window bottle hammer kettle wheel saddle")
WHERE = _words("river market forest harbour meadow village mountain garden station bridge cellar tower")
WHEN = _words("morning evening autumn winter harvest holiday storm festival summer spring night afternoon")

CHAINS = 8
"""Chains of rooms in a prompt; one is asked for."""
HOPS = 3
"""Rooms of a chain: the last one keeps the number."""
CODES = 40
"""Codes in a prompt; one is asked for."""


def needle(*, documents: int, words: Sequence[int], seed: int, **_: Any) -> dict[str, Dataset]:
    """documents: how many; words: lengths of their hay, in turn."""
    return _dataset([_needle(random.Random(f"needle:{seed}:{i}"), words[i % len(words)]) for i in range(documents)])


def hops(*, documents: int, words: Sequence[int], seed: int, **_: Any) -> dict[str, Dataset]:
    """documents: how many; words: lengths of their hay, in turn."""
    return _dataset([_hops(random.Random(f"hops:{seed}:{i}"), words[i % len(words)]) for i in range(documents)])


def _needle(draw: random.Random, words: int) -> Doc:
    codes = dict(zip(_names(draw, CODES), _numbers(draw, CODES), strict=True))
    asked = draw.choice(list(codes))
    text = _buried(draw, [f"The code of {name} is {number}." for name, number in codes.items()], words)
    return {
        "prompt": f"{text}\n\nQuestion: What is the code of {asked}?\nAnswer: The code of {asked} is",
        "answer": codes[asked],
        "words": len(text.split()),
    }


def _hops(draw: random.Random, words: int) -> Doc:
    rooms = _names(draw, HOPS * (CHAINS + 1))
    chains = [rooms[i : i + HOPS] for i in range(0, len(rooms), HOPS)]
    numbers = _numbers(draw, CHAINS + 1)
    example, *others = [_facts(chain, number) for chain, number in zip(chains, numbers, strict=True)]
    asked = draw.randrange(CHAINS)
    text = _buried(draw, [fact for facts in others for fact in facts], words)
    question = "Question: Which number does the way from room {} end at?\nAnswer:"
    shown = f"{' '.join(example)}\n\n{question.format(chains[0][0])} {' '.join(example)}"
    return {
        "prompt": f"{text}\n{shown}\n\n{question.format(chains[asked + 1][0])}",
        "answer": numbers[asked + 1],
        "words": len(text.split()),
    }


def _facts(chain: Sequence[str], number: str) -> list[str]:
    ways = [f"Room {here} leads to room {there}." for here, there in itertools.pairwise(chain)]
    return [*ways, f"Room {chain[-1]} keeps the number {number}."]


def _buried(draw: random.Random, facts: Sequence[str], words: int) -> str:
    """At least `words` words of hay, with the facts at random places in random order."""
    hay: list[str] = []
    length = 0
    while length < words:
        sentence = _sentence(draw)
        hay.append(sentence)
        length += len(sentence.split())
    for fact in draw.sample(list(facts), len(facts)):
        hay.insert(draw.randrange(len(hay) + 1), fact)
    return " ".join(hay)


def _sentence(draw: random.Random) -> str:
    who, did, what, where, when = (draw.choice(words) for words in (WHO, DID, WHAT, WHERE, WHEN))
    return f"The {who} {did} the {what} near the {where} in the {when}."


def _names(draw: random.Random, count: int) -> list[str]:
    """Different names of three syllables, such as Tarimo."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)]
        found["".join(syllables).capitalize()] = None
    return list(found)


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _dataset(documents: list[Doc]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(documents)}
