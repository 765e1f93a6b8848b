"""What llm-compressor writes, a few kilobytes each: the folders beside this file. Made once with its own environment:

    build/peer/bin/python tests/data/peer/make.py       (python -m benchmarks.quantize builds build/peer)

`dense`, `wide` and `moe` are the BF16 models; `MODEL-WAY-SCHEME` their quantized twins, WAY being free (model_free_ptq)
or oneshot. Nothing is corrected: what llm-compressor leaves in the folder is what is kept.
"""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WHOLE_BLOCKS = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "head_dim": 128}
"""It cannot write a weight that is no multiple of 128 x 128 under FP8_BLOCK."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
DENSE_FREE = ("FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "MXFP8")
DENSE_ONESHOT = ("FP8", "FP8-KV", "FP8_DYNAMIC", "NVFP4", "NVFP4A16", "MXFP4", "MXFP8")


def make_model(name: str) -> Path:
    """A random model in transformers' own layout."""
    config = {
        "dense": lambda: LlamaConfig(**SIZES),
        "wide": lambda: LlamaConfig(**SIZES | WHOLE_BLOCKS),
        "moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS),
    }[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    folder = fresh(HERE / name)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(32)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1", eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def unprotected(source: Path, scheme: str) -> None:
    """model_free_ptq as its documentation calls it, which quantizes the router too."""
    (HERE / "router").mkdir(exist_ok=True)
    out = fresh(HERE / "router" / f"{source.name}-free-{scheme}")
    model_free_ptq(source, out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens$"], max_workers=1)


def free(source: Path, scheme: str) -> None:
    """model_free_ptq, which never builds the model."""
    out = fresh(HERE / f"{source.name}-free-{scheme}")
    model_free_ptq(
        source, out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens$", "re:.*mlp[.]gate$"], max_workers=1
    )


def calibrated(source: Path, scheme: str) -> None:
    """oneshot, with a dataset where the scheme asks for one."""
    name, _, with_kv = scheme.partition("-")
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    modifier = QuantizationModifier(
        targets="Linear",
        scheme=name,
        ignore=["lm_head", "re:.*mlp[.]gate$"],
        kv_cache_scheme=kv if with_kv else None,
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    out = fresh(HERE / f"{source.name}-oneshot-{scheme}")
    needs_data = name in ("FP8", "NVFP4") or with_kv
    with tempfile.TemporaryDirectory() as log:
        oneshot(model=model, recipe=modifier, **(data() if needs_data else {}), log_dir=log, output_dir=str(out))


def data() -> dict[str, object]:
    """A few rows of token ids."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 32, (8, 16), generator=generator).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 16] * 8})
    return {"dataset": dataset, "num_calibration_samples": 8, "max_seq_length": 16}


def main() -> None:
    logging.disable(logging.WARNING)
    wanted = sys.argv[1:]
    failed = {}
    dense, wide, moe = make_model("dense"), make_model("wide"), make_model("moe")
    jobs = [(free, dense, scheme) for scheme in DENSE_FREE] + [(calibrated, dense, scheme) for scheme in DENSE_ONESHOT]
    jobs += [(free, wide, "FP8_BLOCK"), (calibrated, wide, "FP8_BLOCK")]
    jobs += [(make, moe, "FP8_DYNAMIC") for make in (free, calibrated, unprotected)]
    for make, source, scheme in jobs:
        key = f"{source.name}-{make.__name__}-{scheme}"
        if wanted and key not in wanted:
            continue
        try:
            make(source, scheme)
        except Exception as error:  # a scheme that this version refuses is printed, and the others are still made
            failed[key] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed, indent=1))


main()
