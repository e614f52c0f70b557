"""The device at whose constants the fit of a twin begins."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from autotune.config import CONF
from autotune.config.schema import Config, Device
from autotune.config.vllm_flags import FLAG

FOLDER = CONF / "backend/device"
CPU, OTHER = "cpu", "h100"  # where there is no GPU; for a GPU that has no file
DEFAULTS = ("max_num_batched_tokens", "max_num_seqs", "async_scheduling")  # of vLLM, which depend on the device


def device_of(config: Config, facts: Mapping[str, str]) -> tuple[Device, str]:
    """The device of the prior or of the simulated backend, or the one in conf/ of a machine with these `facts`.

    Beside it stands what names it; nothing if that is only the default, for a GPU that has no file there.
    """
    for backend, whose in ((config.prior.backend, "prior.backend.device"), (config.backend, "backend.device")):
        if backend and "device" in backend:
            return Device(**dict(backend["device"])), whose
    gpu = facts.get("gpu", "")
    known = [path.stem for path in FOLDER.glob("*.yaml") if path.stem in gpu.lower()]
    named = max(known, key=len, default="") if gpu else CPU if "cpu" in facts else ""
    return Device(**fields_of(named or OTHER)), (gpu or "no GPU") if named else ""


def fields_of(name: str) -> dict[str, Any]:
    """Fields in a file of conf/backend/device/, and in those that it builds on."""
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    below = [fields_of(other) for other in written.pop("defaults", []) if other != "_self_"]
    return {name: value for fields in [*below, written] for name, value in fields.items()}


def as_started(device: Device, args: Mapping[str, Any], params: Mapping[str, Any]) -> Device:
    """`device` with vLLM's defaults as it resolved them to `args`, where the trial's `params` did not choose them."""
    seen = {name: args[name] for name in DEFAULTS if args.get(name) is not None and f"{FLAG}{name}" not in params}
    return replace(device, **seen)


def simulated(device: Device) -> dict[str, Any]:
    """A backend that simulates `device`, as conf/backend/sim.yaml composes it."""
    return {"_target_": "autotune.sim.backend.SimBackend", "device": asdict(device)}
