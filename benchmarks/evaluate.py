"""What an evaluation through fp8pipe costs beyond lm-eval called directly, on the same questions, as a ratio.

    python -m benchmarks.evaluate [--rounds 3] [--documents 2000] [--page docs/evaluation.md]
    python -m benchmarks.evaluate --task choosing [--rounds 1] [--documents 2500] [--page docs/evaluation.md]
    python -m benchmarks.evaluate --task looks [--rounds 1] [--documents 400] [--page docs/evaluation.md]

Both sides score the same documents of a random two-layer Llama with the same engine arguments, each in a process of its
own, alternating. Ours is `fp8pipe.evaluate.evaluate` as a release uses it, without what lm-eval does not do (sample
generation, second run, serving figures); theirs is lm-eval's command line, in the set-up that makes it run on a CPU.
`counting` is short generations. `choosing` is questions with four answers of one letter after a context of 300 tokens,
so four likelihood requests a document. Peak memory is the largest resident set of any process of a side.

`looks` measures a quarter, a half and all of the documents of `counting`, both sides ours: one engine that waits for
the verdict on each look, and an engine for each look, which finds what those before it have scored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import page
from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.evaluate import evaluate, request_for
from fp8pipe.progress import ProgressEvent

TARGET = 1.05
"""The overhead that is allowed."""

SECTIONS = {"counting": "Beside lm-eval", "choosing": "Likelihoods beside lm-eval", "looks": "One engine for all looks"}
"""Tasks, and the section of the page on each."""

LOOKS = (0.25, 0.5, 1.0)

STARTS = "starts"
"""File in a side's folder with one letter for each engine that it started."""

MAX_LEN = 384

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


