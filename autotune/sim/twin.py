"""A twin: the simulator's constants for one server, learned from the steps that it recorded.

With asynchronous scheduling one thread schedules and launches step i, then waits for step i - 1. So a step's result
comes at `max(its end on the GPU, the next step's launch)`, and the GPU begins a step when the one before has ended. The
fit follows this recurrence one step ahead: what has been seen of the steps before is known, as a filter knows it.

Each constant is a factor on what the device's YAML and the model's shape say (`Cost.constants`), so that steps of one
configuration speak of others. The factors have a posterior; one that no step has shown keeps the width of its prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.signal import lfilter
from scipy.special import ndtr

from autotune.config.schema import Device
from autotune.errors import InputError
from autotune.measure.steps import Floats, Steps
from autotune.sim.cost import CONSTANTS, ON_HOST, Cost, Pace, Work, seconds, size_factor
from autotune.sim.flags import Flags, resolve
from autotune.sim.shape import Shape

# Widths of the prior: of each constant's logarithm, if the device's YAML says nothing better of this model and host.
WIDTHS = dict(zip(CONSTANTS, (0.7, 0.3, 0.7, 0.3, 0.5, 0.5, 0.5, 1.0, 1.0, 0.7, 1.0, 0.7, 0.7), strict=True))
GPU_NOISE, HOST_NOISE, JITTER_S = 0.02, 0.09, 1e-4  # of one step: relative, relative, seconds
# From one start of a server to the next, of which a fit to one has seen one: relative, on the GPU and on the host.
GPU_BETWEEN, HOST_BETWEEN = 0.02, 0.08
RETURN_S = 5e-4
MOST_EFFICIENT = 2.0  # bound of a device's efficiencies in the schema
KNOWN_WIDTH = 1e-3
SIZES = 16  # of steps: 1, 2, 4, … 32,768 tokens
SMOOTH, SIZE_WIDTH = 0.05, 0.15  # prior of `by_size`: standard deviation from one size to the next, and of each
SIZE_FACTORS = (0.8, 1.25)  # beyond, something else happened
PER_KIND = 320  # steps of a kind that are fitted
WORTH = 160  # independent steps that those of a kind are worth, at most: their errors are alike
BLOCK = 8  # consecutive steps are chosen together
HISTORY = 3  # steps after which the recurrence has forgotten
EDGES = (512, 1024, 2048)  # tokens of the kinds of a step with prefill
STARTS = (1.0, 1.5)  # a fit begins with the prior's constants, and with slower ones; the best result counts
FORGET, DOUBT = 0.8, 0.1  # the host's pace: weight of a step against the next one; weight of the belief that it is 1
USUAL = (0.05, 0.95)  # quantiles of the host's pace; beyond, another process had it
PACES = (0.4, 2.5)  # beyond, a step was interrupted
LONG_S = 10.0  # a step that takes longer was interrupted
PAUSE_S = 0.02  # by which a result comes later than expected, if something else had the host
IDLE_S = 0.5  # between two steps of different runs


def prior(cost: Cost) -> Floats:
    """The constants that `cost` says, and those that it does not know."""
    constants = np.array(cost.constants)
    constants[CONSTANTS.index("return_s")] = RETURN_S
    return constants


@dataclass(frozen=True)
class Twin:
    """A server's constants: `factors` on those of `device` and `shape`, in the order of CONSTANTS."""

    device: Device
    shape: Shape
    factors: Floats
    covariance: Floats  # of the factors' logarithms
    loop: tuple[float, float]  # seconds between a result and the next step's launch, in all and for each sequence
    pace: Pace  # only that of draws has a seed, and so pauses
    by_size: tuple[float, ...] = (0.0,)  # see size_factor: what the constants leave unexplained
    more_kv_bytes: float = 0.0  # KV cache beyond what the device's YAML says, on one GPU
    unseen: tuple[str, ...] = ()  # what no step has shown, in words

    def cost(self, flags: Flags) -> Cost:
        """The cost of serving with `flags`."""
        cost = Cost(self.device, self.shape, flags)
        constants = prior(cost) * self.factors
        constants[CONSTANTS.index("prepare_s")] += self.loop[0]
        constants[CONSTANTS.index("prepare_sequence_s")] += self.loop[1]
        cost.constants, cost.pace = tuple(map(float, constants)), self.pace
        cost.more_kv_bytes, cost.by_size = self.more_kv_bytes, self.by_size
        return cost

    def draw(self, seed: int) -> "Twin":
        """A twin from the posterior, and from the differences between one start of a server and the next."""
        random = np.random.default_rng(seed)
        between = np.full(len(CONSTANTS), GPU_BETWEEN * random.standard_normal())
        between[ON_HOST] = HOST_BETWEEN * random.standard_normal()
        changes = random.multivariate_normal(np.zeros(len(CONSTANTS)), self.covariance) + between
        factors, pace = self.factors * np.exp(changes), replace(self.pace, seed=seed)
        return replace(self, factors=factors, covariance=np.zeros_like(self.covariance), pace=pace)

    def as_device(self, like: Flags) -> Device:
        """`device` with the constants of this server, as far as a device's bounds can hold them.

        A dense model's can; those of a mixture of experts, which depend on the model, are cut to MOST_EFFICIENT.
        """
        factor, now = dict(zip(CONSTANTS, self.factors, strict=True)), self.device
        before = dict(zip(CONSTANTS, prior(Cost(now, self.shape, like)), strict=True))
        constants = {name: value * factor[name] for name, value in before.items()}
        weights = factor["experts_s"] if self.shape.experts else factor["weights_s"]
        bandwidth = min(MOST_EFFICIENT, now.bandwidth_efficiency / weights)
        output_s = 2 * self.shape.embedding / like.tensor_parallel_size / (now.bandwidth_gbs * 1e9 * bandwidth)
        # A device has no time of a token beside the products but what its bandwidth says: the products take the rest.
        of_bandwidth = before["token_s"] * now.bandwidth_efficiency / bandwidth
        product_s = max(constants["product_s"] + constants["token_s"] - of_bandwidth, before["product_s"] / 2)
        math_efficiency = min(MOST_EFFICIENT, now.math_efficiency * before["product_s"] / product_s)
        attention = now.attention_efficiency * now.math_efficiency / math_efficiency / factor["attended_s"]
        learned: dict[str, Any] = {
            "math_efficiency": float(math_efficiency),
            "attention_efficiency": float(min(MOST_EFFICIENT, attention)),
            "bandwidth_efficiency": float(bandwidth),
            "step_s": float(max(1e-5, constants["fixed_s"] - output_s)),
            "host_s": float(constants["prepare_s"] + self.loop[0]),
            "host_sequence_s": float(constants["prepare_sequence_s"] + self.loop[1]),
            "launch_s": float(now.launch_s * factor["launch_s"]),
            "piecewise_s": float(now.piecewise_s * factor["piecewise_s"]),
        }
        return replace(now, **learned)


