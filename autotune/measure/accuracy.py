"""Accuracy: whether a server with other numerics than the baseline's predicts texts as well as the baseline does.

Two checks, both on a server that is up anyway. Prefill: the negative log-likelihood (NLL) of the user's own texts.
Decode: the NLL of the server's own answers, by its prefill, beyond what it was while they were drawn; of answers at
temperature 1 that is the Kullback-Leibler divergence, in the same unit. A prefill may not read the KV cache as a decode
step does, so that a coarse cache shows in the second alone.
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
from autotune.config.schema import AccuracyConfig, Check
from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.measure.backend import Scorer
from autotune.measure.paired import Difference, paired_difference
from autotune.system.files import left_in, write_whole

FOLDER = "accuracy"  # in a study's folder: the scores of each numerics
CONSTRAINT = "accuracy"  # of a result: how far the bound is above the margin, as a share of it; 1 if nobody knows
NLL, GAP = "nll", "decode_nll_gap"  # metrics, nats a token; beside each: how much more it is than the baseline's
OVER = "_over_baseline"
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


@dataclass(frozen=True)
class Scores:
    """NLLs of one numerics, nats a token, by text."""

    numerics: str
    nll: list[float]
    gap: list[float]  # of the answers, prefill's beyond decode's

    def metrics(self) -> dict[str, float]:
        return {NLL: float(np.mean(self.nll)), GAP: float(np.mean(self.gap))}

    def compares_with(self, other: "Scores") -> bool:
        """True if both are of as many texts, and of some; else a file was damaged."""
        return (len(self.nll), len(self.gap)) == (len(other.nll), len(other.gap)) and len(self.gap) > 1

    @classmethod
    def load(cls, path: Path) -> "Scores | None":
        """The scores at `path`; None if there are none that can be used."""
        match left_in(path):
            case {"numerics": str(numerics), "nll": [*nll], "gap": [*gap]}:
                if all(isinstance(value, float) and math.isfinite(value) for value in [*nll, *gap]):
                    return cls(numerics, nll, gap)
        return None


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
    return config.check is Check.nll and (config.kept_in is None or Path(config.kept_in).is_dir())


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
    chosen = np.unique(np.linspace(0, len(found) - 1, min(config.texts, len(found))).round().astype(int))
    return [found[at] for at in chosen]


def digest(chosen: Iterable[Text]) -> str:
    """A hash of texts."""
    told = json.dumps([[text.tokens, text.answer_tokens] for text in chosen])
    return hashlib.sha256(told.encode()).hexdigest()


def file_name(numeric: str, texts_digest: str) -> str:
    """The name of the file with the scores of these texts with these numerics."""
    return f"{hashlib.sha256(f'{texts_digest} {numeric}'.encode()).hexdigest()[:16]}.json"


def measured(engine: Scorer, chosen: Sequence[Text], numeric: str) -> Scores:
    """Score the `chosen` texts on `engine`. Raises MeasureError."""
    if len(chosen) < 2:
        raise MeasureError("the data set has fewer than two texts of two tokens")
    nll = [-_mean(found) for found in engine.prefilled([text.tokens for text in chosen])]
    asked = chosen[::ANSWERED] if len(chosen) >= 2 * ANSWERED else chosen
    answers = engine.decoded([(text.tokens, text.answer_tokens) for text in asked])
    whole = [[*text.tokens, *answer] for text, (answer, _) in zip(asked, answers, strict=True)]
    again = engine.prefilled(whole)
    gap = [_mean(then) - _mean(now[-len(then) :]) for now, (_, then) in zip(again, answers, strict=True)]
    return Scores(numeric, nll, gap)


def scored(config: AccuracyConfig, engine: Scorer, chosen: Sequence[Text], numeric: str) -> Scores:
    """The scores of a study's earlier server with these numerics, or of this one. Raises MeasureError."""
    kept = Path(config.kept_in, file_name(numeric, digest(chosen))) if config.kept_in else None
    if kept and (known := Scores.load(kept)):
        return known
    scores = measured(engine, chosen, numeric)
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
    """The test that a server is not worse than the baseline's by more than a margin, nats a token."""

    nll: Difference
    gap: Difference
    margin: float

    @property
    def over(self) -> float:
        """The constraint: the higher of the upper bounds, as a share beyond the margin."""
        return max(self.nll.high, self.gap.high) / self.margin - 1

    @property
    def words(self) -> str:
        worse, what = (self.nll, "NLL") if self.nll.high >= self.gap.high else (self.gap, "NLL of its decoded answers")
        return f"{what} {worse.mean:+.4f} nats a token, at most {worse.high:+.4f}; {self.margin:g} allowed"


def judged(scores: Scores, baseline: Scores, margin: float) -> Judgement:
    """Compare `scores`, text by text, with those of the baseline's numerics. Raises ValueError for fewer texts."""
    nll = paired_difference(scores.nll, baseline.nll, CONFIDENCE)
    return Judgement(nll, paired_difference(scores.gap, baseline.gap, CONFIDENCE), margin)
