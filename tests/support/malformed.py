"""Malformed checkpoints: one corruption each, with the findings that it must bring, no more and no fewer.

Numbers are those of the cases that were tried on vLLM's own loader. `CASES` is the table; `Case.spoil` alters a copy of
a correct checkpoint in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import compressed_tensors.quantization  # noqa: F401  once for all cases; the validator would ask a child process
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import reference_checkpoints as reference

Base = Literal[
    "static", "channel", "block", "fp8", "fp8-block", "head", "modelopt", "modelopt-nvfp4", "nvfp4", "nvfp4a16",
    "mxfp4", "mxfp8",
]  # fmt: skip
Model = Literal["dense", "tied", "moe"]
ALL: tuple[Model, ...] = ("dense", "tied", "moe")

BASES: dict[Base, dict[str, Any]] = {
    "static": {"kv": "tensor"},
    "channel": {"strategy": "channel", "static": False},
    "block": {"strategy": "block", "static": False},
    "fp8": {"method": "fp8", "kv": None},
    "fp8-block": {"method": "fp8", "strategy": "block", "static": False},
    "head": {"strategy": "channel", "static": False, "kv": "attn_head"},
    "modelopt": {"method": "modelopt", "kv": "tensor"},
    "modelopt-nvfp4": {"format": "nvfp4", "method": "modelopt", "static": True},
    "nvfp4": {"format": "nvfp4", "static": True},
    "nvfp4a16": {"format": "nvfp4"},
    "mxfp4": {"format": "mxfp4"},
    "mxfp8": {"format": "mxfp8"},
}
"""Arguments of the reference writer."""


def quantize(source: Path, folder: Path, base: Base) -> Path:
    """The correct checkpoint that a case spoils."""
    arguments = BASES[base]
    return (reference.quantize_groups if "format" in arguments else reference.quantize)(source, folder, **arguments)


O_PROJ = "model.layers.1.self_attn.o_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
V_PROJ = "model.layers.0.self_attn.v_proj"
ROUTER = "model.layers.0.mlp.gate"
EXPERT = "model.layers.1.mlp.experts.2"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """One way to break a checkpoint."""

    number: str
    name: str
    base: Base
    spoil: Callable[[Path], None]
    findings: frozenset[str]
    """Ids of the checks that must speak, at fidelity depth."""
    models: tuple[Model, ...] = ALL


VLLM: dict[int, str] = {
    1: "loads; the scale stays -3.4e38",
    2: "loads; q's codes become +-448",
    3: "loads; q and k keep their codes under another scale",
    4: "loads; the scale stays -3.4e38, or another member's is used",
    5: "stops: no parameter named act_scale",
    6: "stops: no parameter named input_scale",
    7: "loads; casts BF16 into FP8",
    8: "stops: no place for the scale",
    9: "loads; the scale is dropped",
    10: "loads; the router is read as FP8",
    11: "loads; the pattern matches nothing",
    12: "loads; the suffix matches nothing",
    13: "stops: shards of a fused layer differ",
    14: "stops: bare AssertionError",
    15: "stops: bare AssertionError",
    16: "loads; casts e5m2 into e4m3",
    17: "loads; casts int8 into FP8",
    18: "compressed-tensors: loads; fp8: stops",
    19: "loads; weights become NaN",
    20: "compressed-tensors: loads with v = 1; fp8: stops",
    21: "compressed-tensors: loads with v = 1; fp8: uses it",
    22: "stops: expects a scalar",
    23: "loads; ignores them",
    24: "stops: unsupported KV scheme",
    25: "loads; the expert is uninitialised",
    26: "loads; the scale is 1.0",
    27: "loads; ignores it",
    28: "compressed-tensors: stops; fp8: loads",
    29: "loads all experts like expert 0",
    30: "stops: no such module",
    31: "stops: no such parameter",
    32: "stops: no such parameter",
    33: "loads; reads the byte as a number",
    34: "loads; all scales are zero",
    35: "loads; reads the byte as a number",
    36: "loads; the scale is uninitialised memory",
    37: "stops: no parameter of that name",
    38: "loads with the largest for all, and a warning",
    39: "compressed-tensors: stops; fp8: loads, scales overwritten",
    40: "stops: sizes differ",
    41: "stops: sizes differ",
    42: "loads; cut off",
    43: "stops: sizes differ",
    44: "stops: FileNotFoundError",
    45: "loads; half of the weights uninitialised",
    46: "loads",
    47: "loads",
    48: "loads; the last file read wins",
    49: "stops",
    50: "stops: takes Mistral's loader",
    51: "stops: takes it for an adapter",
    52: "loads; lm_head is uninitialised",
    53: "loads; the embedding is uninitialised",
    54: "stops: no such parameter",
    55: "stops: no such parameter",
    56: "stops: embeddings cannot be FP8",
    57: "stops while it reads the config",
    58: "stops at the first scale",
    59: "stops: activation_scheme missing or unknown",
    60: "stops: no such module; inv_freq is skipped",
    61: "stops: no such parameter",
    62: "stops: no such module",
    63: "cannot tell",
    64: "cannot tell",
    65: "cannot tell",
    66: "cannot tell",
    67: "cannot tell",
    68: "cannot tell",
    69: "cannot tell; the last file read wins",
    70: "loads; the transform is not applied",
}
"""What vLLM 0.32 does with each of the seventy cases: 1 to 62 were run through its loader, 63 to 70 are invisible to it
by construction. Letters behind a number are variants of ours."""


CASES: list[Case] = []
Spoiler = Callable[[Path], None]


def case(number: str, base: Base, *findings: str, models: tuple[Model, ...] = ALL) -> Callable[[Spoiler], Spoiler]:
    """Enter a spoiler into the table under its own name."""

    def enter(spoil: Spoiler) -> Spoiler:
        CASES.append(Case(number, spoil.__name__, base, spoil, frozenset(findings), models))
        return spoil

    return enter


# ---------------------------------------------------------------------------------------------- tools


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    reference.write_json(folder / "config.json", config)


def edit_quantization(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_config(folder, lambda config: change(config["quantization_config"]))


def edit_group(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_quantization(folder, lambda quant: change(quant["config_groups"]["group_0"]))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    reference.write_json(folder / INDEX, index)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Alter tensors; each stays in its file, new ones go to the last, the index follows."""
    shards = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    home = {name: file for file, part in shards.items() for name in part}
    tensors = {name: tensor for part in shards.values() for name, tensor in part.items()}
    change(tensors)
    last = max(shards)
    weight_map = {name: home.get(name, last) for name in tensors}
    for file in shards:
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        total = sum(tensor.nbytes for tensor in tensors.values())
        reference.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def drop(folder: Path, *names: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    edit_tensors(folder, change)


def rename(folder: Path, old: str, new: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))


