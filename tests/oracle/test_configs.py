"""What an edit of config.json means: another model, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from fp8pipe.evaluate import cpu_platform, environment
from fp8pipe.machine import survey
from fp8pipe.machine.device import Device
from fp8pipe.oracle import basis, configs, configs_probe
from fp8pipe.oracle.cache import cache_dir
from fp8pipe.oracle.configs import Comparison, Difference, compare, compare_each
from fp8pipe.oracle.disk import Unsupported

Config = dict[str, Any]

SOURCE: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 96,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "smell": "sweet",
}

OTHER_MODEL: dict[str, Config] = {
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "rms_norm_eps": {"rms_norm_eps": 1e-5},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "layer_types": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    "num_experts_per_tok": {"num_experts_per_tok": 1},
    "norm_topk_prob": {"norm_topk_prob": None},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "hidden_act": {"hidden_act": "gelu"},
    "dtype": {"dtype": "float16"},
    "model_type": {"model_type": "mixtral"},
    "architectures": {"architectures": ["MixtralForCausalLM"]},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}},
    "unreadable": {"num_attention_heads": "many"},
}
"""By what is edited; None drops a key."""
SAME_MODEL: dict[str, Config] = {
    "transformers_version": {"transformers_version": "4.1.0"},
    "defaults": {"initializer_range": 0.02, "attention_bias": False, "use_sliding_window": False},
    "number": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    "old_names": {"dtype": None, "torch_dtype": "bfloat16", "rope_parameters": None, "rope_theta": 10000.0},
    "no_dtype": {"dtype": None},
    "quantization": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
}
NOBODY_ASKS = {"colour": {"colour": "blue"}, "smell": {"smell": None}}
ONLY_VLLM_ASKS = {"dual_chunk": {"dual_chunk_attention_config": {"chunk_size": 8}}}


def _edited(config: Config, edit: Config) -> Config:
    merged = dict(reversed((config | edit).items()))
    return {key: value for key, value in merged.items() if value is not None}


@pytest.fixture(scope="module")
def answers() -> dict[str, Comparison]:
    edits = OTHER_MODEL | SAME_MODEL | NOBODY_ASKS | ONLY_VLLM_ASKS
    found = compare_each([_edited(SOURCE, edit) for edit in edits.values()], SOURCE, dtype="bfloat16")
    return dict(zip(edits, found, strict=True))


@pytest.mark.parametrize("edit", OTHER_MODEL)
def test_edit_that_makes_another_model_is_seen(answers: dict[str, Comparison], edit: str) -> None:
    assert any(difference.readers for difference in answers[edit].differences)


@pytest.mark.parametrize("edit", SAME_MODEL)
def test_other_spelling_of_the_same_model_is_no_difference(answers: dict[str, Comparison], edit: str) -> None:
    assert not answers[edit].differences


def test_key_that_no_library_asks_for_is_told_from_one_that_vllm_alone_does(answers: dict[str, Comparison]) -> None:
    (colour,), (smell,), (chunks,) = (answers[edit].differences for edit in ("colour", "smell", "dual_chunk"))
    assert colour.readers == smell.readers == ()
    assert chunks.readers == (("vLLM",) if find_spec("vllm") else ())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Nothing is cached yet; says what is."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    return lambda: sorted(cache_dir("configs").glob("*.json"))


def test_model_that_no_library_has_is_not_judged(kept: Callable[[], list[Path]]) -> None:
    theirs = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "its.Own"}}
    answer = compare(theirs | {"layers": 3}, theirs, dtype=None)
    assert answer == Comparison(readers=(), differences=())
    assert kept(), "a child that fails gives the same answer, which is not kept"


# ---------------------------------------------------------------------------------------------- what is kept


COLOUR = Difference(key="colour", expected="absent", found="'blue'", readers=())


@pytest.mark.parametrize(
    ("answer", "is_kept"),
    [
        (Comparison(readers=("transformers",), differences=(COLOUR,)), True),
        (Comparison(readers=("transformers",), differences=(), unheard={"vLLM": "ImportError: torchaudio"}), False),
        (Comparison(readers=("transformers",), differences=(COLOUR.model_copy(update={"key": ""}),)), False),
    ],
    ids=["settled", "unheard", "unreadable"],
)
def test_only_what_another_run_must_answer_alike_is_kept(
    kept: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch, answer: Comparison, is_kept: bool
) -> None:
    monkeypatch.setattr(configs, "compare_each", lambda *_, **__: [answer])
    assert [compare({"a": 1}, {}, dtype=None), len(kept())] == [answer, int(is_kept)]


def test_other_code_versions_device_and_settings_are_asked_again(
    kept: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "compare_each", lambda *_, **__: [Comparison(readers=(), differences=())])
    installed = survey.version

    def count() -> int:
        compare({"a": 1}, {}, dtype=None)
        return len(kept())

    assert [count(), count()] == [1, 1]
    for change in (
        lambda: monkeypatch.setattr(survey, "version", lambda n: "9" if n == "compressed-tensors" else installed(n)),
        lambda: monkeypatch.setattr(basis, "detect", lambda: Device("hopper", "NVIDIA H100")),
        lambda: monkeypatch.setenv("VLLM_MLA_DISABLE", "1"),
        lambda: monkeypatch.setattr(basis, "_code", lambda: "other"),
    ):
        before = len(kept())
        change()
        assert [count(), count()] == [before + 1, before + 1]
    asking = (configs_probe, environment, cpu_platform)
    assert {Path(str(module.__file__)) for module in asking} <= set(basis.code_files())


# ---------------------------------------------------------------------------------------------- who cannot tell


class Broken:
    """A library that reads configs as transformers does, and fails at the rest."""

    name = "broken"

    def __init__(self, *, reads: Exception | None = None, builds: Exception | None = None) -> None:
        self._reads, self._builds = reads, builds

    def read(self, folder: Path) -> PreTrainedConfig:
        if self._reads is not None:
            raise self._reads
        return AutoConfig.from_pretrained(folder)

    def build(self, folder: Path) -> None:
        """Only the checkpoint's own config, which it asks for its colour."""
        if self._builds is not None:
            raise self._builds
        config = self.read(folder)
        if not hasattr(config, "colour"):
            raise ValueError("no colour")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint's config, with a key that no class declares, and the source's."""
    found = tmp_path / "ours", tmp_path / "theirs"
    for folder, config in zip(found, (SOURCE | {"colour": "blue", "smell": "sour"}, SOURCE), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("error", [MemoryError(), ImportError("No module named 'torchaudio'")])
def test_library_that_could_not_read_here_is_named(folders: tuple[Path, Path], error: Exception) -> None:
    found = Comparison(**configs_probe.compare(*folders, "bfloat16", [Broken(reads=error)]))
    assert found.readers == () and type(error).__name__ in found.unheard["broken"]


def test_model_that_can_be_built_tells_where_the_source_s_cannot(folders: tuple[Path, Path]) -> None:
    found = Comparison(**configs_probe.compare(*folders, "bfloat16", [Broken()]))
    assert {one.key: one.readers for one in found.differences} == {"colour": ("broken",), "smell": ()}
    assert not found.unheard


def test_library_that_builds_neither_model_may_ask_for_every_key(folders: tuple[Path, Path]) -> None:
    limit = RuntimeError("Sparse Attention is not supported on CPU.")
    found = Comparison(**configs_probe.compare(*folders, "bfloat16", [Broken(builds=limit)]))
    assert {one.key: one.readers for one in found.differences} == {"colour": ("broken",), "smell": ("broken",)}
    assert "Sparse Attention" in found.unheard["broken"]


def test_model_that_transformers_cannot_build_is_not_taken_for_built(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SOURCE | {"num_hidden_layers": 100_000}))
    with pytest.raises(Unsupported):
        configs_probe._Transformers().build(tmp_path)
