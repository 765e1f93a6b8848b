"""What a machine cannot do is one line, with exit code 4, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.nvidia_smi import A100, B200, GB10, H100, H100_MIG, L40S, MACHINES, RTX_PRO_6000, Machine

from fp8pipe.calibrate.key import resolved
from fp8pipe.config import EvalSuite, Parallel, TaskSpec
from fp8pipe.errors import NoSuitableDevice
from fp8pipe.evaluate.footprint import need_of, spread
from fp8pipe.machine import builds, device
from fp8pipe.machine.engine_python import own
from fp8pipe.machine.fit import Need, tensor_size
from fp8pipe.ui import doctor

OLD = "model name : Old CPU\nflags : fpu sse2 avx2\n"
NEW = "model name : New CPU\nflags : fpu sse2 avx2 avx512f\n"
LLAMA_8B = Need("Llama 8B at BF16", 16_060_000_000, 537_000_000, 4096)
LLAMA_70B = Need("Llama 70B at BF16", 141_100_000_000, 1_342_000_000, 4096)


DEEPSEEK = Need("DeepSeek-V3 at BF16", 1_342_000_000_000, 300_000_000, 4096, heads=128)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make this host such a machine, on which the GPU profile is installed."""

    def install(machine: Machine, *, torch: tuple[int, int] | None = (13, 0), vllm: str = "cuda", **env: str) -> None:
        machine.become(tmp_path / "bin", monkeypatch, torch=torch, vllm=vllm)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return install


def test_cpu_without_avx512_is_told_in_one_line():
    problem = device.cpu_problem(OLD)
    assert problem is not None
    assert "AVX-512" in problem
    assert "Old CPU" in problem
    assert "\n" not in problem
    assert device.cpu_problem(NEW) is None


def test_only_an_fp8_cache_needs_avx512(monkeypatch):
    monkeypatch.setattr(device, "cpu_problem", lambda info: "no AVX-512")
    assert device.examine().problems == ("no AVX-512",)
    assert device.examine([replace(LLAMA_8B, fp8_cache=True)]).problems == ("no AVX-512",)
    assert device.examine([LLAMA_8B]).problems == ()
    with pytest.raises(NoSuitableDevice, match="no AVX-512"):
        device.require()
    assert NoSuitableDevice.exit_code == 4


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((10, 3), "blackwell"),
        ((12, 0), "blackwell"),
        ((12, 1), "blackwell"),
        ((7, 5), "sm75"),
    ],
)
def test_hardware_class_of_a_compute_capability(capability, name):
    assert device.class_of_capability(*capability) == name


@pytest.mark.parametrize(
    ("board", "found"),
    [(L40S, "ada"), (H100, "hopper"), (B200, "blackwell"), (RTX_PRO_6000, "blackwell"), (GB10, "blackwell")],
)
def test_a_gpu_that_serves_fp8_is_fit(host, board, found):
    host(Machine((board,)))
    machine = device.require([LLAMA_8B], starts=True)
    assert (machine.device.device_class, machine.warnings) == (found, ())
    assert device.detect() == machine.device


def test_particulars_are_those_of_the_device_that_measures(host, monkeypatch):
    host(Machine((H100,)))
    gpu = device.particulars()
    assert gpu.keys() == {"python", "system", "driver", "driver_cuda", "torch_cuda"} and gpu["torch_cuda"] == "13.0"
    assert all(gpu.values())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.particulars().keys() == {"python", "system", "cpu", "cpu_extensions"}


def test_a_gpu_below_ada_is_refused(host):
    host(Machine((A100,)))
    with pytest.raises(NoSuitableDevice, match=r"A100-SXM4-80GB has compute capability 8\.0, and FP8 W8A8 needs 8\.9"):
        device.require()


