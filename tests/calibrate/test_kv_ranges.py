"""KV ranges: attention that has none is named with the reason, and attention that caches nothing is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.calibration import STATIC_KV, TENSOR_KV, calibrated, make_model, run_calibration, with_data, write_dataset
from transformers.models.llama import modeling_llama

from fp8pipe.errors import UnsupportedArchitecture


def test_latent_attention_is_named_with_the_reason(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "deepseek_v3")
    found = calibrated(tmp_path, TENSOR_KV)
    assert set(found.kv_absent) == {f"model.layers.{layer}.self_attn" for layer in range(4)}
    assert all("MLA" in reason for reason in found.kv_absent.values())


def test_layers_without_keys_and_values_are_named_with_the_reason(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen3_next")
    found = calibrated(tmp_path, TENSOR_KV)
    assert set(found.kv) == {"model.layers.3.self_attn"}
    assert set(found.kv_absent) == {f"model.layers.{layer}" for layer in range(3)}
    assert all("linear attention" in reason for reason in found.kv_absent.values())


def test_attention_that_caches_nothing_is_an_error_that_names_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = modeling_llama.LlamaAttention.forward

    def forget(self: Any, *args: Any, past_key_values: Any = None, keeps: bool = False, **kwargs: Any) -> Any:
        if keeps:  # it could, and never does
            past_key_values.update()
        return attend(self, *args, past_key_values=None, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forget)
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    with pytest.raises(UnsupportedArchitecture, match=r"layers\.0\.self_attn: LlamaAttention cached no"):
        run_calibration(llama, recipe, tmp_path / "out")
