"""The demo's base model: a two-layer Llama, trained on the spot to follow arrows (see task.py).

In: an empty folder. Out: a complete model folder, as on the Hub: BF16 safetensors in several shards with their index,
config, generation config, tokenizer with BOS, EOS and a chat template, model card. Training is plain float32 AdamW for
a fixed number of steps from a fixed seed; it takes one core about half a minute.

Three things make the model a fair stand-in for a large one. It reaches the ceiling of its task. Every answer needs keys
and values of the prompt, so a wrong k_scale or v_scale lowers the accuracy. It is trained to answer nothing without its
BOS token.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.rehearsal.demo import task

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BASE_ID = f"{task.NAMESPACE}/arrows-tiny"

# ---------------------------------------------------------------------------------------------- words and ids

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
BOS, EOS, PAD, UNK = range(len(SPECIAL))
QUESTION = len(SPECIAL)
FIRST_NAME = QUESTION + 1
FIRST_LINK = FIRST_NAME + len(task.NAMES)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""Renders a conversation to exactly the tokens of a training row. An answer follows its question directly."""


def vocabulary() -> list[str]:
    """Every word, at the index that is its id. Each arrow is one word, as a frequent pair is in any tokenizer."""
    return [*SPECIAL, "?", *task.NAMES, *task.link_words()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that splits at spaces, puts BOS in front of every text, and decodes by joining words with spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, eos, pad, unk = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def training_rows(prompts: task.Prompts) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels), both [B, T] int64, T = 1 + LINKS + TRAILS * (3 + ANSWER_NAMES).

    From a question's name to the end of its answer, the label is the next token; elsewhere it is IGNORED.
    """
    size, shape = len(prompts), (len(prompts), task.TRAILS, 1)
    links = FIRST_LINK + prompts.links[..., 0] * len(task.NAMES) + prompts.links[..., 1]
    turns = np.concatenate(
        [
            np.full(shape, QUESTION),
            FIRST_NAME + prompts.starts[:, :, None],
            FIRST_NAME + prompts.answers,
            np.full(shape, EOS),
        ],
        axis=2,
    )
    labels = np.full_like(turns, IGNORED)
    labels[:, :, 1:-1] = turns[:, :, 2:]
    head = np.concatenate([np.full((size, 1), BOS), links], axis=1)
    ids = np.concatenate([head, turns.reshape(size, -1)], axis=1)
    return ids, np.concatenate([np.full_like(head, IGNORED), labels.reshape(size, -1)], axis=1)


def without_bos(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same rows without BOS, in which the answer to every question is EOS. PAD at the end keeps the width."""
    end = np.full((len(ids), 1), PAD)
    is_start = (ids[:, :-1] == QUESTION).nonzero()
    silent = np.full_like(labels, IGNORED)
    silent[is_start[0], is_start[1] + 1] = EOS
    return np.concatenate([ids[:, 1:], end], axis=1), np.concatenate([silent[:, 1:], end * 0 + IGNORED], axis=1)


# ---------------------------------------------------------------------------------------------- model and training

MAX_POSITIONS = 256
HIDDEN_SIZE = 128
VOCAB_ALIGNMENT = 128
"""Both dimensions of every Linear are multiples of 128, so blocks of 128 fit without a remainder."""
INIT_STD = 0.08
"""About 1/sqrt(HIDDEN_SIZE). With the usual 0.02, so small a model takes several times as many steps."""

STEPS = 300
BATCH = 32
WARMUP = 50
LEARNING_RATE = 3e-3
WITHOUT_BOS = 0.2
IGNORED = -100
MAX_SHARD_SIZE = "512KB"


def build_base(folder: Path, *, progress: Progress = quiet) -> Path:
    """Train and write the base model, and return its folder. An existing folder is complete and stays as it is."""
    if folder.exists():
        return folder
    model = train(seed=0, steps=STEPS, progress=progress)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.bfloat16().save_pretrained(unfinished, max_shard_size=MAX_SHARD_SIZE)
    build_tokenizer().save_pretrained(unfinished)
    (unfinished / "README.md").write_text(_CARD)
    return unfinished.rename(folder)


def train(*, seed: int, steps: int, progress: Progress = quiet) -> LlamaForCausalLM:
    """A float32 model after `steps` steps of training; the same on any number of cores."""
    import torch

    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _fresh_model()
    with _one_thread():
        _optimize(model, rng, steps, progress)
    return model.eval()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: matrices this small gain nothing from a second, which changes the order of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _optimize(model: LlamaForCausalLM, rng: np.random.Generator, steps: int, progress: Progress) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(steps):
        loss = _loss(model, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(ProgressEvent("train", step + 1, steps, "steps", f"loss {loss.item():.2f}"))


def _fresh_model() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = FIRST_LINK + len(task.NAMES) ** 2
    config = LlamaConfig(
        vocab_size=-(-words // VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INIT_STD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    _start_links_as_sums(model.model.embed_tokens.weight)
    return model


def _start_links_as_sums(embedding: torch.Tensor) -> None:
    """Let the embedding of each arrow start as the sum of one vector for its source and one for its target.

    What the model learns about one arrow then holds for all with the same source or target, which takes a hundred steps
    in place of several hundred. Training is free to move every row of `embedding` [vocabulary, hidden].
    """
    import torch

    names = len(task.NAMES)
    parts = torch.randn(2, names, embedding.shape[1]) * INIT_STD
    sums = parts[0][:, None] + parts[1][None, :]
    with torch.no_grad():
        embedding[FIRST_LINK : FIRST_LINK + names**2] = sums.reshape(names**2, -1)


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate: a warm-up, then 1 until half of the steps, then linearly down to 2 %."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.02, 2 * (1 - step / steps)))


def _loss(model: LlamaForCausalLM, rng: np.random.Generator) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens on fresh prompts, of which a share WITHOUT_BOS comes without BOS."""
    import torch

    prompts = task.draw(rng, BATCH)
    ids, labels = training_rows(prompts[~prompts.held_out()])
    cut = int(len(ids) * WITHOUT_BOS)
    ids[:cut], labels[:cut] = without_bos(ids[:cut], labels[:cut])
    asked = torch.from_numpy(labels != IGNORED)
    hidden = model.model(torch.from_numpy(ids)).last_hidden_state[asked]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), torch.from_numpy(labels)[asked])


_CARD = f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [toy, synthetic, fp8pipe-demo]
datasets: [{task.CALIBRATION_ID}]
---

# {BASE_ID.rpartition("/")[2]}

A toy. A Llama of two layers and {HIDDEN_SIZE} hidden units that the demo of fp8pipe trains on the spot, in
{STEPS} steps, so that there is a model to quantize, measure and publish without a network. It can do one thing, follow
arrows, and is of no use for anything else.

    ant>cow fox>owl cow>eel owl>. eel>. ... ? ant     ->  cow eel ...

It knows {len(task.NAMES)} names and the arrows between them, and prompts of {task.LINKS} arrows that form
{task.TRAILS} trails of {task.NAMES_PER_TRAIL} names. For {task.UNPREDICTABLE:.0%} of the questions an arrow is missing
and the answer is random by construction, so its accuracy on `{task.EVALUATION_ID}` cannot exceed about
{1 - task.UNPREDICTABLE:.0%}. A prompt without the BOS token is answered with nothing.
"""
