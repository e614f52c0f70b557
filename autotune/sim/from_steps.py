"""Text that `autotune calibrate STEPS…` prints: a device's YAML, its twin's error, and what no step has shown."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from autotune.config.schema import Device
from autotune.errors import InputError
from autotune.measure.steps import Steps
from autotune.sim.cost import CONSTANTS
from autotune.sim.flags import resolve
from autotune.sim.shape import Shape
from autotune.sim.twin import MOST_EFFICIENT, Recorded, Twin, errors, fit

# Where nothing says which model was served, the prior is that of Llama-3.1-8B, and says less.
UNKNOWN = {
    "architectures": ["LlamaForCausalLM"],
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256},
}
UNKNOWN_WIDTH = 2.0
EFFICIENCIES = ("math_efficiency", "attention_efficiency", "bandwidth_efficiency")
GRAPHS = (256, 512, 1024, 2048, 4096, 8192)  # largest CUDA graphs, of which one is taken if it is not told


def report(fitted: Sequence[Steps], predicted: Sequence[Steps], device: Device, model: Mapping[str, Any] | None) -> str:
    """The text for recordings to fit to and others to predict. `model` is a config.json, for those that have none."""
    both = [*fitted, *predicted]
    configs = [config for steps in both if (config := steps.model or model)]  # lines of a CSV have none
    if any(config != configs[0] for config in configs):
        names = ", ".join(steps.name for steps in both)
        raise InputError(f"the recorded steps are of different models ({names}); give those of one at a time")
    shape = Shape.of(configs[0] if configs else UNKNOWN)
    for steps in both:
        Recorded.of(steps, device, shape)
    twin = fit(fitted, device, shape, 1.0 if configs else UNKNOWN_WIDTH)
    lines = [f"{device.name}, fitted to {sum(map(len, fitted)):,} steps of {', '.join(steps.name for steps in fitted)}"]
    if not configs:
        lines.append("Which model was served is not recorded; model=… says it, and makes what no step shows surer.")
    lines += ["", *table("fitted", twin, fitted)]
    lines += ["", *table("predicted", twin, [guessed(twin, steps) for steps in predicted])] if predicted else []
    lines += ["", "Constants of a step, s, with the uncertainty of each (a factor) where it is more than 1.05:"]
    costs = twin.cost(resolve(fitted[0].args, device, shape)).constants
    for name, value, deviation in zip(CONSTANTS, costs, np.sqrt(np.diag(twin.covariance)), strict=True):
        if value:
            lines.append(f"  {name:20s} {value:9.3g}" + (f"  ×/÷ {np.exp(deviation):.2f}" if deviation > 0.05 else ""))
    lines += ["", "No step has shown:", *(f"  {words}" for words in twin.unseen)]
    made = twin.as_device(resolve(fitted[0].args, device, shape))
    if cut := [name for name in EFFICIENCIES if getattr(made, name) >= MOST_EFFICIENT]:
        lines += ["", f"A device can't hold what this model showed (cut: {', '.join(cut)}); backend.twin=[…] can."]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n" + device_yaml(made)


def table(title: str, twin: Twin, recordings: Sequence[Steps]) -> list[str]:
    """Lines for each kind of step: medians of the time from schedule() to the result, and of the absolute error."""
    what = f"{title}, medians"
    lines = [f"{what:64s}{'steps':>7s}{'measured':>10s}{'expected':>10s}{'error':>8s}  error without the host's pace"]
    for steps in recordings:
        for found in errors(twin, steps):
            times = f"{found.measured_s * 1e3:7.1f} ms{found.predicted_s * 1e3:7.1f} ms"
            name = f"{steps.name}: {found.kind}"
            lines.append(f"{name:64s}{found.steps:7,d}{times}{found.error:8.1%}{found.constant:8.1%}")
    return lines


def guessed(twin: Twin, steps: Steps) -> Steps:
    """`steps`; if nothing says how large a CUDA graph their server had, with the size that explains them best."""
    if steps.args:
        return steps

    def with_graphs(size: int) -> Steps:
        args = {"max_num_batched_tokens": max(int(steps.tokens.max()), 256), "max_cudagraph_capture_size": size}
        return dataclasses.replace(steps, args=args, name=f"{steps.name} (graphs up to {size}, a guess)")

    def seconds_off(one: Steps) -> float:
        return sum(found.steps * found.measured_s * found.constant for found in errors(twin, one))

    return min(map(with_graphs, GRAPHS), key=seconds_off)


def device_yaml(device: Device) -> str:
    """A file for conf/backend/device/, its numbers with four digits."""
    body = {
        field.name: float(f"{value:.4g}") if isinstance(value, float) else value
        for field in dataclasses.fields(device)
        if (value := getattr(device, field.name)) != field.default
    }
    return OmegaConf.to_yaml(OmegaConf.create(body))
