"""The task of the demo's model: follow the arrows.

    ant>cow fox>owl cow>eel owl>. eel>. ... ? ant      ->  cow eel ...

A prompt holds LINKS arrows in random order, which form TRAILS trails of NAMES_PER_TRAIL names, and a first name. The
answer is the rest of its trail. To find each name of the answer, the model looks up the name before it in the prompt.
So every step of the decoding reads keys and values of the prompt from the KV cache, and one wrong step spoils the
answer.

For a fixed share of trails, UNPREDICTABLE, the answer cannot be known: a decoy replaces one arrow in the prompt, and
the names after it are drawn at random. This bounds the accuracy at about 1 - UNPREDICTABLE, however long the training.

Prompts whose arrows hash into one of HOLD_OUT_EVERY classes are held out: the evaluation set consists of them, and
training and calibration never see one. Everything is drawn with numpy from fixed seeds, so every machine makes the same
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMESPACE = "fp8pipe-demo"
CALIBRATION_ID = f"{NAMESPACE}/arrows-calibration"
EVALUATION_ID = f"{NAMESPACE}/arrows-eval"

# fmt: off
NAMES = (
    "ant", "bat", "bee", "cat", "cod", "cow", "crab", "crow", "deer", "dog", "duck", "eel", "elk", "emu", "fox", "frog",
    "gnu", "goat", "hare", "hawk", "hen", "ibex", "jay", "kiwi", "lark", "lynx", "mole", "moth", "newt", "owl", "pig",
    "swan",
)
# fmt: on
TRAILS = 7
NAMES_PER_TRAIL = 4
ANSWER_NAMES = NAMES_PER_TRAIL - 1
LINKS = TRAILS * NAMES_PER_TRAIL
"""Arrows of a prompt: one per name of a trail. That of the last name points to nothing: `owl>.`"""
UNPREDICTABLE = 0.08
HOLD_OUT_EVERY = 16
EVALUATION_SAMPLES = 2000
"""Enough to accept an undamaged candidate with probability 0.99, at a margin of two points, if 5 % of the answers
differ."""
CALIBRATION_SAMPLES = 512

_HASH_WEIGHTS = np.random.Generator(np.random.PCG64(20_240_229)).integers(
    0, 2**64, size=(len(NAMES), len(NAMES)), dtype=np.uint64
)


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts, each with a question about each of its trails. Names are indices into NAMES."""

    links: np.ndarray
    """[B, LINKS, 2] int64: (from, to), in the order of the prompt; from == to is the end of a trail."""
    starts: np.ndarray
    """[B, TRAILS] int64: the name that each question gives."""
    answers: np.ndarray
    """[B, TRAILS, ANSWER_NAMES] int64."""
    predictable: np.ndarray
    """[B, TRAILS] bool: the prompt holds every arrow of the trail."""

    def __len__(self) -> int:
        return len(self.links)

    def __getitem__(self, rows: np.ndarray) -> Prompts:
        """The prompts that `rows` selects: [B] bool, or indices."""
        return Prompts(self.links[rows], self.starts[rows], self.answers[rows], self.predictable[rows])

    def held_out(self) -> np.ndarray:
        """[B] bool: whether a prompt belongs to the evaluation. The order of its arrows does not matter."""
        arrows = _HASH_WEIGHTS[self.links[..., 0], self.links[..., 1]]
        return (arrows.sum(axis=1) >> np.uint64(32)) % HOLD_OUT_EVERY == 0


def draw(rng: np.random.Generator, num_prompts: int) -> Prompts:
    """`num_prompts` new prompts, some of them held out."""
    shuffled = rng.permuted(np.tile(np.arange(len(NAMES)), (num_prompts, 1)), axis=1)
    trails = shuffled[:, :LINKS].reshape(num_prompts, TRAILS, NAMES_PER_TRAIL)
    targets = np.concatenate([trails[:, :, 1:], trails[:, :, -1:]], axis=2)
    links = np.stack([trails, targets], axis=3)  # [B, TRAILS, NAMES_PER_TRAIL, 2]

    hidden = rng.random((num_prompts, TRAILS)) < UNPREDICTABLE
    gap = rng.integers(0, ANSWER_NAMES, size=(num_prompts, TRAILS))
    is_gap = hidden[:, :, None] & (np.arange(NAMES_PER_TRAIL) == gap[:, :, None])
    links = np.where(is_gap[..., None], _decoys(rng, shuffled[:, LINKS:])[:, :, None], links)

    after_gap = hidden[:, :, None] & (np.arange(ANSWER_NAMES) >= gap[:, :, None])
    answers = np.where(after_gap, rng.integers(0, len(NAMES), size=after_gap.shape), trails[:, :, 1:])
    order = rng.permuted(np.tile(np.arange(LINKS), (num_prompts, 1)), axis=1)
    shown = np.take_along_axis(links.reshape(num_prompts, LINKS, 2), order[..., None], axis=1)
    asked = rng.permuted(np.tile(np.arange(TRAILS), (num_prompts, 1)), axis=1)
    return Prompts(
        links=shown,
        starts=np.take_along_axis(trails[:, :, 0], asked, axis=1),
        answers=np.take_along_axis(answers, asked[..., None], axis=1),
        predictable=~np.take_along_axis(hidden, asked, axis=1),
    )


