"""A server's GPUs, as NVML sees them: clocks, power, temperature, energy, and other processes on them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

# nvml.h, nvmlClocksEventReasons. SLOWED is by heat or by the hardware's protection, POWER_CAPPED by the power limit,
# which a healthy GPU reaches under load.
SLOWED = 0x8 | 0x20 | 0x40 | 0x80
POWER_CAPPED = 0x4


@dataclass(frozen=True, slots=True)
class GpuState:
    """One observation of a GPU."""

    time_s: float
    gpu: int  # index among the server's
    power_w: float
    temperature_c: float
    sm_clock_mhz: float
    utilization: float  # share of the time since the last sample in which a kernel ran
    energy_j: float  # since the driver was loaded
    slowed: bool
    power_capped: bool


class Gpus:
    """The first `count` GPUs that a process with `visible` as CUDA_VISIBLE_DEVICES sees; none without NVML."""

    def __init__(self, count: int, visible: str | None = None) -> None:
        visible = visible or os.environ.get("CUDA_VISIBLE_DEVICES")
        self._handles: list[Any] = []
        try:
            pynvml.nvmlInit()
            names = visible.split(",") if visible else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
            self._handles = [_handle(name.strip()) for name in names[:count]]
        except pynvml.NVMLError:
            pass

    def others(self) -> str:
        """Describe the processes that use these GPUs before the server starts; empty if there are none."""
        descriptions = []
        for number, handle in enumerate(self._handles):
            if processes := _or_0(lambda h: len(pynvml.nvmlDeviceGetComputeRunningProcesses(h)), handle):
                used = _or_0(lambda h: pynvml.nvmlDeviceGetMemoryInfo(h).used, handle) / 2**30
                descriptions.append(f"GPU {number}: {processes} processes, {used:.1f} GiB")
        return "; ".join(descriptions)

    def read(self, time_s: float) -> list[GpuState]:
        """Observe each GPU, at `time_s` on the caller's clock."""
        return [_state(handle, number, time_s) for number, handle in enumerate(self._handles)]


def figures(states: Sequence[GpuState]) -> dict[str, float]:
    """The run's figures, named as in result.json; none without a GPU."""
    if not states:
        return {}
    count = len(states)
    energy = [[state.energy_j for state in states if state.gpu == gpu] for gpu in {state.gpu for state in states}]
    return {
        "gpu_energy_j": sum(joules[-1] - joules[0] for joules in energy),
        "gpu_power_w": sum(state.power_w for state in states) / count,
        "gpu_temperature_max_c": max(state.temperature_c for state in states),
        "gpu_sm_clock_mhz": sum(state.sm_clock_mhz for state in states) / count,
        "gpu_utilization": sum(state.utilization for state in states) / count,
        "gpu_slowed_share": sum(state.slowed for state in states) / count,
        "gpu_power_capped_share": sum(state.power_capped for state in states) / count,
    }


def _handle(name: str) -> Any:
    """NVML's handle of a GPU, named by its index or by its UUID (GPU-…, MIG-…)."""
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _state(handle: Any, number: int, time_s: float) -> GpuState:
    reasons = _or_0(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    return GpuState(
        time_s=time_s,
        gpu=number,
        power_w=_or_0(pynvml.nvmlDeviceGetPowerUsage, handle) / 1e3,
        temperature_c=_or_0(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        sm_clock_mhz=_or_0(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        utilization=_or_0(lambda h: pynvml.nvmlDeviceGetUtilizationRates(h).gpu, handle) / 100,
        energy_j=_or_0(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) / 1e3,
        slowed=bool(reasons & SLOWED),
        power_capped=bool(reasons & POWER_CAPPED),
    )


def _or_0(query: Any, *arguments: Any) -> Any:
    """NVML's answer to `query`; 0 if this GPU, or this part of one, does not support it."""
    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return 0
