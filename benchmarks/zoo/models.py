"""Checkpoints with random weights: large enough that every scheme applies and every layer matters.

In: a name (`configs`). Out: a folder with the model as transformers saves it, in bfloat16, and a tokenizer. Weights are
scaled to keep activations near one, norms and biases differ from their defaults, and routers prefer some experts
clearly, so that quantized weights do not send a token elsewhere.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from benchmarks.zoo.configs import small_config
from benchmarks.zoo.own import ON_DISK, OWN

LARGEST = 40_000_000
"""Parameters that a checkpoint may have."""

CALIBRATION_ROWS = 16

_CLASSES: tuple[tuple[Any, Any], ...] = (  # Any: transformers' own tables
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, AutoModelForMultimodalLM),
)


class NotBuilt(Exception):
    """transformers does not build this model from its own config class made small, for the reason in the message."""


def all_names() -> list[str]:
    """Every model type with a head for text, text from images or from other modalities; and the variants of OWN."""
    types = {name for names, _ in _CLASSES for name in names}
    return sorted(types | {name for name in OWN if ":" in name})


def build(name: str) -> PreTrainedModel:
    """The model with its random weights. Raises NotBuilt."""
    model_type = name.partition(":")[0]
    auto = next(auto for names, auto in _CLASSES if model_type in names)
    try:
        config = small_config(name)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        if count > LARGEST:
            raise NotBuilt(f"{count / 1e6:.0f} million parameters with every known size made small")
        torch.manual_seed(0)
        model = auto.from_config(config)
    except NotBuilt:
        raise
    except Exception as error:  # each config class and model refuses sizes in its own way
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from error
    _fill(model)
    model = model.to(torch.bfloat16).eval()
    model.config.dtype = "bfloat16"
    return model


def save(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Write the model of this type and a tokenizer into `folder`."""
    model.save_pretrained(folder, max_shard_size="4MB")
    _tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in ON_DISK.get(name, {}).items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = {
        id(part.weight): 0.75 / float(getattr(part, "embed_scale", 1.0))  # Gemma multiplies by sqrt(hidden size)
        for part in model.modules()
        if isinstance(part, nn.Embedding)
    }
    for name, parameter in model.named_parameters():
        _fill_one(name, parameter, embeddings.get(id(parameter)), generator)


def _fill_one(name: str, parameter: Tensor, size: float | None, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() < 2:
        parameter += 0.1 * noise
    elif size is not None:
        parameter.copy_(size * noise)
    else:
        decisive = 4.0 if name.endswith(("gate.weight", "router.weight", "router.proj.weight", "wg.weight")) else 1.0
        parameter.copy_(decisive * noise / math.sqrt(parameter.shape[-1]))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: transformers rebuilds the tokenizer of some architectures from the vocabulary alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of bytes, which no config uses as special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 256, (count, length), generator=generator).tolist()


def write_rows(path: Path) -> Path:
    """Calibration rows of random letters."""
    rows = prompts(CALIBRATION_ROWS, 32, seed=1)
    path.write_text("".join("".join(chr(ord("!") + token % 94) for token in row) + "\n" for row in rows))
    return path
