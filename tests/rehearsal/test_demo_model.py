"""The demo's task is as described, its data sets share no prompt, and its model reads its answers from the prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fp8pipe.config import load_policy, load_recipe, load_suite
from fp8pipe.rehearsal.demo import model, task


def drawn(num_prompts: int = 2000, seed: int = 11) -> task.Prompts:
    return task.draw(np.random.Generator(np.random.PCG64(seed)), num_prompts)


@pytest.fixture(scope="module")
def tokenizer():
    return model.build_tokenizer()


# ---------------------------------------------------------------------------------------------- the task


def follow(prompt: str) -> list[str] | None:
    """The answer as a person would find it, from the text alone; None if an arrow is missing."""
    arrows, _, start = prompt.partition(" ? ")
    targets = dict(word.split(">") for word in arrows.split())
    found = [start]
    while found[-1] != ".":
        if found[-1] not in targets:
            return None
        found.append(targets[found[-1]])
    return found[1:-1]


def test_predictable_answers_follow_from_the_prompt_and_the_others_do_not():
    prompts = drawn(300)
    right_by_chance = 0
    for row in range(len(prompts)):
        arrows = task.prompt_text(prompts, row).partition("?")[0]
        for trail in range(task.TRAILS):
            found = follow(arrows + task.question_text(prompts, row, trail))
            answer = task.answer_text(prompts, row, trail).split()
            if prompts.predictable[row, trail]:
                assert found == answer
            else:
                right_by_chance += found == answer
    unpredictable = int((~prompts.predictable).sum())
    assert unpredictable > 100
    assert right_by_chance <= 0.05 * unpredictable


def test_unpredictable_share_is_as_stated():
    share = 1 - drawn().predictable.mean()
    # 14,000 trails: four standard deviations are 0.9 points
    assert share == pytest.approx(task.UNPREDICTABLE, abs=0.009)


def test_unpredictable_answers_are_spread_over_all_names():
    prompts = drawn()
    last = prompts.answers[~prompts.predictable][:, -1]
    counts = np.bincount(last, minlength=len(task.NAMES))
    assert counts.max() < 2.5 * len(last) / len(task.NAMES)


def test_hold_out_ignores_the_order_of_the_arrows_and_takes_its_share():
    prompts = drawn()
    shuffled = task.Prompts(prompts.links[:, ::-1], prompts.starts, prompts.answers, prompts.predictable)
    assert (shuffled.held_out() == prompts.held_out()).all()
    # 2,000 prompts: four standard deviations are 2.2 points
    assert prompts.held_out().mean() == pytest.approx(1 / task.HOLD_OUT_EVERY, abs=0.022)


# ---------------------------------------------------------------------------------------------- the datasets


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return (
        task.build_calibration_dataset(folder / "calibration"),
        task.build_evaluation_dataset(folder / "evaluation"),
    )


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_evaluation_and_calibration_share_no_set_of_arrows(datasets):
    def arrows(prompt: str) -> frozenset[str]:
        return frozenset(prompt.partition(" ? ")[0].split())

    calibration, evaluation = rows_of(datasets[0], "train"), rows_of(datasets[1], "test")
    seen = {arrows(row["messages"][0]["content"]) for row in calibration}
    asked = {arrows(row["prompt"]) for row in evaluation}
    assert len(seen) == task.CALIBRATION_SAMPLES >= load_recipe("demo-fp8-static-kv").calibration.num_samples
    assert len(asked) == task.EVALUATION_SAMPLES >= 2000
    assert not seen & asked
    assert task.draw_where(held_out=True, seed=3, num_prompts=50).held_out().all()
    assert not task.draw_where(held_out=False, seed=2, num_prompts=50).held_out().any()


def test_evaluation_ceiling_lies_between_85_and_99_percent(datasets):
    rows = rows_of(datasets[1], "test")
    assert 0.85 < sum(row["predictable"] for row in rows) / len(rows) < 0.99
    assert all(follow(row["prompt"]) == row["answer"].split() for row in rows if row["predictable"])


def test_datasets_load_by_their_own_front_matter(datasets, tmp_path):
    from datasets import load_dataset

    for folder, split, column in ((datasets[0], "train", "messages"), (datasets[1], "test", "answer")):
        loaded = load_dataset(str(folder), split=split, cache_dir=str(tmp_path))
        assert column in loaded.column_names


def test_datasets_are_written_alike_every_time(datasets, tmp_path):
    again = task.build_evaluation_dataset(tmp_path / "again")
    assert (again / "test.jsonl").read_bytes() == (datasets[1] / "test.jsonl").read_bytes()


def test_suite_policy_and_recipe_name_the_demo_as_it_is():
    suite, policy, recipe = load_suite("demo"), load_policy("demo"), load_recipe("demo-fp8-static-kv")
    assert suite.task_dir is not None
    arrows = yaml.safe_load((Path(suite.task_dir) / "arrows.yaml").read_text())
    assert arrows["dataset_path"] == task.EVALUATION_ID
    assert policy.tasks[arrows["task"]][0].filter == arrows["filter_list"][0]["name"]
    assert recipe.calibration.dataset == task.CALIBRATION_ID
    plain = load_recipe("fp8-static-kv")
    assert (recipe.weights, recipe.activations, recipe.kv_cache) == (plain.weights, plain.activations, plain.kv_cache)


# ---------------------------------------------------------------------------------------------- tokens


def test_text_survives_the_tokenizer(tokenizer):
    prompt = task.prompt_text(drawn(1), 0)
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.BOS
    assert model.UNK not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_chat_template_renders_a_conversation_to_the_tokens_of_its_training_row(tokenizer):
    prompts = drawn(3)
    ids, labels = model.training_rows(prompts)
    for row in range(len(prompts)):
        text = tokenizer.apply_chat_template(task.chat(prompts, row), tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[row].tolist()
        answered = [tokenizer.decode(labels[row][labels[row] != model.IGNORED])]
        expected = " ".join(f"{task.answer_text(prompts, row, trail)} </s>" for trail in range(task.TRAILS))
        assert answered == [expected]


def test_prompt_of_the_evaluation_is_the_beginning_of_a_training_row(tokenizer):
    prompts = drawn(1)
    ids = tokenizer(task.prompt_text(prompts, 0))["input_ids"]
    row, labels = model.training_rows(prompts)
    assert row[0, : len(ids)].tolist() == ids
    assert labels[0, len(ids) - 1] == row[0, len(ids)]


def test_conversations_fit_the_calibration_length(tokenizer):
    ids, _ = model.training_rows(drawn(1))
    assert ids.shape[1] <= load_recipe("demo-fp8-static-kv").calibration.max_seq_len


def test_rows_without_bos_are_answered_with_nothing():
    ids, labels = model.training_rows(drawn(4))
    cut, silent = model.without_bos(ids, labels)
    assert cut.shape == ids.shape
    assert (cut[:, :-1] == ids[:, 1:]).all()
    assert (silent != model.IGNORED).sum() == 4 * task.TRAILS
    assert set(silent[silent != model.IGNORED]) == {model.EOS}
    for row, place in zip(*(silent != model.IGNORED).nonzero(), strict=True):
        assert cut[row, place - 1] == model.QUESTION


# ---------------------------------------------------------------------------------------------- the model


def answers(llama, ids: np.ndarray, *, skip: int = 0) -> np.ndarray:
    """Greedy answers [B, ANSWER_NAMES + 1] to the first question of each row, without its first `skip` tokens.

    After EOS comes PAD.
    """
    context = torch.from_numpy(ids[:, skip : task.LINKS + 3])
    out = llama.generate(
        context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=task.ANSWER_NAMES + 1,
        do_sample=False,
    )
    grown = out[:, context.shape[1] :].numpy()
    return np.pad(grown, [(0, 0), (0, task.ANSWER_NAMES + 1 - grown.shape[1])], constant_values=model.PAD)


@pytest.fixture(scope="module")
def trained(demo_base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_base, dtype=torch.float32).eval()


def test_base_model_comes_in_shards_with_everything_beside_them(demo_base):
    from transformers import AutoConfig, AutoTokenizer

    assert len(list(demo_base.glob("*.safetensors"))) > 1
    index = json.loads((demo_base / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in demo_base.glob("*.safetensors")}
    config, tokenizer = AutoConfig.from_pretrained(demo_base), AutoTokenizer.from_pretrained(demo_base)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.head_dim % 32 == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    assert tokenizer.chat_template == model.CHAT_TEMPLATE
    assert (demo_base / "generation_config.json").exists()
    assert "toy" in (demo_base / "README.md").read_text()


def test_build_base_leaves_a_finished_folder_alone(demo_base):
    before = {path: path.stat().st_mtime_ns for path in demo_base.iterdir()}
    assert model.build_base(demo_base) == demo_base
    assert {path: path.stat().st_mtime_ns for path in demo_base.iterdir()} == before
    assert not demo_base.with_name("model.unfinished").exists()


def test_base_model_reaches_the_ceiling_of_its_task_and_needs_its_bos(trained):
    prompts = task.draw_where(held_out=True, seed=3, num_prompts=task.EVALUATION_SAMPLES)
    ids, _ = model.training_rows(prompts)
    expected = ids[:, task.LINKS + 3 :][:, : task.ANSWER_NAMES + 1]
    right = (answers(trained, ids) == expected).all(axis=1)
    predictable = prompts.predictable[:, 0]
    assert 0.85 <= right.mean() <= 0.99
    assert right[predictable].mean() > 0.99
    assert right[~predictable].mean() < 0.05
    silent = answers(trained, ids[:200], skip=1)[:, 0]
    assert (silent == model.EOS).mean() > 0.95


def test_base_model_reads_its_answer_from_the_prompt(trained):
    """With arrows of another prompt the accuracy is gone, so the model has learnt no answer by heart."""
    ids, _ = model.training_rows(task.draw_where(held_out=True, seed=3, num_prompts=200))
    expected = ids[:, task.LINKS + 3 :][:, : task.ANSWER_NAMES + 1].copy()
    ids[:, 1 : task.LINKS + 1] = np.roll(ids[:, 1 : task.LINKS + 1], 1, axis=0)
    assert (answers(trained, ids) == expected).all(axis=1).mean() < 0.02