@dataclass(frozen=True)
class Recorded:
    """Steps beside what the simulator knows of their server."""

    steps: Steps
    cost: Cost

    @classmethod
    def of(cls, steps: Steps, device: Device, shape: Shape) -> "Recorded":
        """Tell what is known of a server of `shape` on `device`. Raises InputError for flags that none has."""
        try:
            recorded = cls(steps, Cost(device, shape, resolve(steps.args, device, shape)))
            _ = recorded.work  # it takes all flags together
            return recorded
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{steps.name}: {error}; write its flags as vLLM takes them: max_num_seqs=256") from None

    @cached_property
    def work(self) -> Work:
        steps, sizes = self.steps, np.array(self.cost.flags.graph_sizes)
        tokens, chunks = steps.tokens, steps.column("chunks")
        in_graph = tokens <= (sizes[-1] if len(sizes) else 0)
        padded = np.where(in_graph, sizes[np.searchsorted(sizes, tokens * in_graph)], tokens) if len(sizes) else tokens
        return Work(
            padded,
            self.cost.shape.touched(tokens),
            steps.column("attended"),
            steps.column("context"),
            steps.column("decodes") + chunks,
            in_graph * 1.0,
            (chunks > 0) * 1.0,
            np.ones(len(tokens)),
        )

    @cached_property
    def overlapped(self) -> NDArray[np.bool_]:
        """For each step: the next one was launched by the thread that then waited for this one's result.

        With several workers each launches in a process of its own, and the scheduler's thread does not.
        """
        t1, t2 = self.steps.column("t1"), self.steps.column("t2")
        alone = self.cost.flags.tensor_parallel_size * self.cost.flags.pipeline_parallel_size == 1
        return np.append((t1[1:] < t2[:-1]) & alone, False)

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of each step, in words."""
        upper = [f"prefill, up to {edge} tokens" for edge in EDGES] + [f"prefill, over {EDGES[-1]} tokens"]
        numbers = np.searchsorted(EDGES, self.steps.tokens)
        words = {1.0: "", 0.0: ", no graph"}
        return [
            (upper[number] if prefills else "decode") + words[in_graph]
            for number, prefills, in_graph in zip(numbers, self.work.prefills, self.work.in_graph, strict=True)
        ]

    def chosen(self) -> tuple[NDArray[np.intp], Floats]:
        """Steps to fit to, and the weight of each; those before and after them have none, and are needed for them."""
        finer = np.where(self.work.prefills > 0, 0, np.log2(self.steps.tokens).astype(int))
        usual = self.steps.column("t2") - self.steps.column("t1") < LONG_S
        weights = np.zeros(len(self.steps))
        block = np.arange(len(self.steps)) // BLOCK
        blocks = np.random.default_rng(0).permutation(len(self.steps) // BLOCK + 1)[block]
        names = [f"{kind} {size}" for kind, size in zip(self.kinds, finer, strict=True)]
        kinds = np.unique(names, return_inverse=True)[1]
        for kind in np.unique(kinds):
            (found,) = np.nonzero((kinds == kind) & usual)
            found = found[np.argsort(blocks[found], kind="stable")][:PER_KIND]
            weights[found] = np.sqrt(min(len(found), WORTH) / max(1, len(found)))
        near = np.convolve(weights > 0, np.ones(2 + HISTORY))[HISTORY : HISTORY + len(weights)] > 0
        return np.flatnonzero(near), weights


@dataclass(frozen=True)
class Times:
    """Times at which steps' results are expected, one step ahead, on the clock of their recording; in seconds."""

    result: Floats
    spread: Floats  # standard deviation
    bound: Floats  # probability that the GPU decides it, not the next step's launch
    host: Floats  # logarithm of the launch's time that was seen, relative to the expected one …
    host_seen: Floats  # … and how far it was seen, 0 to 1


