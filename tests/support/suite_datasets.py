"""The data sets that the shipped suites name, as synthetic rows with the real columns, configurations and splits.

`write_datasets(folder)` makes one folder per data set, as its repository would be; `put_on_hub` uploads them under the
real ids. What the rows say is nonsense; what they are called, how they nest and what the tasks' own code expects of
them is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
Splits = dict[str, Sequence[Row]]
"""split -> rows"""

LETTERS = "ABCDEFGHIJ"


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's task files."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def rows(count: int, make: Callable[[int], Row]) -> list[Row]:
    return [make(i) for i in range(count)]


def plain(i: int) -> str:
    return f"How many apples are {i} apples and {i % 7} apples?"


def arc(i: int) -> Row:
    choices = {"text": [str(i + i % 7), str(i), f"{i} pears", "none"], "label": list("ABCD")}
    return {"id": f"Mercury_{i}", "question": plain(i), "choices": choices, "answerKey": "ABCD"[i % 4]}


def hellaswag(i: int) -> Row:
    start, end = f"A man stands near {i} apples. ", "he"
    return {
        "ind": i,
        "activity_label": "Counting apples",
        "ctx_a": start,
        "ctx_b": end,
        "ctx": start + end.capitalize(),
        "endings": [f"{verb} {i} apples [title] and leaves." for verb in ("eats", "counts", "paints", "sings to")],
        "source_id": f"activitynet~v_{i}",
        "split": "val",
        "split_type": "indomain",
        "label": str(i % 4),
    }


def mmlu(subject: str) -> Callable[[int], Row]:
    return lambda i: {"question": plain(i), "subject": subject, "choices": ["1", "2", "3", "4"], "answer": i % 4}


def truthfulqa(i: int) -> Row:
    choices = [f"{i} apples weigh nothing.", f"{i} apples weigh something.", "Nobody knows."]
    return {
        "question": f"What do {i} apples weigh?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 1, 0]},
    }


def winogrande(i: int) -> Row:
    sentence = f"The man gave the woman {i} apples because _ was hungry."
    return {"sentence": sentence, "option1": "man", "option2": "woman", "answer": str(1 + i % 2)}


def gsm8k(i: int) -> Row:
    return {"question": plain(i), "answer": f"{i} and {i % 7} are {i + i % 7}.\n#### {i + i % 7}"}


def mmlu_pro(i: int) -> Row:
    return {
        "question_id": i,
        "question": plain(i),
        "options": [str(i + k) for k in range(10 if i % 2 else 7)],
        "answer": LETTERS[i % 7],
        "answer_index": i % 7,
        "cot_content": "A: Let's think step by step.",
        "category": "math",
        "src": "synthetic",
    }


def gpqa(i: int) -> Row:
    wrong = {f"Incorrect Answer {k}": f"{i + k} apples [title]" for k in (1, 2, 3)}
    return {"Record ID": f"rec{i}", "Question": plain(i), "Correct Answer": f"{i} apples"} | wrong


def math(kind: str) -> Callable[[int], Row]:
    def make(i: int) -> Row:
        solution = f"We add: ${i} + 1 = {i + 1}$, so the answer is $\\boxed{{{i + 1}}}$."
        return {
            "problem": f"Compute ${i} + 1$.",
            "level": "Level 5" if i % 2 else "Level 1",
            "type": kind,
            "solution": solution,
        }

    return make


INSTRUCTIONS: Sequence[tuple[str, Row]] = (
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
    ("punctuation:no_comma", {}),
    ("keywords:existence", {"keywords": ["apples", "pears"]}),
)
IFEVAL_KWARGS = ("capital_frequency", "capital_relation", "num_sentences", "relation", "keywords")


def ifeval(i: int) -> Row:
    """Two instructions; each has every key there is, null where it does not apply, as in the real data set."""
    chosen = [INSTRUCTIONS[i % 4], INSTRUCTIONS[(i + 1) % 4]]
    return {
        "key": 1000 + i,
        "prompt": f"Write about {i} apples. Use no comma.",
        "instruction_id_list": [name for name, _ in chosen],
        "kwargs": [{key: kwargs.get(key) for key in IFEVAL_KWARGS} for _, kwargs in chosen],
    }


def musr(i: int) -> Row:
    choices = ["the baker", "the miller", "the sailor"]
    return {
        "narrative": f"Somebody ate {i} apples. " * 20,
        "question": "Who ate the apples?",
        "choices": str(choices),
        "answer_index": i % 3,
        "answer_choice": choices[i % 3],
    }


def page(i: int) -> Row:
    text = " ".join(f"The farmer counted {k} apples , and the baker ate {k % 5} ." for k in range(150 + 150 * i))
    return {"page": f" = Apples {i} = \n \n {text} \n"}


def arrows(i: int) -> Row:
    return {"prompt": f"ant>cow cow>eel eel>. ? ant {i}", "answer": "cow eel"}


def bbh() -> dict[str, Splits]:
    """Inputs and answers are the examples in the task files: each sub-task has its own form of answer."""
    found: dict[str, Splits] = {}
    for path in sorted((lm_eval_tasks() / "leaderboard" / "bbh_mc").glob("*.yaml")):
        task = yaml.safe_load(path.read_text())
        if "dataset_name" in task:
            found[task["dataset_name"]] = {"test": task["fewshot_config"]["samples"]}
    return found


def mmlu_subjects() -> list[str]:
    files = sorted((lm_eval_tasks() / "mmlu" / "default").glob("mmlu_*.yaml"))
    return [yaml.safe_load(path.read_text())["dataset_name"] for path in files]


MATH = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")


def datasets() -> dict[str, dict[str, Splits]]:
    """data set id -> configuration -> split -> rows; `default` where a data set has one configuration."""
    ten = {"train": rows(30, arc), "validation": rows(4, arc), "test": rows(10, arc)}
    musr_splits = ("murder_mysteries", "object_placements", "team_allocation")
    return {
        "allenai/ai2_arc": {"ARC-Easy": ten, "ARC-Challenge": ten},
        "Rowan/hellaswag": {"default": {"train": rows(12, hellaswag), "validation": rows(6, hellaswag)}},
        "cais/mmlu": {
            name: {"test": rows(3, mmlu(name)), "validation": rows(2, mmlu(name)), "dev": rows(5, mmlu(name))}
            for name in mmlu_subjects()
        },
        "truthfulqa/truthful_qa": {"multiple_choice": {"validation": rows(6, truthfulqa)}},
        "allenai/winogrande": {"winogrande_xl": {"train": rows(10, winogrande), "validation": rows(6, winogrande)}},
        "openai/gsm8k": {"main": {"train": rows(12, gsm8k), "test": rows(8, gsm8k)}},
        "TIGER-Lab/MMLU-Pro": {"default": {"test": rows(6, mmlu_pro), "validation": rows(6, mmlu_pro)}},
        "SaylorTwift/bbh": bbh(),
        "Idavidrein/gpqa": {f"gpqa_{name}": {"train": rows(4, gpqa)} for name in ("main", "extended", "diamond")},
        "DigitalLearningGmbH/MATH-lighteval": {
            name: {"train": rows(2, math(name)), "test": rows(6, math(name))} for name in (*MATH, "precalculus")
        },
        "wis-k/instruction-following-eval": {"default": {"train": rows(6, ifeval)}},
        "TAUR-Lab/MuSR": {"default": {name: rows(4, musr) for name in musr_splits}},
        "EleutherAI/wikitext_document_level": {"wikitext-2-raw-v1": {"test": rows(3, page)}},
        "fp8pipe-demo/arrows-eval": {"default": {"test": rows(8, arrows)}},
    }


def write_datasets(folder: Path) -> Path:
    """folder/<id>/: a card that lists configurations and splits, and one file of lines for each."""
    for name, configurations in datasets().items():
        card = [
            {
                "config_name": configuration,
                "data_files": [{"split": split, "path": f"{configuration}/{split}.jsonl"} for split in splits],
            }
            for configuration, splits in configurations.items()
        ]
        root = folder / name
        for configuration, splits in configurations.items():
            (root / configuration).mkdir(parents=True)
            for split, content in splits.items():
                lines = "".join(json.dumps(row) + "\n" for row in content)
                (root / configuration / f"{split}.jsonl").write_text(lines)
        (root / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")
    return folder


def put_on_hub(folder: Path, endpoint: str, token: str) -> None:
    """Upload what `write_datasets` wrote."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    for name in datasets():
        api.create_repo(name, repo_type="dataset", exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder / name, commit_message="rows")


def write_punkt(folder: Path) -> Path:
    """An NLTK data folder with a sentence splitter that knows two abbreviations, in NLTK's own format."""
    language = folder / "tokenizers" / "punkt_tab" / "english"
    language.mkdir(parents=True)
    (language / "abbrev_types.txt").write_text("dr\nmr")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (language / name).touch()
    return folder
