"""What an evaluation needs, made tiny: models, tasks, suites, requests, and interpreters in the place of python."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fp8pipe.config import EvalSuite, ServingWorkload, TaskSpec
from fp8pipe.evaluate import Settles, evaluate, request_for
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import EngineFacts, EvalReport
from support.processes import family, processes


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
    """compressed-tensors, per tensor, static activations, FP8 KV cache. The scales are guesses, which vLLM accepts."""
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
    """Tasks tiny_generate and tiny_choose with 24 documents; tiny_group of two choosing tasks with 24 and 8."""
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
    """A suite with seed 7, of both plain tasks unless others are named."""
    wanted = tasks or {"tiny_generate": TaskSpec(num_fewshot=2, samples=10), "tiny_choose": TaskSpec(num_fewshot=2)}
    return EvalSuite(name="tiny", tasks=wanted, task_dir=str(task_dir), engine={"max_model_len": 256}, seed=7)


def make_full_suite(task_dir: Path) -> EvalSuite:
    """Both plain tasks, the generations of a baseline twice, and a timed workload."""
    suite = make_suite(
        task_dir,
        tiny_generate=TaskSpec(num_fewshot=2, samples=10, repeat=True),
        tiny_choose=TaskSpec(num_fewshot=2),
    )
    workload = ServingWorkload(num_prompts=4, input_len=32, output_len=8, max_concurrency=2)
    return suite.model_copy(update={"serving": workload})


def ask(model: Path, suite: EvalSuite | None = None, **options: Any) -> EvalRequest:
    """A request with the fields that most tests do not care about filled in; without a suite, for a task `t`."""
    suite = suite or EvalSuite(name="tiny", tasks={"t": TaskSpec()})
    return request_for(model, suite, **({"role": "baseline", "model_id": "m", "fingerprint": "f"} | options))


def evaluate_by(
    python: str, request: EvalRequest, folder: Path, progress: Progress = quiet, settles: Settles | None = None
) -> EvalReport:
    """`evaluate` with a worker that this interpreter runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python)
        return evaluate(request, folder, settles=settles, progress=progress)


INTERPRETER = """\
#!{python} -IS
import json, os, sys, time
from pathlib import Path
if sys.argv[1] != "-m":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])  # the guard of `supervise`
path = Path(sys.argv[-1])
with (path.parent / "started").open("a") as started:
    started.write("x")

def report():
    request, facts = json.loads(path.read_text()), json.loads({report!r})
    facts |= {{name: request[name] for name in ("role", "fingerprint", "retries")}}
    path.with_name("report.json").write_text(json.dumps(facts))

{worker}
"""


def interpreter(folder: Path, worker: str = "report()") -> str:
    """A program in the place of python whose worker notes in `started` that it ran, and runs this code instead."""
    path = folder / "python"
    code, report = textwrap.dedent(worker), empty_report().model_dump_json()
    path.write_text(INTERPRETER.format(python=sys.executable, report=report, worker=code))
    path.chmod(0o755)
    return str(path)


def empty_report() -> EvalReport:
    """Of a baseline, nothing scored."""
    engine = EngineFacts(
        linear_kernels=(),
        attention_backend="",
        kv_cache_dtype="auto",
        quantization=None,
        dtype="bfloat16",
        max_model_len=1,
        arguments={},
        device_class="cpu",
        device_name="cpu",
        plugin=None,
    )
    return EvalReport(
        role="baseline",
        model_id="m",
        fingerprint="f",
        suite="tiny",
        suite_digest="d",
        engine=engine,
        tasks=(),
        add_bos_token=True,
        chat_template_hash=None,
        tokenizer_hash="t",
        seeds={},
        versions={},
        table="",
        seconds={},
    )


LOOKER = """\
#!{python} -IS
import os, sys
from pathlib import Path
if sys.argv[1] != "-m":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])  # the guard of `supervise`
os.environ["LOOKER"] = {worker!r}
os.execv({python!r}, [{python!r}, {script!r}, sys.argv[-1]])
"""


def looker(folder: Path, worker: str = "") -> str:
    """A program in the place of python that runs the worker with an engine in which nothing is scored. It notes in
    `started` that it ran, and in `scored` each look that it measures, after which it runs this code."""
    path = folder / "looker"
    script = str(Path(__file__).with_name("looker.py"))
    path.write_text(LOOKER.format(python=sys.executable, worker=textwrap.dedent(worker), script=script))
    path.chmod(0o755)
    return str(path)


def processes_of(folder: Path) -> dict[int, str]:
    """The processes whose command line names the request in `folder`, and all that they started: pid -> command."""
    return family(pid for pid, (_, command) in processes().items() if f"{folder}/request.json" in command)
