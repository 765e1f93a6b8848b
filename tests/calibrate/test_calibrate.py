"""Calibration: ranges equal those of a whole-model reference, with one layer in memory, through kills and bad data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from safetensors.torch import load_file, save_file
from support import DATA, TESTS
from support.calibration import (
    ARCHITECTURES,
    MOE_NAMES,
    PEER_RECIPE,
    STATIC_KV,
    TEXTS,
    calibrated,
    make_model,
    planned,
    run_calibration,
    with_data,
    write_dataset,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import DynamicCache

from fp8pipe.calibrate import calibrate, calibration_key, forward, observe, products
from fp8pipe.calibrate.batches import is_out_of_memory, micro_batches, smaller
from fp8pipe.calibrate.held import Alike, Pass
from fp8pipe.calibrate.lockstep import Lane, Lockstep
from fp8pipe.calibrate.ranges import observer_for
from fp8pipe.calibrate.resume import Bookmark
from fp8pipe.calibrate.rows import load_rows
from fp8pipe.calibrate.weights import OnDisk
from fp8pipe.config import ActivationScheme, CalibrationSpec, Recipe, WeightScheme
from fp8pipe.errors import CalibrationDataError, NonFiniteActivation, SourceChanged, UnsupportedArchitecture
from fp8pipe.hub import client as hub_client
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.shards import SourceFiles
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import quantize
from fp8pipe.quantize.numerics import dequantize
from fp8pipe.records.calibration import Calibration
from fp8pipe.rehearsal.localhub import LocalHub


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model(folder, "llama")
    return folder


# ---------------------------------------------------------------------------------------------- the reference


def linear_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """amax of the input of every Linear of the whole model, by plain hooks."""
    amax: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: nn.Module, args: Any, name: str = name) -> None:
                amax[name] = max(amax.get(name, 0.0), args[0].abs().max().item())

            handles.append(module.register_forward_pre_hook(hook))
    with torch.inference_mode():
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return amax


def cache_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the amax of K and V per head, out of an ordinary cache that keeps everything."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for ids in token_ids:
            cache: Any = DynamicCache()
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            layers = [(layer.keys.abs().amax((0, 2, 3)), layer.values.abs().amax((0, 2, 3))) for layer in cache.layers]
            pairs = zip(found or layers, layers, strict=True)
            found = [(torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in pairs]
    return found


def expert_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> dict[tuple[str, int], tuple[float, float]]:
    """Per experts module and expert: amax of what it is given, and of what its down projection is given."""
    amax: dict[tuple[str, int], tuple[float, float]] = {}

    def hook(module: Any, args: Any, name: str) -> None:
        hidden, index = args[0], args[1]
        for expert in range(module.num_experts):
            given = hidden[(index == expert).any(dim=1)]
            if len(given):
                gate, up = (given @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
                old = amax.get((name, expert), (0.0, 0.0))
                amax[name, expert] = max(old[0], given.abs().max().item()), max(old[1], inner.abs().max().item())

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            module.register_forward_pre_hook(lambda module, args, name=name: hook(module, args, name))
    with torch.inference_mode():
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    return amax


def token_ids_of(calibration: Calibration) -> list[list[int]]:
    """What the byte tokenizer makes of TEXTS, in the order in which they were run."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = {symbol: i for i, symbol in enumerate(alphabet)}
    texts = [TEXTS[index] for index in calibration.sample_indices]
    return [[symbols["Ġ" if char == " " else char] for char in text][: calibration.max_seq_len] for text in texts]


