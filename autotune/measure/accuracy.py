"""Accuracy: whether a server with other numerics than the baseline's answers as well as the baseline does.

`nll` makes two checks, both on a server that is up anyway. Prefill: the negative log-likelihood (NLL) of the user's own
texts. Decode: the NLL of the server's own answers, by its prefill, beyond what it was while they were drawn; of answers
at temperature 1 that is the Kullback-Leibler divergence, in the same unit. A prefill may not read the KV cache as a
decode step does, so that a coarse cache shows in the second alone.
`rouge` and `mlperf` score greedy answers against the data set's references; `mlperf` needs no baseline.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.config.redact import redact
from autotune.config.schema import AccuracyConfig, BenchmarkConfig, Check
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.measure import rouge
from autotune.measure.backend import Scorer
from autotune.measure.metrics import mean_and_interval
from autotune.measure.paired import paired_difference
from autotune.system.files import left_in, write_whole

FOLDER = "accuracy"  # in a study's folder: the scores of each numerics
CONSTRAINT = "accuracy"  # of a result: how far the bound is above the margin, as a share of it; 1 if nobody knows
NLL, GAP = "nll", "decode_nll_gap"  # metrics, nats a token; beside each: how much more it is than the baseline's
OVER = "_over_baseline"
TOLD = {NLL: "NLL", GAP: "NLL of its decoded answers"}
NUMERICS, NOT_SCORED = "numerics", "not_scored"  # facts of a result; the second is why its server was not scored
# First words of a result's `accuracy`.
SAME, PASSED, REFUSED, UNKNOWN = "same numerics", "passed", "refused", "unknown"
ANSWERED = 4  # of so many texts one is answered, with at most
ANSWER_TOKENS = 64  # tokens; a quarter of 256 texts is then 4,096
CONFIDENCE = 0.9  # of an interval: 0.95 of each of its ends
# Flags that decide what a server computes. What changes the order of sums only (batches, block sizes, CUDA graphs,
# tensor parallelism) is none: it moves the NLL by 0.0002 nats. deepep_low_latency sends activations in fp8.
NUMERIC = re.compile(
    r".*(dtype|quantization|kv_scales|stochastic_rounding).*|hf_overrides|hf_config_path|model_impl|load_format"
    r"|model_loader_extra_config|model_class_overrides|disable_sliding_window|kv_sharing_fast_prefill|use_replayssm"
    r"|(attention|moe|linear|mamba|gdn_prefill|kda_prefill|kda_decode|sparse_indexer_topk|all2all)_backend"
    r"|(attention|kernel|additional)_config|ir_op_priority"
)
SPECULATION = "speculative_config"  # the model checks its tokens, unless its `rejection_sample_method` is this
LOSSY = "synthetic"
PLAIN = (None, "", "auto", False)


@dataclass(frozen=True)
class Text:
    """One text to be scored."""

    tokens: list[int]
    answer_tokens: int  # that an answer to it may have
    reference: str = ""  # the answer that it should have, for ROUGE


@dataclass(frozen=True)
class Scores:
    """Scores of one numerics."""

    numerics: str
    by_text: dict[str, list[float]]  # by metric: NLL and, of the answers, GAP; or ROUGE's, and characters of an answer

    def metrics(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self.by_text.items()}

    def compares_with(self, other: "Scores") -> bool:
        """True if both are of as many texts, else a file was damaged."""
        ours, theirs = ({name: len(values) for name, values in one.by_text.items()} for one in (self, other))
        return ours == theirs

    @classmethod
    def load(cls, path: Path) -> "Scores | None":
        """The scores at `path`; None if there are none that can be used."""
        match left_in(path):
            case {"numerics": str(numerics), "by_text": dict(by_text)} if by_text:
                if all(map(_are_scores, by_text.values())):
                    return cls(numerics, by_text)
        return None


def _are_scores(values: Any) -> bool:
    found = isinstance(values, list) and len(values) > 1
    return found and all(isinstance(value, float) and math.isfinite(value) for value in values)


def is_numeric(name: str) -> bool:
    """Tell whether a flag decides what a server computes."""
    return bool(NUMERIC.fullmatch(name.replace("-", "_").partition(".")[0]))


def numerics(flags: Mapping[str, Any], env: Mapping[str, str]) -> str:
    """The numerics of vLLM's resolved `flags` and of the variables `env` that it is given: any may decide them."""
    deciding = {name: value for name, value in flags.items() if is_numeric(name) and value not in PLAIN}
    speculation = flags.get(SPECULATION)
    if isinstance(speculation, dict) and speculation.get("rejection_sample_method") == LOSSY:
        deciding[SPECULATION] = LOSSY
    deciding |= {f"env.{name}": value for name, value in redact(dict(env)).items()}
    return " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in sorted(deciding.items()))


