"""A random two-layer Llama, its naive FP8 twin with FP8 KV cache, lm-eval tasks on local rows, running workers."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from fp8pipe.config import EvalSuite, TaskSpec


def make_tiny_llama(folder: Path) -> Path:
    """BF16, byte-level tokenizer with BOS, head size 32 (vLLM's FP8 KV cache on CPU needs a multiple of 32)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_fp8_kv_twin(source: Path, folder: Path) -> Path:
    """compressed-tensors, per tensor, static activations, FP8 KV cache; scales by guess, which vLLM does not mind."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().max() / 448
            tensors[name] = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale.reshape(1)
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor([0.02])
        if name.endswith("k_proj.weight"):
            attention = name.removesuffix("k_proj.weight")
            tensors |= {f"{attention}k_scale": torch.tensor([0.01]), f"{attention}v_scale": torch.tensor([0.01])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": scheme,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": scheme}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: digit, filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]}
  - {name: raw, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

CHOOSE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def make_tasks(folder: Path) -> Path:
    """Tasks tiny_generate and tiny_choose on 24 rows; a group tiny_group of two choosers with 24 and 8 rows."""
    folder.mkdir(parents=True)
    for name, body, rows in (
        ("tiny_generate", GENERATE, 24),
        ("tiny_choose", CHOOSE, 24),
        ("tiny_part_a", CHOOSE, 24),
        ("tiny_part_b", CHOOSE, 8),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(rows)))
        files = f"data_files: {{test: {data}, train: {data}}}"
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{{files}}}\ntest_split: test\nfewshot_split: train\n"
        )
        (folder / f"{name}.yaml").write_text(head + "metadata: {version: 3.0}" + body)
    parts = "group: tiny_group\ntask: [tiny_part_a, tiny_part_b]\n"
    (folder / "group.yaml").write_text(parts + "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    return folder


def _row(i: int) -> dict[str, object]:
    return {"question": f"{i} plus {i % 7} is", "choices": [str(i + i % 7), str(i + 1 + i % 5), str(i)]}


def make_suite(task_dir: Path, **tasks: TaskSpec) -> EvalSuite:
    """Seed 7; both plain tasks when none is named."""
    wanted = tasks or {"tiny_generate": TaskSpec(num_fewshot=2, samples=10), "tiny_choose": TaskSpec(num_fewshot=2)}
    return EvalSuite(name="tiny", tasks=wanted, task_dir=str(task_dir), engine={"max_model_len": 256}, seed=7)


def processes_of(folder: Path) -> dict[int, str]:
    """Processes of the evaluation in `folder`: those whose command line names it, and what they have started.

    pid -> command.
    """
    commands, parents = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            commands[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid for pid, command in commands.items() if f"{folder}/request.json" in command}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: commands[pid] for pid in found}