CLOSE = 1e-6
"""Relative. Both sides compute in float32; only the order of sums may differ."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ranges_equal_a_reference_that_holds_the_whole_model(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", name)
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=0)
    if name in MOE_NAMES:
        recipe = recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"strategy": "tensor"})})
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")

    token_ids = token_ids_of(found)
    expected = linear_reference(model, token_ids)
    linears = [module for module in found.inputs if module in expected]
    assert {module: found.inputs[module] for module in linears} == pytest.approx(
        {module: expected[module] for module in linears}, rel=CLOSE
    )
    of_experts = {(*module.split(".experts."), amax) for module, amax in found.inputs.items() if module not in expected}
    routed = expert_reference(model, token_ids)
    for parent, rest, amax in of_experts:
        expert, projection = rest.split(".")
        holder = next(holder for holder, _ in routed if holder.split(".")[2] == parent.split(".")[2])
        up, down = routed[holder, int(expert)]
        assert amax == pytest.approx(down if projection in {"down_proj", "w2"} else up, rel=CLOSE)
    assert len(linears) + len(of_experts) == len(found.inputs) > 0

    if name.startswith("deepseek"):
        assert not found.kv
        return
    reference = cache_reference(model, token_ids)
    assert len(found.kv) == len(reference)
    for layer, (keys, values) in enumerate(reference):
        (name,) = [name for name in found.kv if f".layers.{layer}." in name]
        ranges = found.kv[name]
        assert ranges.k_amax == pytest.approx(keys.tolist(), rel=CLOSE)
        assert ranges.v_amax == pytest.approx(values.tolist(), rel=CLOSE)


def test_latent_attention_is_reported_not_skipped(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "deepseek_v3")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    recipe = recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"strategy": "tensor"})})
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    assert set(found.kv_absent) == {f"model.layers.{layer}.self_attn" for layer in range(4)}
    assert all("MLA" in reason for reason in found.kv_absent.values())


def test_an_expert_that_the_router_avoids_is_shown_other_tokens_and_counted(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral")
    gate = model.get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        gate.weight[3] = 0  # a logit of 0 stays behind the two best of three random ones, but for chance
        gate.weight[2] = -gate.weight[1] * 0.5
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=70)
    recipe = recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"strategy": "tensor"})})
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")

    counts = {name: seen for name, seen in found.expert_tokens.items() if name.startswith("model.layers.0.")}
    assert len(counts) == 4
    assert sum(seen.routed for seen in counts.values()) == 2 * found.tokens
    assert all(seen.added == 0 for seen in counts.values() if seen.routed >= 70)
    rare = [seen for seen in counts.values() if seen.routed < 70]
    assert rare
    assert all(seen.routed + seen.added == 70 for seen in rare)


# ---------------------------------------------------------------------------------------------- memory and order


def test_one_layer_has_weights_at_a_time(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8pipe.calibrate import skeleton as room

    models: list[Any] = []
    build = room.Skeleton.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        models.append(self)

    monkeypatch.setattr(room.Skeleton, "__init__", recording)
    loaded: list[set[str]] = []

    def progress(event: ProgressEvent) -> None:
        skeleton = models[0]
        real = {name for name, tensor in skeleton.model.named_parameters() if not tensor.is_meta}
        loaded.append({layer for name in real if (layer := skeleton.layer_of(name)) is not None})

    run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "d.jsonl")), tmp_path / "out", progress)
    assert [layers for layers in loaded if len(layers) != 1] == []
    order = [min(layers) for layers in loaded]
    assert order == sorted(order)
    assert set(order) == {f"model.layers.{layer}" for layer in range(4)}


class _Twice(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2


def test_lockstep_computes_what_the_model_computes_and_puts_the_layers_back() -> None:
    layers = {"a": _Twice(), "b": _Twice()}
    results: dict[int, float] = {}

    def forward(index: int) -> None:
        hidden = torch.tensor(float(index))
        for layer in layers.values():
            hidden = layer(hidden) + 1
        results[index] = hidden.item()

    order = []
    with Lockstep(layers, [lambda index=index: forward(index) for index in range(3)]) as steps:
        for step in steps:
            for lane in step.lanes:
                order.append(step.layer)
                lane.proceed(step.compute(lane))
    assert order == ["a"] * 3 + ["b"] * 3
    assert results == {index: (index * 2 + 1) * 2 + 1 for index in range(3)}
    assert layers["a"](torch.tensor(1.0)).item() == 2


def test_an_error_in_one_pass_surfaces_and_ends_all_others() -> None:
    import threading

    layer = _Twice()

    def forward(index: int) -> None:
        hidden = layer(torch.tensor(float(index)))
        if index == 1:
            raise ZeroDivisionError("between two layers")
        layer(hidden)

    before = threading.active_count()
    with (
        pytest.raises(ZeroDivisionError, match="between two layers"),
        Lockstep({"layer": layer}, [lambda index=index: forward(index) for index in range(3)]) as steps,
    ):
        for step in steps:
            for lane in step.lanes:
                lane.proceed(step.compute(lane))
    assert threading.active_count() == before
    assert layer(torch.tensor(1.0)).item() == 2


def test_passes_that_take_different_layers_are_refused() -> None:
    layers = {"a": _Twice(), "b": _Twice()}
    forwards = [lambda name=name: layers[name](torch.tensor(1.0)) for name in layers]
    with pytest.raises(UnsupportedArchitecture, match="order of layers"), Lockstep(layers, forwards) as steps:
        next(iter(steps))


class _Adds(nn.Module):
    def forward(self, hidden: torch.Tensor, other: torch.Tensor, **_: Any) -> torch.Tensor:
        return 2 * hidden + other


class _Decoder:
    """Two layers behind an embedding; `begin` makes the first hidden states, `end` may read what was begun with."""

    def __init__(self, begin: Callable[..., Any], end: Callable[..., Any], *, hands_on: bool = False) -> None:
        self.embedding = nn.Embedding(10, 4).requires_grad_(False)
        self.layers: dict[str, nn.Module] = {"a": _Adds(), "b": _Adds()}
        self._begin, self._end, self._hands_on = begin, end, hands_on

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embeddings = self.embedding(ids)
        begun = self._begin(embeddings)
        hidden = self.layers["a"](begun, 0 * begun)
        hidden = self.layers["b"](hidden, other=embeddings if self._hands_on else hidden)
        return self._end(embeddings, begun, hidden)

    def in_lockstep(self, samples: Sequence[torch.Tensor], look: Callable[[str, Sequence[torch.Tensor]], None]) -> Any:
        """Results of all samples; `look` is shown what each pass began with, behind each layer."""
        results: dict[int, torch.Tensor] = {}
        begun: list[torch.Tensor] = []

        def run(index: int) -> None:
            results[index] = self.forward(samples[index])

        alike = Alike()
        passes = [Pass(lambda index=index: run(index), self.embedding, alike) for index in range(len(samples))]

        def started(index: int, lane: Lane) -> None:
            begun.append(lane.hidden)
            passes[index].arrived(lane)

        with Lockstep(self.layers, passes, started) as steps:
            for step in steps:
                for lane, one in zip(step.lanes, passes, strict=True):
                    one.advance(step, lane)
                look(step.layer, begun)
        return [results[index] for index in range(len(samples))]


_BEGINS: dict[str, Callable[..., Any]] = {
    "embeddings": lambda embeddings: embeddings,
    "scaled": lambda embeddings: embeddings * 3,
    "shifted": lambda embeddings: embeddings + torch.ones(4),
}
_ENDS: dict[str, Callable[..., Any]] = {
    "nothing": lambda embeddings, begun, hidden: hidden,
    "an operator": lambda embeddings, begun, hidden: hidden + embeddings + begun,
    "an argument": lambda embeddings, begun, hidden: torch.add(hidden, other=begun),
    "a list": lambda embeddings, begun, hidden: torch.cat([hidden, begun, embeddings]),
    "shapes": lambda embeddings, begun, hidden: hidden.new_ones(embeddings.shape) + len(begun),
    "a method": lambda embeddings, begun, hidden: begun.sum() + embeddings.mean() + hidden,
    "in place": lambda embeddings, begun, hidden: begun.mul_(2) + embeddings.add_(1) + hidden,
}
_SAMPLES = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])]


@pytest.mark.parametrize("hands_on", [False, True])
@pytest.mark.parametrize("begin", _BEGINS)
@pytest.mark.parametrize("end", _ENDS)
def test_what_a_pass_began_with_is_given_up_and_there_again_when_it_is_read(
    begin: str, end: str, hands_on: bool
) -> None:
    decoder = _Decoder(_BEGINS[begin], _ENDS[end], hands_on=hands_on)
    with torch.inference_mode():
        expected = [decoder.forward(ids) for ids in _SAMPLES]
    freed = []

    def look(layer: str, begun: Sequence[torch.Tensor]) -> None:
        if layer == "a":
            freed.extend(values.untyped_storage().nbytes() == 0 for values in begun)

    results = decoder.in_lockstep(_SAMPLES, look)
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert freed == [not (hands_on and begin == "embeddings")] * 2
    assert not decoder.embedding._forward_hooks


class _ChangesItsInput(nn.Module):
    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return hidden.mul_(3) + other


@pytest.mark.parametrize("begin", [lambda values: values, lambda values: values[:2]], ids=["the same", "a view"])
def test_what_the_first_layer_changes_in_place_is_not_given_up(begin: Callable[..., Any]) -> None:
    decoder = _Decoder(begin, lambda embeddings, begun, hidden: embeddings.sum() + begun + hidden)
    decoder.layers["a"] = _ChangesItsInput()
    with torch.inference_mode():
        expected = [decoder.forward(ids) for ids in _SAMPLES]
    results = decoder.in_lockstep(_SAMPLES, lambda layer, begun: None)
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "granitemoe"])
def test_passes_keep_neither_what_they_began_with_nor_tables_of_their_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", name)
    passes: list[Pass] = []
    lanes: list[Lane] = []
    begun: list[torch.Tensor] = []
    arrived = Pass.arrived

    def arriving(self: Pass, lane: Lane) -> None:
        arrived(self, lane)
        passes.append(self)
        lanes.append(lane)
        begun.append(lane.hidden)

    monkeypatch.setattr(Pass, "arrived", arriving)
    sizes: set[int] = set()
    tables: list[torch.Tensor] = []

    def progress(event: ProgressEvent) -> None:
        if event.note.endswith("layers.1") and not sizes:
            sizes.update(hidden.untyped_storage().nbytes() for hidden in begun)
            tables.extend(lane.kwargs["position_embeddings"][0] for lane in lanes[1:] if name != "opt")

    text = {"text": "five equal samples"}
    data = write_dataset(tmp_path / "data.jsonl", [text] * 5)
    recipe = with_data(PEER_RECIPE, data, min_expert_tokens=4)
    monkeypatch.setitem(forward.TOKENS, "cpu", 1)  # a pass for each
    run_calibration(tmp_path / "model", recipe, tmp_path / "out", progress)
    assert len(passes) == 5 and sizes == {0}
    assert len({table.data_ptr() for table in tables}) == (name != "opt")
    if name == "opt":  # its embeddings are not what its first layer is called with: they gain positions
        assert all("embeddings" in one._given_up for one in passes)


def test_equal_masks_of_passes_are_held_once() -> None:
    lanes = []
    for length, window in ((3, 2), (3, 2), (3, 3), (4, 2), (3, 3)):
        lane = Lane(lambda: None)
        mask = torch.ones(1, 1, length, length).tril().triu(1 - window)
        lane.kwargs = {"attention_mask": mask, "position_embeddings": (torch.ones(length), torch.zeros(length))}
        lane.kwargs["hidden_states"] = torch.ones(length)
        lanes.append(lane)
    before = [lane.kwargs["attention_mask"].clone() for lane in lanes]
    alike = Alike()
    for lane in lanes * 2:
        alike.unite(lane)
    masks = [lane.kwargs["attention_mask"] for lane in lanes]
    assert all(torch.equal(mask, old) for mask, old in zip(masks, before, strict=True))
    assert [mask.data_ptr() == masks[0].data_ptr() for mask in masks] == [True, True, False, False, False]
    assert masks[2].data_ptr() == masks[4].data_ptr()
    assert len({lane.kwargs["position_embeddings"][0].data_ptr() for lane in lanes}) == 2
    assert len({lane.kwargs["hidden_states"].data_ptr() for lane in lanes}) == 5


# ---------------------------------------------------------------------------------------------- reuse and resume


def test_a_matching_record_is_returned_and_a_changed_setting_makes_a_new_one(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    first = run_calibration(llama, recipe, tmp_path / "out")
    calls: list[ProgressEvent] = []
    assert run_calibration(llama, recipe, tmp_path / "out", calls.append) == first
    assert calls == []
    changed = with_data(STATIC_KV, tmp_path / "data.jsonl", max_seq_len=4)
    assert run_calibration(llama, changed, tmp_path / "out", calls.append).key != first.key
    assert calls


def test_the_key_follows_data_and_instructions_and_not_the_place(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = resolve(str(llama))
    here, there = write_dataset(tmp_path / "a.jsonl"), write_dataset(tmp_path / "b.jsonl")
    key = calibration_key(snapshot, with_data(STATIC_KV, here))
    assert calibration_key(snapshot, with_data(STATIC_KV, there)) == key
    write_dataset(there, [{"text": "other"}])
    assert calibration_key(snapshot, with_data(STATIC_KV, there)) != key
    renamed = with_data(STATIC_KV, here).model_copy(update={"name": "other"})
    assert calibration_key(snapshot, renamed) == key
    was_native = not products.is_emulated(torch.bfloat16, torch.device("cpu"))
    monkeypatch.setitem(products._NATIVE, torch.bfloat16, lambda: not was_native)
    assert calibration_key(snapshot, with_data(STATIC_KV, here)) != key


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from support.calibration import STATIC_KV, run_calibration, with_data
torch.set_num_threads(int(sys.argv[5]))
def progress(event):
    if event.note == "model.layers.2" and event.done > 2.5:
        os.kill(os.getpid(), signal.SIGKILL)
run_calibration(Path(sys.argv[2]), with_data(STATIC_KV, Path(sys.argv[3])), Path(sys.argv[4]), progress)
"""