def impossible(flags: Mapping[str, Any], simulated: bool) -> str:
    """The reason why there are no answers to check; empty if there are some."""
    if simulated:
        return "a simulation gives none"
    return "those of random weights (load_format=dummy) say nothing" if flags.get("load_format") == "dummy" else ""


def is_wanted(config: AccuracyConfig) -> bool:
    """True if a trial is to score its server; none is in `verify` of a study whose folder was moved."""
    return is_on(config) and (config.kept_in is None or Path(config.kept_in).is_dir())


def is_on(config: AccuracyConfig) -> bool:
    """True if answers are checked; what `auto` means a study decides."""
    return config.check not in (Check.none, Check.auto)


def texts(samples: Samples, config: AccuracyConfig) -> list[Text]:
    """Distinct texts out of all `samples`: the first token and the last ones of each, as many as may be.

    A text with its answer is shorter than the sample with its output, so that vLLM takes it as a prompt.
    """
    cut: dict[bytes, Text] = {}
    for prompt, output in zip(samples.prompts, samples.output_tokens, strict=True):
        kept = np.concatenate([prompt[:1], prompt[1:][-(config.tokens - 1) :]])
        if len(kept) > 1:
            cut.setdefault(kept.tobytes(), Text(kept.tolist(), max(1, min(ANSWER_TOKENS, int(output) - 1))))
    found = list(cut.values())
    return [found[at] for at in _spread(len(found), config.texts)]


def questions(samples: Samples, references: Sequence[str], config: AccuracyConfig) -> list[Text]:
    """Whole prompts out of all `samples`, with the `references` of their answers, as many as may be."""
    chosen = _spread(len(samples), config.texts)
    return [Text(samples.prompts[at].tolist(), int(samples.output_tokens[at]), references[at]) for at in chosen]


def _spread(size: int, most: int) -> list[int]:
    """Numbers below `size`, at most so many, evenly spaced."""
    return sorted({round(float(at)) for at in np.linspace(0, size - 1, min(most, size))})


def digest(chosen: Iterable[Text], config: AccuracyConfig) -> str:
    """A hash of texts, and of how they are scored."""
    told = json.dumps([config.check.value, *([text.tokens, text.answer_tokens, text.reference] for text in chosen)])
    return hashlib.sha256(told.encode()).hexdigest()


def file_name(numeric: str, texts_digest: str) -> str:
    """The name of the file with the scores of these texts with these numerics."""
    return f"{hashlib.sha256(f'{texts_digest} {numeric}'.encode()).hexdigest()[:16]}.json"


def predicted(engine: Scorer, chosen: Sequence[Text]) -> dict[str, list[float]]:
    """The NLLs of the `chosen` texts on `engine`, and of its answers. Raises MeasureError."""
    if len(chosen) < 2:
        raise MeasureError("the data set has fewer than two texts of two tokens")
    nll = [-_mean(found) for found in engine.prefilled([text.tokens for text in chosen])]
    asked = chosen[::ANSWERED] if len(chosen) >= 2 * ANSWERED else chosen
    answers = engine.decoded([(text.tokens, text.answer_tokens) for text in asked], temperature=1)
    whole = [[*text.tokens, *answer] for text, (answer, _) in zip(asked, answers, strict=True)]
    again = engine.prefilled(whole)
    gap = [_mean(then) - _mean(now[-len(then) :]) for now, (_, then) in zip(again, answers, strict=True)]
    return {NLL: nll, GAP: gap}


def answered(engine: Scorer, chosen: Sequence[Text], model: Model, whole: bool) -> dict[str, list[float]]:
    """ROUGE of greedy answers of `engine`, for each text; the `whole` of MLPerf's scores. Raises MeasureError."""
    answers = engine.decoded([(text.tokens, text.answer_tokens) for text in chosen], temperature=0)
    words = rouge.texts([ids for ids, _ in answers], model)
    rows = rouge.by_text(words, [text.reference for text in chosen], rouge.splitter() if whole else None)
    found = {name: [row[name] for row in rows] for name in rows[0]}
    if zero := [name for name, values in found.items() if not any(values)]:
        raise MeasureError(f"its answers have nothing in common with the references ({zero[0]} is 0)")
    return found