def expected(
    constants: Floats,
    work: Work,
    t1: Floats,
    t2: Floats,
    overlapped: NDArray[np.bool_],
    pace: Floats | float = 1.0,  # factor on the host's time
) -> Times:
    """Times at which results of `work`, scheduled at `t1`, are expected; each is told the results `t2` before it."""
    step = seconds(constants, work)
    prepare, launch, gpu, back = step.prepare_s * pace, step.launch_s * pace, step.gpu_s, step.return_s
    gpu_noise, host_noise = GPU_NOISE * gpu + JITTER_S, HOST_NOISE * (prepare + launch)
    launched = t1 + prepare + launch
    next_launched = np.where(overlapped, np.append(launched[1:], 0.0), t1 - LONG_S)
    next_noise = np.append(host_noise[1:], 0.0)
    both = np.hypot(gpu_noise, next_noise)
    began = np.maximum(t1 + prepare, np.append(t1[0], (t2 - back)[:-1]))  # as if the GPU decided each result
    end = np.maximum(began + gpu, launched)
    for _ in range(HISTORY):
        bound = ndtr((end + back - next_launched) / both)
        known_end = bound * (t2 - back) + (1 - bound) * np.minimum(end, t2 - back)
        known_launch = bound * np.minimum(next_launched, t2) + (1 - bound) * t2
        began[1:] = np.maximum(t1[1:] + prepare[1:], known_end[:-1])
        launched[1:] = np.where(overlapped[:-1], known_launch[:-1], launched[1:])
        end = np.maximum(began + gpu, launched)
    # The expectation of the later one of two normal variables.
    z = (end + back - next_launched) / both
    bound = ndtr(z)
    result = (end + back) * bound + next_launched * (1 - bound) + both * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    took = np.append(prepare[0] + launch[0], t2[:-1] - t1[1:])
    return Times(
        result,
        np.hypot(bound * gpu_noise, (1 - bound) * next_noise),
        bound,
        np.log(np.clip(took / (prepare + launch), *PACES)),
        np.append(0.0, ((1 - bound) * overlapped)[:-1]),
    )