def test_finished_layers_are_not_repeated_after_kill_9(llama: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.jsonl")
    arguments = [TESTS, llama, data, tmp_path / "out", torch.get_num_threads()]
    child = subprocess.run([sys.executable, "-c", _KILLED, *map(str, arguments)], env=os.environ, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not (tmp_path / "out" / "calibration.json").exists()

    recipe = with_data(STATIC_KV, data)
    events: list[ProgressEvent] = []
    resumed = run_calibration(llama, recipe, tmp_path / "out", events.append)
    assert {event.note for event in events} == {"model.layers.2", "model.layers.3"}
    assert resumed.digest() == run_calibration(llama, recipe, tmp_path / "undisturbed").digest()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["calibration.json"]


def test_a_restart_begins_where_hidden_states_are_all_that_is_handed_on() -> None:
    lane, output, shared = Lane(lambda: None), torch.ones(2, 3), dict[str, torch.Tensor]()
    lane.args, lane.kwargs = (output,), {"rotary": {"main": torch.ones(3)}, "shared_kv_states": shared}
    begun = [forward._mappings(lane)]

    def handed_on(output: object) -> bool:
        return forward._handed_on([lane], [output], [(0, 1)], begun)

    assert handed_on(output)
    assert not handed_on((output, torch.ones(1)))
    assert not handed_on(output.clone())  # the model's own code did something in between
    shared["full_attention"] = torch.ones(1)
    assert not handed_on(output)


def test_a_bookmark_of_other_samples_is_not_taken_up(tmp_path: Path) -> None:
    from fp8pipe.records.calibration import Ranges

    hidden = {(1,): torch.ones(1, 3, 2), (0, 2): torch.stack([torch.zeros(5, 2), torch.full((5, 2), 2.0)])}
    Bookmark(tmp_path, "key", "tokens").set(["a"], Ranges(inputs={"m": 1.0}), hidden)
    assert Bookmark(tmp_path, "key", "others").find() is None
    assert Bookmark(tmp_path, "other", "tokens").find() is None
    found = Bookmark(tmp_path, "key", "tokens").find()
    assert found is not None
    assert found[0] == ("a",)
    assert [found[2][index].mean().item() for index in range(3)] == [0, 1, 2]


def test_a_bookmark_that_cannot_be_read_or_written_costs_a_restart_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fp8pipe.records.calibration import Ranges

    hidden = {(0,): torch.ones(1, 3, 2)}
    Bookmark(tmp_path / "a", "key", "tokens").set(["a"], Ranges(), hidden)
    (file,) = (tmp_path / "a").glob("hidden-*")
    file.write_bytes(b"")  # as after a power failure
    assert Bookmark(tmp_path / "a", "key", "tokens").find() is None
    assert "calibration begins anew" in caplog.text
    (tmp_path / "b").write_text("in the way, as a full disk would be")
    bookmark = Bookmark(tmp_path / "b", "key", "tokens")
    bookmark.set(["a"], Ranges(), hidden)
    bookmark.set(["a", "b"], Ranges(), hidden)
    assert caplog.text.count("would go on from an earlier layer") == 1


# ---------------------------------------------------------------------------------------------- data


def data_error(llama: Path, tmp_path: Path, dataset: Path | str, **changes: Any) -> str:
    """The message, after proving that no weight was read."""
    recipe = with_data(STATIC_KV, dataset, **changes)
    snapshot, plan, architecture = planned(llama, recipe)
    hidden = [path.rename(path.with_suffix(".away")) for path in llama.glob("*.safetensors")]
    try:
        with pytest.raises(CalibrationDataError) as caught:
            calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    finally:
        for path in hidden:
            path.rename(path.with_suffix(".safetensors"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        ([], {}, "empty"),
        ([{"text": "one"}, {"text": " "}], {}, "expected 5 samples, found 1"),
        ([{"prompt": "one", "answer": "two"}], {}, "found answer, prompt"),
        ([{"text": "word " * 200}] * 5, {"max_seq_len": 4096}, "has 1000 tokens, the model's context is 256"),
        ([{"text": 3}] * 5, {}, "expected str in every row, found int"),
        ([{"messages": [{"role": "user"}]}] * 5, {"chat_template": "none"}, "in every message, found NoneType"),
        ([{"messages": ["hello"]}] * 5, {"chat_template": "none"}, "in every message, found NoneType"),
    ],
)
def test_unfit_data_is_an_error_before_any_weight_is_read(
    llama: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], expected: str
) -> None:
    assert expected in data_error(llama, tmp_path, write_dataset(tmp_path / "data.jsonl", rows), **changes)


def test_a_chat_that_the_template_refuses_is_said(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "strict")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (tmp_path / "strict" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "system", "content": "be kind"}]}] * 5
    said = data_error(tmp_path / "strict", tmp_path, write_dataset(tmp_path / "data.jsonl", rows))
    assert "chat template refuses a row (no system role); its roles are ['system']" in said