def scored(config: AccuracyConfig, engine: Scorer, chosen: Sequence[Text], numeric: str, model: Model) -> Scores:
    """The scores of a study's earlier server with these numerics, or of this one. Raises MeasureError."""
    kept = Path(config.kept_in, file_name(numeric, digest(chosen, config))) if config.kept_in else None
    if kept and (known := Scores.load(kept)):
        return known
    if config.check is Check.nll:
        scores = Scores(numeric, predicted(engine, chosen))
    else:
        scores = Scores(numeric, answered(engine, chosen, model, config.check is Check.mlperf))
    if kept:
        write_whole(kept, json.dumps(asdict(scores)))
    return scores


def _mean(found: NDArray[np.float64]) -> float:
    """The mean of log-probabilities. Raises MeasureError if they are none."""
    mean = float(np.mean(found)) if len(found) else math.nan
    if not (math.isfinite(mean) and np.all(found <= 1e-3)):  # logits, with vLLM's logprobs_mode
        raise MeasureError("vLLM returns no log-probabilities; leave out engine.args.logprobs_mode")
    return mean


@dataclass(frozen=True)
class Judgement:
    """The test that answers are not worse than they may be."""

    over: float  # the constraint: how far the worst bound is beyond what is allowed, as a share of that
    words: str  # on that bound
    metrics: dict[str, float]
    intervals: dict[str, list[float]]


def judged(scores: Scores, baseline: Scores, margin: float) -> Judgement:
    """Compare `scores`, text by text, with those of the baseline's numerics: NLL may rise and ROUGE fall by a margin.

    It is one in nats a token, or a share of the baseline's ROUGE. Raises ValueError for fewer texts.
    """
    found, metrics, intervals = [], {}, {}
    for name, values in scores.by_text.items():
        change = paired_difference(values, baseline.by_text[name], CONFIDENCE)
        metrics[f"{name}{OVER}"], intervals[f"{name}{OVER}"] = change.mean, [change.low, change.high]
        if name in TOLD:
            words = f"{TOLD[name]} {change.mean:+.4f} nats a token, at most {change.high:+.4f}; {margin:g} allowed"
            found.append((change.high / margin - 1, words))
        else:
            usual = float(np.mean(baseline.by_text[name]))
            allowed = margin * usual
            words = f"{name} {change.mean:+.3f} of {usual:.2f}, at worst {change.low:+.3f}; {-allowed:.3f} allowed"
            found.append((-change.low / allowed - 1, words))
    return Judgement(*max(found, key=lambda one: one[0]), metrics, intervals)


def within(scores: Scores, benchmark: BenchmarkConfig) -> Judgement:
    """Hold `scores` to the bounds of a benchmark of MLPerf's: those of all its samples, or what a part tells of all."""
    found, intervals = [], {}
    for name, bounds in benchmark.scores.items():
        values = scores.by_text[name]
        whole = benchmark.samples or len(values)
        mean, low, high = _of_all(values, whole)
        intervals[name] = [low, high]
        each = whole if name == rouge.LENGTH else 1  # MLPerf bounds the sum of the lengths
        told = f"{name} {mean:.4f}"
        told += f", {low:.4f} to {high:.4f} in all {whole} samples" if len(values) < whole else ""
        least = bounds.least / each
        found.append((1 - low / least if least else -1.0, f"{told}; {least:.4f} needed"))
        if bounds.most is not None:
            most = bounds.most / each
            found.append((high / most - 1, f"{told}; {most:.4f} allowed"))
    return Judgement(*max(found, key=lambda one: one[0]), {}, intervals)


def _of_all(values: Sequence[float], whole: int) -> tuple[float, float, float]:
    """The mean of a population of `whole` of which there are `values`, and its interval: none if these are all."""
    mean, interval = mean_and_interval(values, CONFIDENCE)
    unseen = math.sqrt(max(0.0, 1 - len(values) / whole))
    low, high = (mean + (end - mean) * unseen for end in interval or (mean, mean))
    return mean, low, high