def unfitted(device: Device, shape: Shape, sigma: float, host_sigma: float) -> Twin:
    """A twin without steps; the logarithms of its constants deviate by `sigma`, those of the host's by `host_sigma`."""
    widths = np.full(len(CONSTANTS), sigma)
    widths[ON_HOST] = host_sigma
    return Twin(device, shape, np.ones(len(CONSTANTS)), np.diag(widths**2), (0.0, 0.0), Pace())


def fit(
    recordings: Sequence[Steps], device: Device, shape: Shape, known: float = 1.0, near: Floats | None = None
) -> Twin:
    """Fit a twin to the steps of one or several servers of one model on one kind of GPU.

    `device` is the prior, its widths times `known`. The fit begins at the factors `near`, if they are told. Raises
    InputError without steps.
    """
    if not recordings:
        raise InputError("no recorded steps to fit a twin to")
    data = [Recorded.of(steps, device, shape) for steps in recordings]
    parts = []
    for recorded in data:
        chosen, weights = recorded.chosen()
        work = Work(*(column[chosen] for column in recorded.work))
        t1, t2 = recorded.steps.column("t1")[chosen], recorded.steps.column("t2")[chosen]
        parts.append((prior(recorded.cost), work, t1, t2, recorded.overlapped[chosen], weights[chosen]))
    widths = np.array(list(WIDTHS.values())) * known
    widths = np.where(prior(data[0].cost) > 0, widths, KNOWN_WIDTH)  # a dense model has no experts

    def residuals(solved: Floats) -> Floats:
        changes = solved - 1  # so that least_squares steps all by the same share
        errors = [changes / widths]
        for constants, work, t1, t2, overlapped, weights in parts:
            times, on = expected(constants * np.exp(changes), work, t1, t2, overlapped), weights > 0
            off, spread, weight = (times.result - t2)[on], times.spread[on], weights[on]
            squared = np.minimum((off / spread) ** 2, 1e4)
            errors.append(weight * np.sqrt(2 * (np.sqrt(1 + squared) - 1)) * np.sign(off))
            # A wide normal variable is less likely than a narrow one that fits as well.
            errors.append(weight * np.sqrt(2 * np.log(np.maximum(spread / JITTER_S, 1.0) + 1e-9)))
        return np.concatenate(errors)

    solutions = [
        least_squares(residuals, start, method="lm", diff_step=1e-3, xtol=1e-4, ftol=1e-4)
        for start in ([np.full(len(CONSTANTS), start) for start in STARTS] if near is None else [1 + np.log(near)])
    ]
    solution = min(solutions, key=lambda one: one.cost)
    covariance = np.linalg.inv(solution.jac.T @ solution.jac)
    factors = np.exp(solution.x - 1)
    made = Twin(device, shape, factors, covariance, loop_of(data), Pace(), unseen=unseen(covariance, widths, data))
    made = replace(made, by_size=by_size_of(made, data), more_kv_bytes=more_kv_bytes_of(data))
    return replace(made, pace=pace_of(made, data))


