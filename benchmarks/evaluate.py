"""What an evaluation through fp8pipe costs beyond lm-eval called directly, on the same questions, as a ratio.

    python -m benchmarks.evaluate [--rounds 3] [--documents 2000] [--page docs/evaluation.md]

Both sides score the same documents of a random two-layer Llama with the same engine arguments, each in a process of its
own, alternating. Ours is `fp8pipe.evaluate.evaluate` as a release uses it, without what lm-eval does not do (sample
generation, second run, serving figures); theirs is lm-eval's command line, in the set-up that makes it run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import page
from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.evaluate import evaluate, request_for

TARGET = 1.05
"""The overhead that is allowed."""

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"

TASK = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
num_fewshot: 0
metadata: {{version: 1.0}}
"""


def make_model(folder: Path) -> Path:
    """Two layers of a Llama, random, whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig.from_dict({"max_position_embeddings": 512} | sizes | ids)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def make_task(folder: Path, documents: int) -> None:
    """A task of short generations on rows made here."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    rows = ({"question": f"{i} and {i % 7} are", "answer": str(i + i % 7)} for i in range(documents))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "counting.yaml").write_text(TASK.format(data=data))


@dataclass(frozen=True)
class Cost:
    """What one run took: seconds on the clock, and seconds of all cores in all its processes."""

    wall: float
    cpu: float


def cost_of(run: Callable[[], object]) -> Cost:
    """Run it; its processes have ended when it returns."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(time.monotonic() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def ours(model: Path, tasks: Path, output: Path) -> None:
    """One evaluation."""
    suite = EvalSuite(
        name="counting",
        tasks={"counting": TaskSpec()},
        task_dir=str(tasks),
        engine={"max_model_len": 256},
        sample_prompts=(),
    )
    evaluate(request_for(model, suite, role="baseline", model_id="tiny", fingerprint="tiny"), output)


def theirs(model: Path, tasks: Path, output: Path) -> None:
    """lm-eval's command line."""
    output.mkdir()
    command = [sys.executable, "-m", "fp8pipe.evaluate.lm_eval", "run", "--model", "vllm"]
    command += ["--model_args", f"pretrained={model},max_model_len=256,add_bos_token=True", "--batch_size", "auto"]
    command += ["--tasks", "counting", "--include_path", str(tasks), "--log_samples", "--output_path", str(output)]
    with (output / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def measured(rounds: int, documents: int, folder: Path) -> list[tuple[Cost, Cost]]:
    """(ours, theirs) of each round; one unmeasured run of each first, so that files are cached for both."""
    model = make_model(folder / "model")
    make_task(folder / "tasks", documents)
    pairs: list[tuple[Cost, Cost]] = []
    for i in range(rounds + 1):
        mine = cost_of(partial(ours, model, folder / "tasks", folder / f"ours-{i}"))
        pairs.append((mine, cost_of(partial(theirs, model, folder / "tasks", folder / f"theirs-{i}"))))
        print(f"round {i}: ours {pairs[-1][0]}, lm-eval {pairs[-1][1]}", flush=True)
    return pairs[1:]


def table(pairs: list[tuple[Cost, Cost]], documents: int) -> str:
    """Markdown: medians, and the medians of the rounds' ratios."""
    rows = [row("on the clock", [(a.wall, b.wall) for a, b in pairs])]
    rows.append(row("of all cores", [(a.cpu, b.cpu) for a, b in pairs]))
    intro = (
        f"{documents:,} short generations of a random two-layer Llama in vLLM on a CPU ({page.machine()}), whole "
        f"processes, medians of {len(pairs)} alternating rounds. The target is a ratio of at most {TARGET:.2f}."
    )
    return f"{page.prose(intro)}\n\n{page.table(('seconds', 'lm-eval', 'fp8pipe evaluate', 'ratio'), rows)}"


def row(name: str, pairs: list[tuple[float, float]]) -> tuple[str, ...]:
    mine, direct = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return name, f"{direct:.1f}", f"{mine:.1f}", f"{ratio:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--page", type=Path, help="guide whose section `Beside lm-eval` is replaced")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-bench-") as folder:
        text = table(measured(options.rounds, options.documents, Path(folder)), options.documents)
    print(text)
    if options.page is not None:
        page.put(options.page, "Beside lm-eval", text)


if __name__ == "__main__":
    main()