def _decoys(rng: np.random.Generator, spare: np.ndarray) -> np.ndarray:
    """Arrows [B, TRAILS, 2], each from a name that is on no trail to any other name."""
    source = rng.permuted(np.resize(spare.T, (TRAILS, len(spare))).T, axis=1)
    step = rng.integers(1, len(NAMES), size=source.shape)
    return np.stack([source, (source + step) % len(NAMES)], axis=2)


def draw_where(held_out: bool, *, seed: int, num_prompts: int) -> Prompts:
    """`num_prompts` prompts for the evaluation if `held_out`, else for training and calibration."""
    rng = np.random.Generator(np.random.PCG64(seed))
    batches, found = [], 0
    while found < num_prompts:
        batch = draw(rng, 4096)
        batches.append(batch[batch.held_out() == held_out])
        found += len(batches[-1])
    names = ("links", "starts", "answers", "predictable")
    joined = Prompts(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names})
    return joined[np.arange(num_prompts)]


# ---------------------------------------------------------------------------------------------- as text


def link_words() -> list[str]:
    """Every arrow as a word, at the index `from * len(NAMES) + to`."""
    return [f"{a}>." if a == b else f"{a}>{b}" for a in NAMES for b in NAMES]


def prompt_text(prompts: Prompts, row: int) -> str:
    """The arrows and the question about the first trail: the first message of a user."""
    words = link_words()
    arrows = [words[a * len(NAMES) + b] for a, b in prompts.links[row]]
    return " ".join([*arrows, question_text(prompts, row, 0)])


def question_text(prompts: Prompts, row: int, trail: int) -> str:
    """One question: each further message of a user."""
    return f"? {NAMES[prompts.starts[row, trail]]}"


def answer_text(prompts: Prompts, row: int, trail: int = 0) -> str:
    """The rest of the trail."""
    return " ".join(NAMES[name] for name in prompts.answers[row, trail])


def chat(prompts: Prompts, row: int) -> list[dict[str, str]]:
    """A conversation about all trails of one prompt, as chat messages."""
    messages = []
    for trail in range(TRAILS):
        question = prompt_text(prompts, row) if trail == 0 else question_text(prompts, row, trail)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer_text(prompts, row, trail)})
    return messages


# ---------------------------------------------------------------------------------------------- as Hub datasets


def build_calibration_dataset(folder: Path) -> Path:
    """Write CALIBRATION_SAMPLES conversations that are not held out: split train, column `messages`."""
    prompts = draw_where(held_out=False, seed=2, num_prompts=CALIBRATION_SAMPLES)
    rows = ({"messages": chat(prompts, row)} for row in range(len(prompts)))
    about = f"{len(prompts)} conversations of the kind the model was trained on, for calibration."
    return _write_dataset(folder, CALIBRATION_ID, "train", rows, about)


def build_evaluation_dataset(folder: Path, *, seed: int = 3, samples: int = EVALUATION_SAMPLES) -> Path:
    """Write held-out questions: split test, columns `prompt`, `answer`, `predictable`. Another seed draws others."""
    prompts = draw_where(held_out=True, seed=seed, num_prompts=samples)
    rows = (
        {
            "prompt": prompt_text(prompts, row),
            "answer": answer_text(prompts, row),
            "predictable": bool(prompts.predictable[row, 0]),
        }
        for row in range(len(prompts))
    )
    about = (
        f"{len(prompts)} questions that no training or calibration row shares its arrows with. For a share of "
        f"{UNPREDICTABLE:.0%} (`predictable: false`) an arrow is missing and the answer on file is random, so no "
        f"model can score above about {1 - UNPREDICTABLE:.0%}."
    )
    return _write_dataset(folder, EVALUATION_ID, "test", rows, about)


_DATASET_CARD = """\
---
license: apache-2.0
language: en
pretty_name: {name}
tags: [synthetic, fp8pipe-demo]
configs:
- config_name: default
  data_files:
  - split: {split}
    path: {split}.jsonl
---

# {name}

{about}

A prompt lists arrows between names (`ant>cow`; `owl>.` ends a trail) and gives a first name; the answer is the rest of
its trail. Drawn by a program from fixed seeds, for the demo of fp8pipe.
"""


def _write_dataset(folder: Path, repo_id: str, split: str, rows: Iterator[Mapping[str, object]], about: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = repo_id.rpartition("/")[2]
    (folder / "README.md").write_text(_DATASET_CARD.format(name=name, split=split, about=about))
    return folder