def alter(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def unquantized(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """bf16 values of a quantized module."""
    return (tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"].float()).bfloat16()


# ---------------------------------------------------------------------------------------------- scales and weights


@case("1", "static", "K2")
def o_proj_without_weight_scale(folder: Path) -> None:
    drop(folder, f"{O_PROJ}.weight_scale")


@case("2", "static", "K2")
def q_proj_without_weight_scale(folder: Path) -> None:
    drop(folder, f"{Q_PROJ}.weight_scale")


@case("3", "static", "K2")
def v_proj_without_weight_scale(folder: Path) -> None:
    drop(folder, f"{V_PROJ}.weight_scale")


@case("4", "static", "K2")
def static_without_input_scale(folder: Path) -> None:
    drop(folder, f"{O_PROJ}.input_scale")


@case("5", "static", "K3")
def input_scale_named_act_scale(folder: Path) -> None:
    rename(folder, f"{O_PROJ}.input_scale", f"{O_PROJ}.act_scale")


@case("6", "channel", "K3")
def input_scale_under_dynamic(folder: Path) -> None:
    add(folder, f"{O_PROJ}.input_scale", torch.tensor([0.02]))


@case("7", "channel", "K5")
def bf16_weight_in_quantized_module(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{O_PROJ}.weight"] = unquantized(tensors, O_PROJ)
        del tensors[f"{O_PROJ}.weight_scale"]

    edit_tensors(folder, change)


@case("8", "channel", "K5")
def fp8_weight_in_ignored_module(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant["ignore"].append(O_PROJ))


@case("9", "channel", "K4", models=("moe",))
def fp8_weight_in_ignored_router(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{ROUTER}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors[f"{ROUTER}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{ROUTER}.weight_scale"] = scale

    edit_tensors(folder, change)


@case("10", "channel", "K2", models=("moe",))
def router_not_ignored(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(ignore=["lm_head"]))


@case("11", "fp8", "C5", "K2", models=("moe",))
def pattern_in_fp8_ignore(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(ignored_layers=["lm_head", "re:.*mlp\\.gate$"]))


@case("12", "fp8", "C5", "K2", models=("moe",))
def suffix_in_fp8_ignore(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(ignored_layers=["lm_head", "mlp.gate"]))


@case("13", "channel", "C6")
def part_of_fused_group_ignored(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{K_PROJ}.weight"] = load_source(folder)[f"{K_PROJ}.weight"]
        del tensors[f"{K_PROJ}.weight_scale"]

    edit_tensors(folder, change)
    edit_quantization(folder, lambda quant: quant["ignore"].append(K_PROJ))


def load_source(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the BF16 model; the tests put its path beside the checkpoint."""
    return reference.read(Path((folder.parent / "source").read_text()))[0]


@case("14", "channel", "S3")
def channel_scale_of_one_dimension(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale", lambda scale: scale.flatten())


@case("15", "static", "S3")
def tensor_scale_of_two_dimensions(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale", lambda scale: scale.reshape(1, 1))


@case("16", "channel", "S1")
def e5m2_weight(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight", lambda codes: codes.float().to(torch.float8_e5m2))


@case("17", "channel", "S1")
def int8_weight(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight", lambda codes: codes.view(torch.int8))


@case("19", "channel", "V2")
def zero_weight_scale(folder: Path) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[3] = 0
        return scale

    alter(folder, f"{O_PROJ}.weight_scale", change)


@case("19a", "static", "V4")
def placeholder_scale(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.input_scale", lambda scale: scale * 0 + torch.finfo(torch.float32).min)


@case("19b", "static", "V4")
def input_scales_all_one(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("input_scale"):
                tensors[name] = torch.ones(1)

    edit_tensors(folder, change)


@case("19c", "channel", "V1", "D1")
def nan_code(folder: Path) -> None:
    def change(codes: torch.Tensor) -> torch.Tensor:
        codes.view(torch.uint8)[5, :2] = 0x7F
        return codes

    alter(folder, f"{O_PROJ}.weight", change)


@case("19d", "channel", "V1", "D4")
def infinite_norm(folder: Path) -> None:
    alter(folder, "model.norm.weight", lambda weight: weight * float("inf"))


# ---------------------------------------------------------------------------------------------- KV cache


@case("18", "static", "V2")
def nan_kv_scale(folder: Path) -> None:
    alter(folder, "model.layers.0.self_attn.k_scale", lambda scale: scale * float("nan"))


@case("20", "static", "K7")
def only_v_scales(folder: Path) -> None:
    drop(folder, *(f"model.layers.{layer}.self_attn.k_scale" for layer in range(2)))


@case("20a", "static", "K7")
def only_k_scales(folder: Path) -> None:
    drop(folder, *(f"model.layers.{layer}.self_attn.v_scale" for layer in range(2)))


@case("21", "static", "K7")
def legacy_kv_scale(folder: Path) -> None:
    drop(folder, *(f"model.layers.{layer}.self_attn.v_scale" for layer in range(2)))
    for layer in range(2):
        rename(folder, f"model.layers.{layer}.self_attn.k_scale", f"model.layers.{layer}.self_attn.kv_scale")


@case("22", "static", "S3")
def kv_scale_of_two_values(folder: Path) -> None:
    alter(folder, "model.layers.0.self_attn.k_scale", lambda scale: scale.repeat(2))


@case("22a", "head", "S3")
def head_scale_of_wrong_length(folder: Path) -> None:
    alter(folder, "model.layers.0.self_attn.k_scale", lambda scale: scale[:1])


@case("23", "static", "K7")
def kv_scales_not_announced(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(kv_cache_scheme=None))


@case("24", "static", "C4")
def kv_scheme_of_integers(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant["kv_cache_scheme"].update(type="int"))


@case("24a", "static", "C4")
def kv_scheme_asymmetric(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant["kv_cache_scheme"].update(symmetric=False))


@case("24b", "static", "C4")
def kv_scheme_per_channel(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant["kv_cache_scheme"].update(strategy="channel"))


@case("24c", "static", "V4")
def kv_scales_of_one(folder: Path) -> None:
    alter(folder, "model.layers.1.self_attn.v_scale", lambda scale: scale * 0 + 1)


# ---------------------------------------------------------------------------------------------- experts


@case("25", "channel", "K6", models=("moe",))
def expert_missing(folder: Path) -> None:
    drop(folder, *(f"{EXPERT}.{p}_proj.{leaf}" for p in ("gate", "up", "down") for leaf in ("weight", "weight_scale")))


@case("26", "channel", "K6", models=("moe",))
def expert_scale_missing(folder: Path) -> None:
    drop(folder, f"{EXPERT}.up_proj.weight_scale")


@case("27", "channel", "K6", models=("moe",))
def one_expert_too_many(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{EXPERT}.")]:
            tensors[name.replace("experts.2", "experts.4")] = tensors[name].clone()

    edit_tensors(folder, change)


@case("28", "static", "V10", models=("moe",))
def input_scales_of_gate_and_up_differ(folder: Path) -> None:
    alter(folder, f"{EXPERT}.up_proj.input_scale", lambda scale: scale * 1.5)


@case("29", "channel", "C6", models=("moe",))
def one_expert_ignored(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        source = load_source(folder)
        for projection in ("gate", "up", "down"):
            tensors[f"{EXPERT}.{projection}_proj.weight"] = source[f"{EXPERT}.{projection}_proj.weight"]
            del tensors[f"{EXPERT}.{projection}_proj.weight_scale"]

    edit_tensors(folder, change)
    edit_quantization(folder, lambda quant: quant["ignore"].append("re:.*layers\\.1\\.mlp\\.experts\\.2\\..*"))


@case("30", "channel", "K1", "K4", "K6", "K8", models=("moe",))
def module_names_of_another_family(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(name)

    edit_tensors(folder, change)


@case("31", "channel", "K3", models=("moe",))
def scale_of_fused_experts(folder: Path) -> None:
    add(folder, "model.layers.0.mlp.experts.gate_up_proj.weight_scale", torch.ones(4, 64, 1))


# ---------------------------------------------------------------------------------------------- blocks and shapes


@case("32", "fp8-block", "K3")
def weight_scale_in_fp8_block(folder: Path) -> None:
    rename(folder, f"{O_PROJ}.weight_scale_inv", f"{O_PROJ}.weight_scale")


@case("32a", "block", "K3")
def weight_scale_inv_in_compressed_tensors(folder: Path) -> None:
    rename(folder, f"{O_PROJ}.weight_scale", f"{O_PROJ}.weight_scale_inv")


@case("33", "fp8-block", "S3")
def block_scale_of_bytes(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale_inv", lambda scale: torch.full(scale.shape, 114, dtype=torch.uint8))


@case("39", "block", "S5", models=("dense",))
def block_runs_over_a_fused_edge(folder: Path) -> None:
    """The model itself, with one KV head of 16 rows, is what does not fit blocks of 32."""
    source = reference.llama(folder.parent / "one-kv-head", kv_heads=1)
    (folder.parent / "source").write_text(str(source))
    for path in folder.iterdir():
        path.unlink()
    reference.quantize(source, folder, **BASES["block"])


@case("40", "block", "S3")
def block_scale_transposed(folder: Path) -> None:
    alter(folder, f"{V_PROJ}.weight_scale", lambda scale: scale.T)


@case("41", "fp8-block", "S3")
def block_size_other_than_the_scales(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(weight_block_size=[16, 16]))


@case("42", "static", "S2")
def q_proj_too_long(folder: Path) -> None:
    alter(folder, f"{Q_PROJ}.weight", lambda codes: codes.repeat(2, 1))


@case("43", "static", "S2")
def k_proj_transposed(folder: Path) -> None:
    alter(folder, f"{K_PROJ}.weight", lambda codes: codes.T)


# ---------------------------------------------------------------------------------------------- four bits, exponents


def _as_e8m0(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.float8_e8m0fnu)


@case("34", "mxfp4", "S7")
def mxfp4_scale_as_e8m0(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale", _as_e8m0)


@case("34a", "mxfp8", "S7")
def mxfp8_scale_as_e8m0(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale", _as_e8m0)


@case("34b", "mxfp8", "V2", "D1", "D2")
def mxfp8_scale_of_nan(folder: Path) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[4, 1] = 255
        return scale

    alter(folder, f"{O_PROJ}.weight_scale", change)


@case("35", "nvfp4", "S7")
def nvfp4_scale_as_bytes(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale", lambda scale: scale.view(torch.uint8))


@case("35a", "nvfp4", "V2", "D1", "D2")
def nvfp4_scale_negative(folder: Path) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale.view(torch.uint8)[4, 1] |= 0x80
        return scale

    alter(folder, f"{O_PROJ}.weight_scale", change)


@case("36", "nvfp4", "K2", models=("dense", "tied"))
def nvfp4_without_input_global_scale(folder: Path) -> None:
    drop(folder, f"{O_PROJ}.input_global_scale")


@case("36a", "nvfp4", "K2")
def nvfp4_without_global_scale(folder: Path) -> None:
    drop(folder, f"{O_PROJ}.weight_global_scale")


@case("36b", "modelopt-nvfp4", "K3")
def modelopt_global_scale_under_the_other_name(folder: Path) -> None:
    rename(folder, f"{O_PROJ}.weight_scale_2", f"{O_PROJ}.weight_global_scale")


@case("37", "nvfp4a16", "K3")
def input_global_scale_under_weight_only(folder: Path) -> None:
    add(folder, f"{O_PROJ}.input_global_scale", torch.tensor([463.0]))


@case("38", "nvfp4", "V9")
def global_scales_of_qkv_differ(folder: Path) -> None:
    """q is right in itself, with a global scale of its own."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = load_source(folder)[f"{Q_PROJ}.weight"].float()
        found = float(tensors[f"{Q_PROJ}.weight_global_scale"])
        tensors |= {f"{Q_PROJ}.{leaf}": tensor for leaf, tensor in reference.nvfp4(weight, found * 0.75).items()}

    edit_tensors(folder, change)


@case("38a", "nvfp4", "V8", "D1", "D2", "D3", "D6")
def global_scale_inverted(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_global_scale", lambda scale: 1 / scale)


@case("38e", "fp8-block", "V8", "D1", "D2", "D3", "D6")
def block_scales_inverted(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale_inv", lambda scale: 1 / scale)


@case("38b", "modelopt-nvfp4", "V8", "D1", "D2", "D3", "D6")
def modelopt_global_scale_inverted(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale_2", lambda scale: 1 / scale)


@case("38c", "nvfp4", "D1", "D2", "D3")
def halves_of_the_bytes_swapped(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_packed", lambda codes: codes >> 4 | codes << 4)


@case("38d", "nvfp4", "S6", models=("dense",))
def columns_are_no_whole_groups(folder: Path) -> None:
    """The model itself, 168 wide, is what does not fit groups of 16."""
    source = reference.llama(folder.parent / "odd", intermediate=168)
    (folder.parent / "source").write_text(str(source))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        wanted = reference.read(source)[0]
        tensors |= {name: tensor for name, tensor in wanted.items() if name in tensors}
        for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith("weight_packed")]:
            weight = wanted[f"{module}.weight"].float()
            padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 16))
            made = reference.nvfp4(padded, float(tensors[f"{module}.weight_global_scale"]))
            made["weight_packed"] = made["weight_packed"][:, : weight.shape[1] // 2]
            tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in made.items()}

    edit_tensors(folder, change)
    edit_config(folder, lambda config: config.update(intermediate_size=168))


# ---------------------------------------------------------------------------------------------- files


@case("44", "channel", "F2")
def shard_missing(folder: Path) -> None:
    shards_of(folder)[0].unlink()


@case("45", "channel", "F2")
def shard_and_index_missing(folder: Path) -> None:
    shards_of(folder)[0].unlink()
    (folder / INDEX).unlink()


@case("46", "channel", "F3")
def index_lacks_a_tensor(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].pop(f"{O_PROJ}.weight"))


@case("47", "channel", "F3")
def index_names_the_wrong_shard(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({f"{O_PROJ}.weight": shards_of(folder)[0].name}))


@case("48", "channel", "F2", "F4")
def stale_shard_without_index(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes(shards_of(folder)[0].read_bytes())
    (folder / INDEX).unlink()


@case("48a", "channel", "F6")
def stale_shard_beside_the_index(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes(shards_of(folder)[0].read_bytes())


@case("49", "channel", "F1")
def file_cut_off(folder: Path) -> None:
    data = shards_of(folder)[0].read_bytes()
    shards_of(folder)[0].write_bytes(data[:-100])


@case("49a", "channel", "F1")
def header_of_garbage(folder: Path) -> None:
    data = bytearray(shards_of(folder)[0].read_bytes())
    data[8:40] = b"\xff" * 32
    shards_of(folder)[0].write_bytes(data)


@case("49b", "channel", "F9")
def lfs_pointer(folder: Path) -> None:
    shards_of(folder)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")


@case("49c", "channel", "F9")
def empty_file(folder: Path) -> None:
    shards_of(folder)[0].write_bytes(b"")


@case("49d", "channel", "F9", "F6")
def index_leaves_the_folder(folder: Path) -> None:
    first = shards_of(folder)[0].name

    def change(index: dict[str, Any]) -> None:
        moved = {name: f"../{file}" for name, file in index["weight_map"].items() if file == first}
        index["weight_map"].update(moved)

    edit_index(folder, change)


@case("49e", "channel", "F5")
def total_size_wrong(folder: Path) -> None:
    edit_index(folder, lambda index: index["metadata"].update(total_size=1))


@case("49f", "channel", "F8")
def metadata_without_format(folder: Path) -> None:
    with safe_open(shards_of(folder)[0], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, shards_of(folder)[0])


@case("50", "channel", "F7")
def consolidated_weights(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")


@case("51", "channel", "F7")
def adapter_weights(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


@case("51a", "channel", "F7")
def pickled_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


@case("69", "channel", "F4")
def tensor_in_two_shards(folder: Path) -> None:
    first, last = shards_of(folder)
    tensors = load_file(last)
    name = next(iter(load_file(first)))
    save_file(tensors | {name: load_file(first)[name]}, last, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- whole tensors


@case("52", "channel", "K1", models=("dense", "moe"))
def untied_without_head(folder: Path) -> None:
    drop(folder, "lm_head.weight")


@case("53", "channel", "K1")
def no_embedding(folder: Path) -> None:
    drop(folder, "model.embed_tokens.weight")


@case("54", "channel", "K9", models=("tied",))
def scale_of_a_tied_head(folder: Path) -> None:
    add(folder, "lm_head.weight_scale", torch.ones(96, 1))


@case("55", "channel", "K4", models=("dense", "moe"))
def quantized_head(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["lm_head.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors["lm_head.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale"] = scale

    edit_tensors(folder, change)


@case("60", "channel", "K8")
def layer_too_many(folder: Path) -> None:
    add(folder, "model.layers.2.input_layernorm.weight", torch.ones(64).bfloat16())


@case("60a", "channel", "K8")
def unknown_tensor(folder: Path) -> None:
    add(folder, "extra.weight", torch.ones(64).bfloat16())


@case("60b", "channel", "K8")
def rotary_buffer(folder: Path) -> None:
    add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))


@case("61", "channel", "K3")
def zero_point(folder: Path) -> None:
    add(folder, f"{O_PROJ}.weight_zero_point", torch.zeros(64, 1, dtype=torch.int8))


@case("61a", "channel", "K3")
def group_index(folder: Path) -> None:
    add(folder, f"{O_PROJ}.weight_g_idx", torch.zeros(64, dtype=torch.int32))


@case("62", "static", "K7")
def kv_scale_in_the_wrong_place(folder: Path) -> None:
    rename(folder, "model.layers.0.self_attn.k_scale", "model.layers.0.k_scale")


# ---------------------------------------------------------------------------------------------- config


@case("56", "channel", "K4")
def target_of_everything(folder: Path) -> None:
    edit_group(folder, lambda group: group.update(targets=["re:.*"]))


@case("57", "channel", "C3")
def unknown_argument(folder: Path) -> None:
    edit_group(folder, lambda group: group["weights"].update(colour="red"))


@case("57a", "channel", "C2")
def ignore_null(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(ignore=None))


@case("57b", "channel", "C3")
def targets_missing(folder: Path) -> None:
    edit_group(folder, lambda group: group.pop("targets"))


@case("57c", "channel", "C2")
def format_missing(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.pop("format"))


@case("57d", "channel", "C2")
def format_dense(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(format="dense"))


@case("57e", "channel", "C3", "C4")
def static_token(folder: Path) -> None:
    edit_group(folder, lambda group: group["input_activations"].update(dynamic=False))


@case("57f", "channel", "C4")
def asymmetric_weights(folder: Path) -> None:
    edit_group(folder, lambda group: group["weights"].update(symmetric=False))


@case("57g", "channel", "C4")
def group_weights(folder: Path) -> None:
    edit_group(folder, lambda group: group["weights"].update(strategy="group", group_size=128))


@case("57h", "channel", "C2")
def preset_for_a_group(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(config_groups={"FP8_DYNAMIC": ["Linear"]}))


@case("57i", "channel", "C4")
def format_of_four_bits(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(format="nvfp4-pack-quantized"))


@case("58", "channel", "C1")
def quant_method_missing(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.pop("quant_method"))


@case("58a", "channel", "C1")
def quantization_config_missing(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))


@case("58b", "channel", "C1")
def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@case("58c", "channel", "C1")
def config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


@case("59", "fp8", "C2")
def activation_scheme_missing(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.pop("activation_scheme"))


@case("59a", "fp8", "C2")
def activation_scheme_unknown(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(activation_scheme="sometimes"))


@case("59b", "fp8-block", "C4")
def static_activations_with_blocks(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(activation_scheme="static"))


@case("59c", "channel", "C5")
def ignore_pattern_does_not_compile(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant["ignore"].append("re:(unclosed"))


@case("59d", "channel", "C5")
def ignore_entry_matches_nothing(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant["ignore"].append("model.layers.9.mlp.down_proj"))


@case("59e", "channel", "C7", models=("dense",))
def other_vocabulary(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(vocab_size=97))


@case("59f", "channel", "C7", "C8", models=("dense",))
def other_dtype(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(dtype="float64"))


@case("59g", "channel", "C7", models=("dense",))
def rope_scaling_added(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(rope_scaling={"rope_type": "linear", "factor": 4.0}))


@case("59h", "channel", "C9")
def weights_called_frozen(folder: Path) -> None:
    edit_quantization(folder, lambda quant: quant.update(quantization_status="frozen"))


@case("59i", "channel", "P4")
def processor_added(folder: Path) -> None:
    reference.write_json(folder / "preprocessor_config.json", {"do_resize": True})


@case("70", "channel", "C2")
def transform_without_tensors(folder: Path) -> None:
    apply = {"targets": ["Linear"], "location": "input"}
    transform = {"config_groups": {"R1": {"type": "hadamard", "apply": [apply]}}}
    edit_quantization(folder, lambda quant: quant.update(transform_config=transform))


# ---------------------------------------------------------------------------------------------- only against the source


@case("63", "channel", "D1", "D2", "D3")
def rows_permuted_against_their_scales(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight", lambda codes: codes.view(torch.uint8).flip(0).view(torch.float8_e4m3fn))


@case("64", "static", "V3", "D1", "D2", "D3", "D6")
def scale_inverted(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight_scale", lambda scale: 1 / scale)


@case("65", "channel", "V6", "D1", "D2", "D3", "D6")
def scales_of_two_layers_swapped(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (f"model.layers.{layer}.self_attn.o_proj.weight_scale" for layer in range(2))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(folder, change)


@case("66", "channel", "D2")
def scales_rounded_after_use(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].bfloat16()

    edit_tensors(folder, change)


@case("66a", "channel", "D6")
def lowest_bit_of_one_scale(folder: Path) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale.view(torch.int32)[7] ^= 1
        return scale

    alter(folder, f"{O_PROJ}.weight_scale", change)


@case("66b", "channel", "V5", "D1", "D2", "D3")
def codes_all_zero(folder: Path) -> None:
    alter(folder, f"{O_PROJ}.weight", lambda codes: torch.zeros_like(codes))


@case("66c", "channel", "D4")
def embedding_altered(folder: Path) -> None:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(torch.int16)[4, 9] ^= 1
        return weight

    alter(folder, "model.embed_tokens.weight", change)


@case("66d", "channel", "S4")
def norm_in_another_dtype(folder: Path) -> None:
    alter(folder, "model.norm.weight", lambda weight: weight.float())


# ---------------------------------------------------------------------------------------------- package


@case("67", "channel", "P3")
def chat_template_dropped(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@case("67a", "channel", "P2")
def other_eos_token(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')


@case("68", "channel", "P1")
def tokenizer_of_another_revision(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"b": 0}}}')


@case("68a", "channel", "P5")
def licence_dropped(folder: Path) -> None:
    (folder / "LICENSE").unlink()


@case("68b", "channel", "P6")
def token_in_a_text_file(folder: Path) -> None:
    (folder / "README.md").write_text("login with hf_" + "a" * 34)