def loop_of(data: Sequence[Recorded]) -> tuple[float, float]:
    """Seconds from a result to the next step's launch: the scheduler's and what is around it, in all and a sequence."""
    seen, took = [], []
    for recorded in data:
        t1, t2 = recorded.steps.column("t1"), recorded.steps.column("t2")
        behind = 2 if recorded.overlapped.any() else 1
        gap = t1[behind:] - t2[:-behind]
        busy = (gap > 0) & (gap < np.quantile(gap, 0.9))
        seen.append(recorded.work.sequences[behind:][busy])
        took.append(gap[busy])
    sequences, seconds_ = np.concatenate(seen), np.concatenate(took)
    if len(sequences) < 2:
        return 0.0, 0.0
    each, once = np.polyfit(sequences, seconds_, 1) if np.ptp(sequences) else (0.0, float(np.median(seconds_)))
    return max(0.0, float(once)), max(0.0, float(each))


def told(twin: Twin, recorded: Recorded) -> tuple[Floats, Work]:
    """The constants of `twin` and the work of recorded steps, for `seconds`."""
    work = recorded.work._replace(by_size=size_factor(twin.by_size, recorded.work.tokens))
    return prior(recorded.cost) * twin.factors, work


def times_of(twin: Twin, recorded: Recorded, paced: bool = False) -> Times:
    """Times that `twin` expects; if `paced`, with the host as fast at each step as it was at the launches before."""
    known = *told(twin, recorded), recorded.steps.column("t1"), recorded.steps.column("t2"), recorded.overlapped
    times = expected(*known)
    if not paced:
        return times
    weight, total = (lfilter([0, 1], [1, -FORGET], x) for x in (times.host_seen, times.host_seen * times.host))
    return expected(*known, np.exp(total / (weight + DOUBT)))


