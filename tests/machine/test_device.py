"""What a machine cannot do is said in one line, with exit code 4, before any work."""

import pytest

from fp8pipe.errors import NoSuitableDevice
from fp8pipe.machine import device
from fp8pipe.ui import doctor

OLD = "model name : Old CPU\nflags : fpu sse2 avx2\n"
NEW = "model name : New CPU\nflags : fpu sse2 avx2 avx512f\n"


def test_cpu_without_avx512_is_told_in_one_line():
    problem = device.cpu_of(OLD).problem
    assert problem is not None
    assert "AVX-512" in problem
    assert "Old CPU" in problem
    assert "\n" not in problem


def test_cpu_with_avx512_serves():
    assert device.cpu_of(NEW).problem is None


def test_unsuitable_device_is_refused_with_the_environments_exit_code(monkeypatch):
    monkeypatch.setattr(device, "detect", lambda: device.cpu_of(OLD))
    with pytest.raises(NoSuitableDevice):
        device.require()
    assert NoSuitableDevice.exit_code == 4


@pytest.mark.parametrize(("capability", "name"), [((8, 9), "ada"), ((9, 0), "hopper"), ((7, 5), "sm75")])
def test_hardware_class_of_a_compute_capability(capability, name):
    assert device.class_of_capability(*capability) == name


def test_doctor_without_a_token_warns_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    checks = {check.name: check for check in doctor.examine()}
    assert checks["token"].outcome == "warning"
    assert checks["hub"].outcome == "failed"
    assert "127.0.0.1:9" in checks["hub"].detail
