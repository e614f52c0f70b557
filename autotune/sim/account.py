"""Parts of the steps of a recorded server: the time between results, split into the GPU's parts and the host's.

The GPU's time of a step is the twin's word, part by part. What is left of the time between two results is the host's:
the GPU waited for it.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autotune.measure.steps import Floats, Steps
from autotune.sim.cost import CONSTANTS, POWER, Work, seconds
from autotune.sim.twin import IDLE_S, Recorded, Twin, longest_run, told


@dataclass(frozen=True)
class Share:
    """Engine time of the steps of one kind."""

    steps: int
    tokens: float  # computed: prefilled and generated
    in_graphs: float  # of these, in steps that a CUDA graph held
    parts: dict[str, float]  # seconds in all: weights, tokens, attention, sequences; launch, schedule


def account(twin: Twin, steps: Steps) -> dict[str, Share]:
    """Shares of the longest run in `steps`, of steps with a prefill and of those that only decode; no idle time."""
    rows = replace(steps, table=steps.table[longest_run(steps)])
    recorded = Recorded.of(rows, twin.device, twin.shape)
    constants, work = told(twin, recorded)
    gpu = gpu_seconds(constants, work)
    took = between_results(rows)
    waited = waits(took - sum(gpu.values()), recorded.overlapped)
    step = seconds(constants, work)
    scheduling = step.prepare_s + twin.loop[0] + twin.loop[1] * work.sequences
    launching = step.launch_s / (step.launch_s + scheduling)
    found = {}
    for kind, has_prefill in (("prefill", 1.0), ("decode", 0.0)):
        of_kind = (work.prefills == has_prefill) & (took < IDLE_S)  # longer: interrupted
        if of_kind.any():
            parts = split({part: one[of_kind] for part, one in gpu.items()}, waited[of_kind], launching[of_kind])
            tokens = rows.tokens[of_kind]
            in_graphs = float((tokens * work.in_graph[of_kind]).sum())
            found[kind] = Share(len(tokens), float(tokens.sum()), in_graphs, parts)
    return found


def gpu_seconds(constants: Floats, work: Work) -> dict[str, Floats]:
    """Seconds of each of the GPU's parts of `work`; they sum to what `seconds` says.

    Weights are read while tokens are multiplied with them: each has the share of that time that follows its own.
    """

    def of(*names: str) -> Floats:
        return np.asarray(seconds(np.where(np.isin(CONSTANTS, names), constants, 0.0), work).gpu_s)

    reading, both = of("weights_s", "experts_s"), of("weights_s", "experts_s", "product_s")
    share = (reading / both) ** POWER
    return {
        "weights": of("fixed_s") + both * share,
        "tokens": both * (1 - share) + of("token_s"),
        "attention": of("attended_s", "context_s"),
        "sequences": of("sequence_s"),
    }


def between_results(steps: Steps) -> Floats:
    """Seconds from the result before each step to its own; from its scheduling, where the server had been idle."""
    t0, t2 = steps.column("t0"), steps.column("t2")
    idle = (t0 > np.append(-np.inf, steps.column("t3")[:-1])) & (steps.column("decodes") == 0)
    return np.asarray(t2 - np.where(idle, t0, np.append(t0[0], t2[:-1])))


def waits(beyond: Floats, overlapped: NDArray[np.bool_]) -> Floats:
    """Seconds that the GPU waited for the host in each step; `beyond` is the time between results less the GPU's.

    A step that is launched before the result of the one before is waited for delays that one; it runs meanwhile, so
    that its own result comes early.
    """
    late = np.where(overlapped, np.maximum(beyond, 0.0), 0.0)
    return np.asarray(beyond - late + np.append(0.0, late[:-1]))


def split(gpu: dict[str, Floats], waited: Floats, launching: Floats) -> dict[str, float]:
    """Seconds of each part in all; `launching` is the share of launches in the host's time of each step.

    They sum to what was measured, even where the twin takes the GPU to be slower than it was.
    """
    on_gpu = {part: float(one.sum()) for part, one in gpu.items()}
    busy, left, exposed = sum(on_gpu.values()), float(waited.sum()), np.maximum(waited, 0.0)
    launches = float((exposed * launching).sum() / exposed.sum()) if exposed.any() else 0.0
    fits = min(1.0, 1 + left / busy)
    on_host = {"launch": max(0.0, left) * launches, "schedule": max(0.0, left) * (1 - launches)}
    return {part: one * fits for part, one in on_gpu.items()} | on_host