CHOOSING = """
task: choosing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [a, b, c, d]
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
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
    ids = {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig.from_dict({"max_position_embeddings": 512} | sizes | ids)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def make_task(folder: Path, documents: int) -> None:
    """Both tasks, on rows made here."""
    folder.mkdir()
    makers: dict[str, Callable[[int], dict[str, object]]] = {
        "counting": lambda i: {"question": f"{i} and {i % 7} are", "answer": str(i + i % 7)},
        "choosing": lambda i: {"question": " ".join(str(i + j) for j in range(75))[:300], "answer": i % 4},
    }
    for (name, row), text in zip(makers.items(), (TASK, CHOOSING), strict=True):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(documents)))
        (folder / f"{name}.yaml").write_text(text.format(data=data))


@dataclass(frozen=True)
class Cost:
    """What one run took: seconds on the clock, seconds of all cores in all its processes, GB of its largest process,
    and engines that it started."""

    wall: float
    cpu: float
    peak: float
    engines: int


def cost_of(side: str, *arguments: str | Path) -> Cost:
    """Run a side as a process of its own. Its processes have ended when it does, and count."""
    started = time.monotonic()
    run = subprocess.Popen([sys.executable, "-m", "benchmarks.evaluate", "--side", side, *arguments])
    _, status, used = os.wait4(run.pid, 0)
    if status:
        sys.exit(f"{side} failed")
    wall, starts = time.monotonic() - started, Path(arguments[-1]) / STARTS
    engines = len(starts.read_text()) if starts.exists() else 1
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9, engines)


def ours(task: str, model: Path, tasks: Path, output: Path, looks: tuple[float, ...] = (1.0,)) -> None:
    """One evaluation. Each start of an engine is noted in STARTS."""
    suite = EvalSuite(
        name=task, tasks={task: TaskSpec()}, task_dir=str(tasks), engine={"max_model_len": MAX_LEN}, sample_prompts=()
    )
    request = request_for(model, suite, role="baseline", model_id="tiny", fingerprint="tiny", looks=looks)
    notes = [""]

    def listen(event: ProgressEvent) -> None:
        if event.note != notes[-1]:
            notes.append(event.note)

    evaluate(request, output, settles=lambda report, look: False, progress=listen)
    with (output / STARTS).open("a") as starts:
        starts.write("x" * notes.count("starting vLLM"))


def one_engine(task: str, model: Path, tasks: Path, output: Path) -> None:
    """All looks by one engine, which waits for the verdict on each."""
    ours("counting", model, tasks, output, LOOKS)


def engine_each(task: str, model: Path, tasks: Path, output: Path) -> None:
    """An engine for each look."""
    for look in range(1, len(LOOKS) + 1):
        ours("counting", model, tasks, output, LOOKS[:look])


def theirs(task: str, model: Path, tasks: Path, output: Path) -> None:
    """lm-eval's command line."""
    output.mkdir()
    command = [sys.executable, "-m", "fp8pipe.evaluate.lm_eval", "run", "--model", "vllm", "--batch_size", "auto"]
    command += ["--model_args", f"pretrained={model},max_model_len={MAX_LEN},add_bos_token=True"]
    command += ["--tasks", task, "--include_path", str(tasks), "--log_samples", "--output_path", str(output)]
    with (output / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


SIDES = {"ours": ours, "theirs": theirs, "one engine": one_engine, "engine each": engine_each}


def measured(task: str, rounds: int, documents: int, folder: Path) -> list[tuple[Cost, Cost]]:
    """(ours, the other side) of each round; one unmeasured run of each first, so that files are cached for both."""
    sides = ("one engine", "engine each") if task == "looks" else ("ours", "theirs")
    model = make_model(folder / "model")
    make_task(folder / "warm", 8)
    make_task(folder / "tasks", documents)
    pairs: list[tuple[Cost, Cost]] = []
    for i in range(rounds + 1):
        tasks = folder / ("tasks" if i else "warm")
        mine, other = (cost_of(side, task, model, tasks, folder / f"{side}-{i}") for side in sides)
        pairs.append((mine, other))
        print(f"round {i}: {sides[0]} {mine}, {sides[1]} {other}", flush=True)
    return pairs[1:]


def table(task: str, pairs: list[tuple[Cost, Cost]], documents: int) -> str:
    """Markdown: medians, and the medians of the rounds' ratios."""
    rows = [row("seconds on the clock", [(a.wall, b.wall) for a, b in pairs])]
    rows.append(row("seconds of all cores", [(a.cpu, b.cpu) for a, b in pairs]))
    rows.append(row("largest process, GB", [(a.peak, b.peak) for a, b in pairs]))
    if task == "looks":
        starts = [(a.engines, b.engines) for a, b in pairs]
        intro = (
            f"Looks at a quarter, a half and all of {documents:,} generations of a random two-layer Llama in vLLM "
            f"on a CPU ({page.machine()}), whole processes, medians of {len(pairs)} alternating rounds: an engine for "
            "each look, and one that waits for the verdict on each. A large model takes minutes to start."
        )
        head = ("", "an engine each", "one engine", "ratio")
        return f"{page.prose(intro)}\n\n{page.table(head, [row('engine starts', starts), *rows])}"
    what = {"counting": f"{documents:,} short generations", "choosing": f"{4 * documents:,} likelihood requests"}[task]
    intro = (
        f"{what} of a random two-layer Llama in vLLM on a CPU ({page.machine()}), whole "
        f"processes, medians of {len(pairs)} alternating rounds. The target is a ratio of at most {TARGET:.2f}."
    )
    return f"{page.prose(intro)}\n\n{page.table(('seconds', 'lm-eval', 'fp8pipe evaluate', 'ratio'), rows)}"


def row(name: str, pairs: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    mine, direct = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return name, f"{direct:.1f}", f"{mine:.1f}", f"{ratio:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--task", choices=SECTIONS, default="counting")
    parser.add_argument("--side", nargs=5, metavar=("SIDE", "TASK", "MODEL", "TASKS", "OUTPUT"), help="one run")
    parser.add_argument("--page", type=Path, help="guide whose section on the task is replaced")
    options = parser.parse_args(arguments)
    if options.side is not None:
        side, task, *paths = options.side
        SIDES[side](task, *map(Path, paths))
        return
    with tempfile.TemporaryDirectory(prefix="fp8pipe-bench-") as folder:
        pairs = measured(options.task, options.rounds, options.documents, Path(folder))
        text = table(options.task, pairs, options.documents)
    print(text)
    if options.page is not None:
        page.put(options.page, SECTIONS[options.task], text)


if __name__ == "__main__":
    main()