def test_the_first_visible_gpu_counts_not_the_first_of_the_host(host):
    host(Machine((A100, H100)), CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert device.require().device.device_class == "hopper"


def test_numbers_are_not_trusted_where_cuda_counts_otherwise(host):
    host(Machine((A100, H100)), CUDA_VISIBLE_DEVICES="1")
    with pytest.raises(NoSuitableDevice, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        device.require()


def test_a_driver_older_than_torchs_cuda_is_refused(host):
    host(MACHINES["old driver"])
    words = r"driver 550\.54\.15 runs CUDA up to 12\.4, and torch was built for CUDA 13\.0; update the driver to 580"
    with pytest.raises(NoSuitableDevice, match=words):
        device.require()
    host(MACHINES["old driver"], torch=(12, 8))  # CUDA's minor version compatibility
    device.require()


def test_calibration_does_not_fall_back_to_the_cpu_in_silence(host):
    host(MACHINES["old driver"])
    for asked in ("auto", "cuda"):
        with pytest.raises(NoSuitableDevice, match=r"update the driver .* or give --device cpu"):
            resolved(asked)
    assert resolved("cpu") == "cpu"
    host(MACHINES["no GPU"])
    assert resolved("auto") == "cpu"
    with pytest.raises(NoSuitableDevice, match="device cuda:1: torch finds no GPU"):
        resolved("cuda:1")


def test_cpu_builds_on_a_gpu_host_are_refused_unless_the_gpus_are_hidden(host):
    host(MACHINES["H100"], torch=None, vllm="cpu")
    with pytest.raises(NoSuitableDevice, match="torch is a CPU build; install the GPU profile"):
        device.require()
    host(MACHINES["H100"], vllm="cpu")
    with pytest.raises(NoSuitableDevice, match="vLLM is a CPU build"):
        device.require()
    host(MACHINES["H100"], torch=None, vllm="cpu", CUDA_VISIBLE_DEVICES="")
    assert device.require(()).device.device_class == "cpu"


def test_gpu_builds_without_a_gpu_are_refused(host):
    host(MACHINES["no GPU"])
    with pytest.raises(NoSuitableDevice, match="nvidia-smi finds no GPU, and vLLM was built for GPUs"):
        device.require()
    host(MACHINES["8 x H100"], CUDA_VISIBLE_DEVICES="8")
    with pytest.raises(NoSuitableDevice, match="CUDA_VISIBLE_DEVICES='8' leaves none of 8 devices"):
        device.require()


def test_a_broken_driver_matters_to_gpu_builds_alone(host):
    host(MACHINES["broken driver"])
    with pytest.raises(NoSuitableDevice, match=r"nvidia-smi failed with status 9.*mend the NVIDIA driver"):
        device.require()
    host(MACHINES["broken driver"], torch=None, vllm="cpu")
    assert device.detect().device_class == "cpu"
    assert "mend the NVIDIA driver" in device.require(()).warnings[0]


def test_a_model_that_one_gpu_cannot_hold_is_refused_with_the_number_that_can(host):
    host(MACHINES["8 x H100"])
    words = r"Llama 70B at BF16 takes 141\.1 GB of weights and 1\.3 GB of KV cache.*it takes 2 such GPUs"
    with pytest.raises(NoSuitableDevice, match=words):
        device.require([LLAMA_8B, LLAMA_70B])
    device.require([replace(LLAMA_70B, gpus=2)])
    device.require([replace(LLAMA_70B, gpus=2, copies=4)])
    with pytest.raises(NoSuitableDevice, match="to be served on 10 GPUs, and this process may use 8"):
        device.require([replace(LLAMA_70B, gpus=2, copies=5)])
    with pytest.raises(
        NoSuitableDevice,
        match=r"2 such GPUs for each of 2 copies, and this process may use 8; set `parallel: \{tensor: 2\}`",
    ):
        device.require([replace(LLAMA_70B, copies=2)])
    host(MACHINES["H100"])
    with pytest.raises(NoSuitableDevice, match="to be served on 2 GPUs, and this process may use 1"):
        device.require([replace(LLAMA_70B, gpus=2)])
    words = "it takes 32 such GPUs, on 4 hosts of 8, and this process may use 1; use more of them"
    with pytest.raises(NoSuitableDevice, match=words):
        device.require([DEEPSEEK])
    host(Machine((H100, B200, B200)))
    with pytest.raises(NoSuitableDevice, match="to be served on 2 GPUs, and this process may use 1"):
        device.require([replace(LLAMA_8B, gpus=2)])
    host(MACHINES["B300"])
    device.require([LLAMA_70B])


@pytest.mark.parametrize(
    ("machine", "need", "size"),
    [
        (MACHINES["8 x H100"], LLAMA_8B, 1),
        (MACHINES["8 x H100"], LLAMA_70B, 2),
        (MACHINES["8 x H100"], replace(LLAMA_70B, weights=282_000_000_000), 4),
        (MACHINES["8 x H100"], replace(LLAMA_70B, weights=282_000_000_000, heads=20), 4),
        (MACHINES["8 x H100"], replace(LLAMA_70B, weights=400_000_000_000, heads=20), 4),
        (MACHINES["8 x H100"], DEEPSEEK, 8),
        (MACHINES["B300"], LLAMA_70B, 1),
        (MACHINES["MIG"], LLAMA_70B, 1),
        (Machine((H100, B200, B200)), LLAMA_70B, 1),
        (Machine((GB10, GB10)), LLAMA_70B, 1),
    ],
)
def test_the_smallest_number_of_gpus_that_hold_a_model(host, machine, need, size):
    """Or the largest that there are, of which it is then told what it lacks."""
    host(machine)
    assert tensor_size(need, device.detect().gpus) == size


def test_a_size_that_cannot_serve_is_left_out(host):
    host(MACHINES["8 x H100"])
    assert tensor_size(LLAMA_70B, device.detect().gpus, lambda size: size != 2) == 4


def test_the_larger_side_decides_for_both_and_the_suite_before_it(host):
    host(MACHINES["8 x H100"])
    small, large = need_of("m", 10**9, DENSE, {}), need_of("m", 2 * 10**11, DENSE, {})
    suite = EvalSuite(name="own", tasks={"t": TaskSpec()})
    assert spread(suite, [small, large], device.detect().gpus) == Parallel(tensor=4)
    assert spread(suite, [small, large], ()) == Parallel()
    given = suite.model_copy(update={"parallel": Parallel(tensor=2, data=4)})
    assert spread(given, [small, large], device.detect().gpus) == given.parallel


def test_a_mig_instance_serves_alone(host):
    host(Machine((H100_MIG,)))
    assert device.require([LLAMA_8B]).device.device_class == "hopper"
    with pytest.raises(NoSuitableDevice, match="use the whole GPU"):
        device.require([LLAMA_70B])
    with pytest.raises(NoSuitableDevice, match="may use one MIG instance at a time"):
        device.require([replace(LLAMA_8B, gpus=2)])


def test_a_gpu_that_others_use_stops_an_engine_but_not_the_work_before(host):
    host(MACHINES["H100, busy"])
    assert "other processes hold memory; 10.3 GB of 85.5 GB is free" in device.require([LLAMA_8B]).warnings[0]
    with pytest.raises(NoSuitableDevice, match=r"vLLM wants 0\.92 of it; end those processes"):
        device.require([LLAMA_8B], starts=True)
    device.require([replace(LLAMA_8B, weights=10**9, utilization=0.1)], starts=True)
    host(Machine((replace(H100, free=9800), H100)))
    assert not device.require([LLAMA_8B]).warnings, "the other will be taken"
    assert device.require([replace(LLAMA_8B, gpus=2)]).warnings
    with pytest.raises(NoSuitableDevice, match="GPU 0"):  # vLLM takes the first that it may use
        device.require([LLAMA_8B], starts=True)
    host(Machine((replace(H100, free=9800), H100)), CUDA_VISIBLE_DEVICES="1")
    device.require([LLAMA_8B], starts=True)


def test_flashinfers_compiler_is_missed_where_vllm_takes_flashinfer_first(host, monkeypatch):
    for board, missed in ((B200, True), (L40S, True), (H100, False)):
        host(Machine((board,)))
        monkeypatch.setattr(builds, "compiler", lambda: None)
        warnings = device.require().warnings
        assert any("nvcc and ninja" in warning for warning in warnings) == missed
    host(Machine((B200,)))
    monkeypatch.setattr(builds, "compiler", lambda: None)
    monkeypatch.setattr(builds, "has_package", lambda name: name == "flashinfer_cubin")
    assert "vLLM stops when it needs one" in device.require().warnings[0]


def test_the_compiler_is_where_vllm_looks_for_it(tmp_path, monkeypatch):
    def program(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    program(tmp_path / "cuda/bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "cuda/bin"))
    assert builds.compiler() is None
    program(tmp_path / "cuda/bin/ninja")
    assert builds.compiler() == str(tmp_path / "cuda/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert builds.compiler() is None


def test_the_installed_torch_is_what_it_says_itself():
    import torch

    cuda = torch.version.cuda
    assert builds.torch_cuda(own()) == (None if cuda is None else tuple(int(part) for part in cuda.split(".")[:2]))


# ---------------------------------------------------------------------------------------------- what a model takes

DENSE = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize(
    ("config", "engine", "numbers"),
    [
        (DENSE, {"max_model_len": 4096}, 4096 * 32 * 2 * 8 * 128),
        (DENSE, {}, 131072 * 32 * 2 * 8 * 128),
        ({"text_config": DENSE | {"head_dim": 64}}, {"max_model_len": 4096}, 4096 * 32 * 2 * 8 * 64),
        (DENSE | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, {"max_model_len": 4096}, 4096 * 32 * 576),
        (
            DENSE | {"layer_types": ["full_attention", "sliding_attention", "linear_attention"], "sliding_window": 512},
            {"max_model_len": 4096},
            (4096 + 512) * 2 * 8 * 128,
        ),
        ({"model_type": "rwkv"}, {}, 0),
    ],
)
def test_cache_of_one_sequence(config, engine, numbers):
    assert need_of("m", 1, config, engine).kv_cache == 2 * numbers
    assert need_of("m", 1, config, engine | {"kv_cache_dtype": "fp8"}).kv_cache == numbers


def test_need_follows_the_engines_arguments():
    engine = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "gpu_memory_utilization": 0.5}
    need = need_of("m", 1, DENSE, engine)
    assert (need.gpus, need.utilization, need.context, need.fp8_cache) == (8, 0.5, 131072, False)
    assert (need.heads, need.all_gpus) == (32, 8)
    assert need_of("m", 1, DENSE, engine | {"data_parallel_size": 2}).all_gpus == 16


# ---------------------------------------------------------------------------------------------- doctor


def test_doctor_without_a_token_warns_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    checks = {check.name: check for check in doctor.examine()}
    assert checks["token"].outcome == "warning"
    assert checks["hub"].outcome == "failed"
    assert "127.0.0.1:9" in checks["hub"].detail