def pace_of(twin: Twin, data: Sequence[Recorded]) -> Pace:
    """Pace of the host from launch to launch, uninterrupted, in each server's longest run: short ones are uneven."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for recorded in data:
        times = times_of(twin, recorded)
        steady = np.zeros(len(recorded.steps), bool)
        steady[longest_run(recorded.steps)] = True
        for eager, kept in found.items():
            launched = steady & (recorded.work.prefills > 0) & ((recorded.work.in_graph == 0) == eager)
            kept.extend(np.exp(times.host[launched & (times.host_seen > 0.95)]).tolist())
    usual = {eager: np.clip(kept, *np.quantile(kept, USUAL)) if kept else [] for eager, kept in found.items()}
    return Pace(tuple(map(float, usual[True])), tuple(map(float, usual[False])), *pauses_of(twin, data))


def pauses_of(twin: Twin, data: Sequence[Recorded]) -> tuple[tuple[float, ...], float]:
    """Seconds by which results came later than anything in the pipeline explains, and those of all steps."""
    pauses, busy_s = list[float](), 0.0
    for recorded in data:
        t2 = recorded.steps.column("t2")
        late, took = t2 - times_of(twin, recorded, paced=True).result, t2 - recorded.steps.column("t1")
        pauses.extend(late[(late > PAUSE_S) & (took < LONG_S)].tolist())
        busy_s += float(np.diff(t2)[np.diff(t2) < IDLE_S].sum())
    return tuple(pauses), busy_s


def longest_run(steps: Steps) -> slice:
    """The most steps in a row between which the server was not idle."""
    began = np.flatnonzero(steps.column("t1")[1:] - steps.column("t2")[:-1] > IDLE_S) + 1
    edges = [0, *map(int, began), len(steps)]
    return max((slice(*pair) for pair in pairwise(edges)), key=lambda run: run.stop - run.start)


def by_size_of(twin: Twin, data: Sequence[Recorded]) -> tuple[float, ...]:
    """Corrections of the GPU's time by the size of a step, for what `twin` leaves unexplained: see `size_factor`.

    A kernel that changes with the number of tokens, or experts that are not chosen at random, show as a bend that no
    constant describes. Neighbouring sizes are taken to be alike; where no step has shown one, nothing is corrected.
    """
    differences = np.diff(np.eye(SIZES), axis=0)
    precision, target = differences.T @ differences / SMOOTH**2 + np.eye(SIZES) / SIZE_WIDTH**2, np.zeros(SIZES)
    for recorded in data:
        times, t2 = times_of(twin, recorded, paced=True), recorded.steps.column("t2")
        shown = (times.bound > 0.9) & (t2 - recorded.steps.column("t1") < LONG_S)
        tokens = recorded.work.tokens[shown]
        gpu_s = seconds(*told(twin, recorded)).gpu_s[shown]
        off = np.log(np.clip(1 + (t2 - times.result)[shown] / gpu_s, *SIZE_FACTORS))
        octave = np.round(np.log2(tokens)).astype(int)
        weight = np.minimum(1.0, WORTH / np.bincount(octave)[octave]) / GPU_NOISE**2
        at = np.arange(SIZES)
        shares = np.maximum(0.0, 1 - abs(np.clip(np.log2(tokens), 0, SIZES - 1)[:, None] - at))
        precision += (shares * weight[:, None]).T @ shares
        target += (shares * weight[:, None]).T @ off
    return tuple(map(float, np.linalg.solve(precision, target)))


def more_kv_bytes_of(data: Sequence[Recorded]) -> float:
    """Bytes on one GPU that the KV cache holds beyond the device's estimate, by vLLM's log; 0 if that is missing."""
    more = [
        (recorded.steps.kv_tokens - recorded.cost.kv_tokens()) * recorded.cost.kv_bytes
        for recorded in data
        if recorded.steps.kv_tokens
    ]
    return float(np.median(more)) if more else 0.0


SHOWN_BY = {
    "experts_s": "the experts' weights: steps of few and of many tokens",
    "product_s": "a step with many tokens that the GPU, not the host, decides",
    "attended_s": "a long prompt's attention",
    "context_s": "decodes with much context",
    "sequence_s": "a step with many sequences",
    "launch_s": "a step that no CUDA graph holds",
    "piecewise_s": "a step with prefill in a CUDA graph",
}


def unseen(covariance: Floats, widths: Floats, data: Sequence[Recorded]) -> tuple[str, ...]:
    """Words for what no step has shown: constants that are as uncertain as before, and steps that were not tried."""
    left = dict(zip(CONSTANTS, np.sqrt(np.diag(covariance)) / widths, strict=True))
    has = dict(zip(CONSTANTS, widths > KNOWN_WIDTH, strict=True))
    words = [shown_by for name, shown_by in SHOWN_BY.items() if has[name] and left[name] > 0.7]
    tokens = max(recorded.steps.tokens.max() for recorded in data)
    in_graphs = [recorded.steps.tokens * recorded.work.in_graph * recorded.work.prefills for recorded in data]
    words.append(f"a step of more than {tokens:.0f} tokens")
    words.append(f"a CUDA graph with prefill of more than {max(map(np.max, in_graphs)):.0f} tokens")
    return tuple(words)


@dataclass(frozen=True)
class Error:
    """Error of the prediction of one kind of step. Times are from schedule() to the result: seconds, medians."""

    kind: str
    steps: int
    measured_s: float
    predicted_s: float  # by the constants alone
    error: float  # median of the absolute errors, one step ahead, each a share of its step's time
    constant: float  # the same by the constants alone, the host at its usual pace


def errors(twin: Twin, steps: Steps) -> list[Error]:
    """The error of `twin` for each kind of step in `steps`."""
    recorded = Recorded.of(steps, twin.device, twin.shape)
    t1, t2 = steps.column("t1"), steps.column("t2")
    usual, told = times_of(twin, recorded).result, times_of(twin, recorded, paced=True).result
    took, kinds, found = t2 - t1, np.array(recorded.kinds), []
    for kind in sorted(set(recorded.kinds)):
        chosen = (kinds == kind) & (took < LONG_S)
        if chosen.any():
            off, alone = (float(np.median(abs(one - t2)[chosen] / took[chosen])) for one in (told, usual))
            medians = float(np.median(took[chosen])), float(np.median((usual - t1)[chosen]))
            found.append(Error(kind, int(chosen.sum()), *medians, off, alone))
    return found
