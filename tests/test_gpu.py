"""What is read of the GPUs. NVML can't exist here: its functions are replaced, nothing above them is."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from autotune.config.schema import LiveConfig
from autotune.errors import StartError
from autotune.live import backend, gpu
from autotune.live.gpu import Gpus
from autotune.measure.slot import Slot


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine of two H100s: index 1 is worked on by somebody else."""
    state = SimpleNamespace(reasons=0, millijoules=0)

    def memory(_: Any) -> SimpleNamespace:
        return SimpleNamespace(used=12 << 30)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1, 2] if handle == 1 else [],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetPowerUsage": lambda _: 650_000,
        "nvmlDeviceGetTemperature": lambda *_: 61,
        "nvmlDeviceGetClockInfo": lambda *_: 1755,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=97),
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: state.millijoules,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda _: state.reasons,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    yield state


def test_run_is_summed_up(card: SimpleNamespace):
    gpus = Gpus(1, "0")
    before = gpus.read(0.0)
    card.millijoules, card.reasons = 1_300_000, gpu.POWER_CAPPED
    found = gpu.figures([*before, *gpus.read(2.0)])
    assert found == {
        "gpu_energy_j": 1300,
        "gpu_power_w": 650,
        "gpu_temperature_max_c": 61,
        "gpu_sm_clock_mhz": 1755,
        "gpu_utilization": 0.97,
        "gpu_slowed_share": 0,
        "gpu_power_capped_share": 0.5,
    }


def test_heat_counts_as_slowed_and_the_power_limit_does_not(card: SimpleNamespace):
    card.reasons = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    assert Gpus(1, "0").read(0.0)[0].slowed
    card.reasons = pynvml.nvmlClocksThrottleReasonSwPowerCap
    state = Gpus(1, "0").read(0.0)[0]
    assert state.power_capped and not state.slowed


def test_somebody_else_on_the_gpu_is_named(card: SimpleNamespace):
    assert Gpus(1, "0").others() == ""
    assert Gpus(2, None).others() == "GPU 1: 2 processes, 12.0 GiB"


def test_figure_that_a_gpu_does_not_have_is_zero(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    def unsupported(_: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo"):
        monkeypatch.setattr(pynvml, name, unsupported)
    assert Gpus(1, "0").read(0.0)[0].energy_j == 0
    assert Gpus(1, "1").others() == "GPU 0: 2 processes, 0.0 GiB"


def test_gpus_of_a_server_are_those_that_backend_env_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def seen(count: int, visible: str | None) -> None:
        raise StartError(f"{count} of {visible}")

    monkeypatch.setattr(backend, "Gpus", seen)
    monkeypatch.setattr(backend, "LoadGenerator", lambda *_: nullcontext())
    live = backend.LiveBackend(LiveConfig(env={"CUDA_VISIBLE_DEVICES": "3"}), Path.home() / ".cache/autotune")
    unused: Any = None
    with pytest.raises(StartError, match="1 of 3"), live.start(unused, {}, unused, tmp_path, Slot()):
        pass


def test_machine_without_a_driver_has_no_gpus():
    assert Gpus(1).read(0.0) == [] and gpu.figures([]) == {}