def test_lines_of_jsonl_end_with_a_line_feed_alone(llama: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"one\u2028two\u0085{i}"}, ensure_ascii=False) for i in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert len(run_calibration(llama, with_data(STATIC_KV, tmp_path / "data.jsonl"), tmp_path / "out").inputs) == 28


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_line_feed_at_the_end_makes_no_row(tmp_path: Path, suffix: str) -> None:
    written = [json.dumps({"text": text}) if suffix == ".jsonl" else text for text in TEXTS]
    for name, end in (("without", ""), ("with", "\n")):
        (tmp_path / f"{name}{suffix}").write_text("\n".join(written) + end)
    (tmp_path / f"empty{suffix}").write_text("")
    rows = [
        load_rows(CalibrationSpec(dataset=str(tmp_path / f"{name}{suffix}")), "")
        for name in ("without", "with", "empty")
    ]
    assert [len(found) for found in rows] == [len(TEXTS), len(TEXTS), 0]


def test_a_missing_file_is_named(llama: Path, tmp_path: Path) -> None:
    assert "nowhere.parquet: no such file" in data_error(llama, tmp_path, tmp_path / "nowhere.parquet")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".txt"])
def test_every_local_format_gives_the_same_tokens(llama: Path, tmp_path: Path, suffix: str) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": text} for text in TEXTS]
    path = tmp_path / f"data{suffix}"
    match suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            write_dataset(path)
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        case _:
            path.write_text("\n".join(TEXTS))
    found = run_calibration(llama, with_data(STATIC_KV, path), tmp_path / "out")
    reference = run_calibration(
        llama, with_data(STATIC_KV, write_dataset(tmp_path / "r.jsonl")), tmp_path / "reference"
    )
    assert found.token_ids_sha256 == reference.token_ids_sha256
    assert found.tokens == sum(min(len(text), 32) for text in TEXTS)


