"""The devices that a process may use, whatever names CUDA_VISIBLE_DEVICES gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.nvidia_smi import B200, GB10, H100, H100_MIG, MACHINES, Machine, instance_uuid, uuid_of

from fp8pipe.errors import NoSuitableDevice
from fp8pipe.machine import gpus

MIB = 2**20


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def install(machine: Machine, setting: str | None = None) -> tuple[gpus.Gpu, ...]:
        machine.install(tmp_path / "bin", monkeypatch)
        if setting is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        return gpus.visible()

    return install


def test_a_gpu_is_known_by_index_uuid_name_capability_and_memory(host):
    (gpu,) = host(MACHINES["H100"])
    assert (gpu.index, gpu.uuid, gpu.name, gpu.capability) == (0, uuid_of(0), H100.name, (9, 0))
    assert (gpu.total_bytes, gpu.free_bytes, gpu.is_instance) == (81559 * MIB, 81007 * MIB, False)


def test_a_host_without_driver_or_gpu_has_none(host, tmp_path, monkeypatch):
    assert host(MACHINES["no GPU"]) == ()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible() == ()


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3", [3]),
        ("6, 2", [6, 2]),
        ("1,-1,2", [1]),
        ("1,9,2", [1]),
        ("1,1", []),
        (f"{uuid_of(5)},0", [5, 0]),
        ("GPU-4", [4]),
        ("GPU-", []),
    ],
)
def test_cuda_visible_devices_chooses_as_in_cuda(host, setting, indices):
    assert [gpu.index for gpu in host(MACHINES["8 x H100"], setting)] == indices


@pytest.mark.parametrize(
    ("setting", "uuids"),
    [
        (None, [instance_uuid(0, 0), instance_uuid(0, 1), uuid_of(1)]),
        ("0", [instance_uuid(0, 0)]),
        (instance_uuid(0, 1), [instance_uuid(0, 1)]),
        ("1", [uuid_of(1)]),
    ],
)
def test_instances_stand_for_a_gpu_that_mig_divides(host, setting, uuids):
    found = host(Machine((H100_MIG, B200)), setting)
    assert [gpu.uuid for gpu in found] == uuids
    for gpu in found:
        assert gpu.is_instance == (gpu.index == 0)
        assert gpu.total_bytes == (40448 if gpu.is_instance else 183359) * MIB


def test_mig_without_instances_leaves_nothing_to_use(host):
    assert host(Machine((replace(H100_MIG, instances=()),))) == ()


def test_memory_that_is_not_told_is_none(host):
    (gpu,) = host(Machine((GB10,)))
    assert (gpu.total_bytes, gpu.free_bytes, gpu.capability) == (None, None, (12, 1))


def test_a_driver_that_does_not_work_is_no_machine_without_gpus(host):
    with pytest.raises(NoSuitableDevice, match=r"status 9: NVIDIA-SMI has failed .* mend the NVIDIA driver"):
        host(MACHINES["broken driver"])


def test_the_driver_tells_its_newest_cuda(host):
    host(MACHINES["old driver"])
    assert gpus.driver() == ("550.54.15", (12, 4))