def test_chat_messages_pass_through_the_models_template(llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]} for text in TEXTS]
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "chat.jsonl", rows))
    templated = run_calibration(llama, recipe, tmp_path / "templated")
    as_text = [{"text": f"<user>{text}<assistant>ok"} for text in TEXTS]
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "text.jsonl", as_text))
    assert run_calibration(llama, recipe, tmp_path / "text").token_ids_sha256 == templated.token_ids_sha256


def test_samples_are_shuffled_by_the_seed_as_datasets_does(llama: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"), num_samples=3, seed=7)
    found = run_calibration(llama, recipe, tmp_path / "out")
    shuffled = Dataset.from_dict({"row": list(range(len(TEXTS)))}).shuffle(seed=7)
    assert list(found.sample_indices) == shuffled["row"][:3]


def publish_dataset(repo_id: str, files: dict[str, str]) -> str:
    """A dataset on the Hub of the test; the commit sha that it ends with."""
    api = hub_client.client()
    api.create_repo(repo_id, repo_type="dataset")
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message="data", repo_type="dataset").oid


def lines(texts: Sequence[str]) -> str:
    return "\n".join(json.dumps({"text": text}) for text in texts)


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: parts/*.jsonl
---
"""


@pytest.mark.parametrize(
    "files",
    [
        {
            "data/train_sft-0.jsonl": lines(TEXTS[:2]),
            "data/train_sft-1.jsonl": lines(TEXTS[2:]),
            "data/test.jsonl": "x",
        },
        {"README.md": CARD, "parts/a.jsonl": lines(TEXTS[:2]), "parts/b.jsonl": lines(TEXTS[2:]), "train_sft.txt": "x"},
    ],
    ids=["by-name", "by-card"],
)
def test_a_hub_dataset_is_pinned_and_its_split_is_read(
    hub: LocalHub, repo_id: str, llama: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    sha = publish_dataset(repo_id, files)
    spec = STATIC_KV.calibration.model_copy(update={"dataset": repo_id})
    found = run_calibration(llama, STATIC_KV.model_copy(update={"calibration": spec}), tmp_path / "hub")
    local = run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "local")
    assert found.dataset_revision == sha
    assert found.token_ids_sha256 == local.token_ids_sha256
    assert found.digest() == local.digest()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split": "validation"}, "is of split validation, found train.jsonl"),
        ({"split": "train", "subset": "german"}, "is of split train of german"),
        ({"revision": "nowhere"}, "has no revision nowhere"),
        ({"dataset": "acme/no-such-dataset"}, "shows no such dataset"),
    ],
)
def test_a_wrong_name_on_the_hub_is_said_before_any_weight_is_read(
    hub: LocalHub, repo_id: str, llama: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    changes = dict(changes)
    publish_dataset(repo_id, {"train.jsonl": lines(TEXTS)})
    assert expected in data_error(llama, tmp_path, changes.pop("dataset", repo_id), **changes)


# ---------------------------------------------------------------------------------------------- numbers


def test_a_nan_activation_names_the_module(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(float("inf"))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    with pytest.raises(NonFiniteActivation, match=r"model\.layers\.1\.mlp\.down_proj: its input"):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "calibration.json").exists()


def without_inputs(tmp_path: Path) -> Path:
    """A model whose second layer gives its down projection nothing but zeros."""
    model = make_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def test_an_input_that_is_always_zero_is_named_and_gets_no_invented_scale(tmp_path: Path) -> None:
    model, data = without_inputs(tmp_path), write_dataset(tmp_path / "data.jsonl")
    with pytest.raises(CalibrationDataError, match=r"1\.mlp\.down_proj: its input has a range of 0: every value"):
        run_calibration(model, with_data(STATIC_KV, data), tmp_path / "out")
    dynamic = STATIC_KV.model_copy(update={"activations": ActivationScheme(mode="dynamic", strategy="token")})
    assert run_calibration(model, with_data(dynamic, data), tmp_path / "dynamic").inputs == {}


def test_a_percentile_below_the_share_of_zeros_is_said(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "opt")
    with torch.no_grad():  # a ReLU that lets few values through
        model.get_parameter("model.decoder.layers.0.fc1.bias").fill_(-0.3)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    low = ActivationScheme(mode="static", strategy="tensor", observer="percentile", percentile=51.0)
    recipe = with_data(STATIC_KV.model_copy(update={"activations": low}), write_dataset(tmp_path / "data.jsonl"))
    with pytest.raises(CalibrationDataError, match=r"fc2: its input has a range of 0: most of its values are 0"):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out")


def test_a_source_that_changes_while_it_is_calibrated_is_said(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))

    def touch(event: ProgressEvent) -> None:
        if event.note == "model.layers.1":
            for path in (tmp_path / "model").glob("*.safetensors"):
                os.utime(path, ns=(1, 1))

    with pytest.raises(SourceChanged, match="was changed while it was read"):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out", touch)
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_minmax_is_the_running_max_whatever_the_order() -> None:
    batches = torch.randn(6, 2, 50)
    forwards, backwards = observer_for("minmax", 2), observer_for("minmax", 2)
    for batch in batches:
        forwards.update(batch)
    for batch in reversed(batches):
        backwards.update(batch)
    assert forwards.ranges() == backwards.ranges() == tuple(batches.abs().amax((0, 2)).tolist())


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
def test_percentile_of_bf16_values_is_exact(percentile: float) -> None:
    values = torch.randn(3, 4000).to(torch.bfloat16)
    observer = observer_for("percentile", 3, percentile)
    for part in values.split(500, dim=1):
        observer.update(part)
    ordered = values.abs().float().sort(dim=1).values
    assert observer.ranges() == tuple(ordered[:, round(percentile * 40) - 1].tolist())


def test_mse_range_has_the_least_error_of_all_candidates() -> None:
    values = torch.randn(20000).to(torch.bfloat16)
    values[0] = 700.0  # one outlier: keeping it in range costs nothing of E4M3's relative precision, or little
    observer = observer_for("mse", 1)
    observer.update(values)
    wide = values.double()

    def error(amax: float) -> float:
        scale = amax / 448
        codes = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.double() * scale - wide).square().sum().item()

    (found,) = observer.ranges()
    assert error(found) <= min(error(700.0 * share / 100) for share in range(20, 101)) * (1 + 1e-6)


def test_scaled_multiplies_every_range(llama: Path, tmp_path: Path) -> None:
    found = run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "out")
    tenth = found.scaled(0.1)
    assert tenth.inputs == pytest.approx({name: amax / 10 for name, amax in found.inputs.items()})
    assert all(tenth.kv[name].k_amax == pytest.approx([k / 10 for k in kv.k_amax]) for name, kv in found.kv.items())
    assert tenth.digest() != found.digest()


# ---------------------------------------------------------------------------------------------- through FP8 weights


def dequantized_twin(model: Path, recipe: Recipe, root: Path) -> Path:
    """The model with every weight that `recipe` quantizes replaced by what the engine's codes and scales stand for."""
    per_tensor = recipe.weights.strategy == "tensor"
    changes = {
        "kv_cache": None,
        "activations": ActivationScheme(strategy="tensor" if per_tensor else "token"),
        "checkpoint_format": "fp8" if per_tensor else "compressed-tensors",
    }
    snapshot, plan, _ = planned(model, recipe.model_copy(update=changes))
    quantize(snapshot, plan, root / "fp8")
    tensors: dict[str, torch.Tensor] = {}
    for path in (root / "fp8").glob("*.safetensors"):
        tensors |= load_file(path)
    twin = Path(shutil.copytree(model, root / "twin"))
    for path in twin.glob("*.safetensors"):
        content = {}
        for name, weight in load_file(path).items():
            scale = tensors.get(f"{name}_scale")
            block = recipe.weights.block_shape if recipe.weights.strategy == "block" else None
            content[name] = weight if scale is None else dequantize(tensors[name], scale, block=block)
        save_file(content, path, metadata={"format": "pt"})
    return twin


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama", WeightScheme(strategy="tensor")),
        ("llama", WeightScheme(strategy="tensor", observer="mse")),
        ("qwen2", WeightScheme(strategy="channel", observer="mse")),
        ("mixtral", WeightScheme(strategy="tensor")),
    ],
    ids=["tensor", "tensor-mse", "channel-mse", "experts"],
)
def test_ranges_through_fp8_weights_are_those_of_the_dequantized_checkpoint(
    name: str, weights: WeightScheme, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", name)
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")).model_copy(update={"weights": weights})
    plain = run_calibration(tmp_path / "model", recipe, tmp_path / "plain")
    through = with_data(recipe, tmp_path / "data.jsonl", quantized_weights=True)
    found = run_calibration(tmp_path / "model", through, tmp_path / "through")
    twin = dequantized_twin(tmp_path / "model", recipe, tmp_path)
    expected = run_calibration(twin, recipe, tmp_path / "expected")
    assert found.inputs == pytest.approx(expected.inputs, rel=CLOSE)
    assert {n: kv.k_amax for n, kv in found.kv.items()} == {
        n: pytest.approx(kv.k_amax, rel=CLOSE) for n, kv in expected.kv.items()
    }
    assert found.inputs != pytest.approx(plain.inputs, rel=1e-3)
    assert found.key != plain.key
    figures = [plain.sensitivity, found.sensitivity]
    weight_figures = [{n: one.weight_sqnr_db for n, one in of.items()} for of in figures]
    assert weight_figures[1] == pytest.approx(weight_figures[0], abs=0.5)  # the noise is seen before it is added


# ---------------------------------------------------------------------------------------------- FP8 sources


@pytest.mark.parametrize("strategy", ["tensor", "block"])
def test_an_fp8_source_is_dequantized_while_it_is_calibrated(strategy: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    data = write_dataset(tmp_path / "data.jsonl")
    shipped = Recipe.model_validate(
        {
            "name": "source",
            "checkpoint_format": "fp8",
            "weights": {"strategy": strategy, "block_shape": [32, 32]},
            "activations": {"mode": "dynamic", "strategy": "group" if strategy == "block" else "tensor"},
        }
    )
    snapshot, plan, _ = planned(tmp_path / "model", shipped)
    quantize(snapshot, plan, tmp_path / "fp8-source")
    names = {output.name: output for output in plan.outputs if output.role == "weight"}
    content: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "fp8-source").glob("*.safetensors"):
        content |= load_file(path)
    reference = Path(shutil.copytree(tmp_path / "model", tmp_path / "bf16"))
    for path in reference.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & names.keys():
            block = (32, 32) if strategy == "block" else None
            scale = content[f"{name}_scale_inv" if block else f"{name}_scale"]
            tensors[name] = dequantize(content[name], scale, block=block)
        save_file(tensors, path, metadata={"format": "pt"})

    recipe = with_data(STATIC_KV, data).model_copy(update={"fp8_source": "requantize"})
    found = run_calibration(tmp_path / "fp8-source", recipe, tmp_path / "out")
    expected = run_calibration(reference, recipe, tmp_path / "expected")
    assert found.inputs == pytest.approx(expected.inputs, rel=CLOSE)


# ---------------------------------------------------------------------------------------------- memory

_LITTLE_MEMORY = """
import logging, resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from support.calibration import STATIC_KV, run_calibration, with_data
torch.set_num_threads(1)
logging.basicConfig(level=logging.WARNING, format="%(message)s")
def progress(event):  # once all code is loaded and the first layer is done: what is there, and a little more
    if event.note == "model.layers.0" and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[5]) * 2**20, resource.RLIM_INFINITY))
recipe = with_data(STATIC_KV, Path(sys.argv[3]), num_samples=int(sys.argv[6]), max_seq_len=256)
run_calibration(Path(sys.argv[2]), recipe, Path(sys.argv[4]), progress)
"""


def with_little_memory(
    model: Path, data: Path, output: Path, megabytes: int, samples: int
) -> subprocess.CompletedProcess[str]:
    arguments = [TESTS, model, data, output, megabytes, samples]
    own = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else each thread reserves 64 MB
    command = [sys.executable, "-c", _LITTLE_MEMORY, *map(str, arguments)]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose activations are much larger than their weights: 256 kB per token."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(folder, "llama", intermediate_size=1 << 16, num_hidden_layers=2)
    return folder


def test_less_is_run_at_once_when_memory_runs_out(wide: Path, tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path / "data.jsonl", [{"text": f"sample {index:02} of equal length"} for index in range(40)]
    )
    recipe = with_data(STATIC_KV, data, num_samples=40, max_seq_len=256)
    answer = with_little_memory(wide, data, tmp_path / "little", 330, 40)
    assert answer.returncode == 0, answer.stderr
    assert "ran out of memory with 20 samples in a pass" in answer.stderr
    assert "trying again with at most" in answer.stderr
    found = Calibration.load(tmp_path / "little" / "calibration.json")
    assert found.inputs == pytest.approx(run_calibration(wide, recipe, tmp_path / "much").inputs, rel=CLOSE)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA error: out of memory",
    ],
)
def test_every_library_may_say_that_memory_ran_out(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


@pytest.mark.parametrize("room, name", [("noise", "sample_rows"), ("ExpertWatch", "__enter__")])
def test_a_layer_whose_watch_fails_to_begin_is_not_watched(
    room: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", "mixtral")

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(getattr(observe, room), name, fail)
    with pytest.raises(ZeroDivisionError):
        calibrated(tmp_path, PEER_RECIPE)
    assert not observe._current


def test_a_sample_that_does_not_fit_alone_is_said(wide: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.jsonl", [{"text": "x" * 256}] * 2)
    answer = with_little_memory(wide, data, tmp_path / "little", 20, 2)
    assert "EnvironmentFault: out of memory while one sample of 256 tokens ran alone" in answer.stderr


def test_samples_of_equal_length_share_a_pass_and_nothing_is_padded() -> None:
    ids = [(1,) * length for length in (5, 7, 5, 5, 300, 7, 5)]
    batches = micro_batches(ids, 16)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len({len(ids[index]) for index in batch}) == 1 for batch in batches)
    assert max(len(batch) * len(ids[batch[0]]) for batch in batches if len(batch) > 1) <= 16
    assert batches == [(0, 2, 3), (1, 5), (4,), (6,)]
    assert smaller(batches, ids) == 7
    assert smaller([(0,), (1,)], ids) is None


def test_a_weight_is_read_from_disk_as_safetensors_reads_it(tmp_path: Path) -> None:
    source = {
        "bf16": torch.randn(5, 7).bfloat16(),
        "f16": torch.randn(3, 1000, 1000).half(),  # more than a large page
        "f32": torch.randn(()),
        "f64": torch.randn(3).double(),
        "codes": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
    }
    save_file(source, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    headers = read_headers(resolve(str(tmp_path)))
    with ExitStack() as stack:
        files = SourceFiles(tmp_path, stack)
        files.open("model.safetensors")
        read = {name: OnDisk(files, info)[...] for name, info in headers.tensors.items()}
    for name, expected in source.items():
        assert read[name].dtype == expected.dtype and read[name].shape == expected.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_products_without_instructions_are_float32_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_NATIVE", {dtype: lambda: False})
    monkeypatch.setattr(products, "_ROOM", 5 * 64)  # 37 rows in pieces of 5
    linear = nn.Linear(64, 37).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randint(-9, 10, parameter.shape))  # sums of integers are exact in any order
    values = torch.randint(-9, 10, (2, 3, 64)).float()
    expected = linear(values)
    assert (expected.to(dtype).float() != expected).any() or dtype == torch.float16  # bf16 does round some
    with products.fast_products(dtype, torch.device("cpu")) as mode:
        assert torch.equal(linear(values), expected)  # float32 is left alone
        assert isinstance(mode, products._InFloat32) and not mode._rooms
        assert torch.equal(linear.to(dtype)(values.to(dtype)), expected.to(dtype))
        assert mode._rooms  # it is what has multiplied


def test_ranges_of_a_bf16_model_do_not_depend_on_the_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", "llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="80KB")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    found = []
    for native in (True, False):
        monkeypatch.setattr(products, "_NATIVE", {torch.bfloat16: lambda native=native: native})
        found.append(run_calibration(tmp_path / "model", recipe, tmp_path / f"native-{native}").inputs)
    assert found[0] == pytest.approx(found[1], rel=2**-6)  # two steps of bf16: sums differ in order, layer after layer


# ---------------------------------------------------------------------------------------------- other architectures


def test_layers_that_share_weights_are_refused_before_any_is_read(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "zamba2")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    with pytest.raises(
        UnsupportedArchitecture, match=r"layers\.3 and model\.layers\.1 share shared_transformer\..*weight"
    ):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out")


def test_layers_without_keys_and_values_are_named_with_the_reason(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen3_next")
    weights = WeightScheme(strategy="tensor")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")).model_copy(update={"weights": weights})
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    assert set(found.kv) == {"model.layers.3.self_attn"}
    assert set(found.kv_absent) == {f"model.layers.{layer}" for layer in range(3)}
    assert all("linear attention" in reason for reason in found.kv_absent.values())


def test_attention_that_caches_nothing_is_an_error_that_names_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    attend = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, past_key_values=None, **kwargs: attend(self, *args, past_key_values=None, **kwargs),
    )
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    with pytest.raises(UnsupportedArchitecture, match=r"layers\.0\.self_attn: LlamaAttention cached no"):
        run_calibration(llama, recipe, tmp_path / "out")


def block_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> dict[tuple[str, int], tuple[float, float]]:
    """The same as `expert_reference` for Llama 4, whose experts are given one block of tokens each."""
    amax: dict[tuple[str, int], tuple[float, float]] = {}

    def hook(module: Any, args: Any, name: str) -> None:
        given = args[0].view(module.num_experts, -1, args[0].shape[-1])
        gate, up = torch.bmm(given, module.gate_up_proj).chunk(2, dim=-1)
        for expert, (block, inner) in enumerate(zip(given, up * module.act_fn(gate), strict=True)):
            old = amax.get((name, expert), (0.0, 0.0))
            amax[name, expert] = max(old[0], block.abs().max().item()), max(old[1], inner.abs().max().item())

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: hook(module, args, name))
    with torch.inference_mode():
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    return amax


@pytest.mark.parametrize("name", ["llama4", "granitemoe"])
def test_experts_in_one_tensor_on_disk_get_a_scale_each(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", name)
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=0)
    recipe = recipe.model_copy(update={"weights": WeightScheme(strategy="tensor")})
    snapshot, plan, architecture = planned(tmp_path / "model", recipe)
    assert any(role.kind == "fused_experts" for role in architecture.tensors.values())
    found = calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    reference = (block_reference if name == "llama4" else expert_reference)(model, token_ids_of(found))
    of_experts = {module: amax for module, amax in found.inputs.items() if module.split(".")[-2].isdecimal()}
    assert len(of_experts) == 3 * len(reference) > 0
    for module, amax in of_experts.items():
        holder, expert, projection = module.rsplit(".", 2)
        layer = f".{holder.split('.')[2]}."
        ((_, (up, down)),) = [item for item in reference.items() if layer in item[0][0] and item[0][1] == int(expert)]
        assert amax == pytest.approx(down if projection == "down_proj" else up, rel=CLOSE)
    made = quantize(snapshot, plan, tmp_path / "checkpoint", calibration=found)
    assert made.quantized_tensors > 0


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-model"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_calibrated_when_that_is_trusted(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model(model, "llama")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    expected = run_calibration(model, recipe, tmp_path / "expected")
    (model / "own.py").write_text(CUSTOM)
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own-model", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    snapshot, plan, architecture = planned(model, recipe, trust_remote_code=True)
    assert plan.trust_remote_code
    found = calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    assert found.inputs == expected.inputs
    untrusted = plan.model_copy(update={"trust_remote_code": False})
    with pytest.raises((UnsupportedArchitecture, ValueError), match="trust"):
        calibrate(snapshot, untrusted, recipe, tmp_path / "other", architecture=architecture)


# ---------------------------------------------------------------------------------------------- beside llm-compressor

PEER_SCALES = DATA / "peer_scales"
"""Scales that llm-compressor's oneshot gave the same models and samples, written by
`python -m benchmarks.calibrate --compare-scales --fixtures tests/data/peer_scales`."""


@pytest.mark.parametrize("path", sorted(PEER_SCALES.glob("*.json")), ids=lambda path: path.stem)
def test_scales_are_llm_compressors_within_a_step_of_bf16(path: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", path.stem)
    recipe = with_data(PEER_RECIPE, write_dataset(tmp_path / "data.jsonl"))
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    scales = {f"{name}.input_scale": amax / 448 for name, amax in found.inputs.items()}
    for name, ranges in found.kv.items():
        scales |= {f"{name}.k_scale": ranges.k_amax[0] / 448, f"{name}.v_scale": ranges.v_amax[0] / 448}
    theirs = json.loads(path.read_text())
    assert len(theirs) > 20
    assert {name: scales[name] for name in theirs} == pytest.approx(theirs, rel=2**-8)
