"""The gate on real vLLM: int4 weights and a coarse KV cache are refused, the same weights in other batches pass."""

import json
import shutil
from pathlib import Path

import pytest

from autotune.config.command_line import compose
from autotune.live import plugins
from autotune.measure import accuracy, trial
from autotune.measure.accuracy import Scores
from autotune.measure.prepare import prepare
from autotune.measure.result import Result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OVER_NLL = f"{accuracy.NLL}{accuracy.OVER}"
GROUP = 64  # weights that share a scale


def texts(path: Path) -> Path:
    """Paragraphs of this project's own pages, as a data set."""
    pages = [page.read_text() for page in sorted(ROOT.glob("docs/*.md"))]
    found = [part for page in pages for part in page.split("\n\n") if len(part) > 300 and "|" not in part]
    asked = [{"input": part, "output": part.partition(". ")[0], "output_tokens": 64} for part in found[:32]]
    path.write_text("\n".join(map(json.dumps, asked)))
    return path


def rounded(source: Path, folder: Path) -> Path:
    """A copy of the model in `source` whose linear layers have weights of four bits."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("proj.weight"):
            groups = tensor.float().reshape(-1, GROUP)
            scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-9) / 7
            weights[name] = ((groups / scale).round() * scale).reshape(tensor.shape).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Stands for a model whose prefill takes keys and values before they are rounded: only decode steps find them coarse.
COARSE = """
def install():
    import torch
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as Attention

    exact = Attention.forward

    def forward(self, layer, query, key, value, kv_cache, metadata, *rest, **named):
        if metadata is not None and metadata.max_query_len == 1:
            kv_cache.view(torch.int16).bitwise_and_(-64)  # of a bfloat16's mantissa one bit is left
        return exact(self, layer, query, key, value, kv_cache, metadata, *rest, **named)

    Attention.forward = forward
"""


def plugged(folder: Path) -> Path:
    """A folder that gives vLLM the plugin COARSE if it is on PYTHONPATH."""
    folder.mkdir()
    module = folder / "source.py"
    module.write_text(COARSE)
    plugins.installed("coarse", module, folder, {})
    return folder


def scored(folder: Path, name: str, *words: str, check: str = "nll") -> tuple[Result, Scores]:
    """A trial that scores its server, and the scores."""
    kept = folder / f"scores-{name}"
    kept.mkdir()
    short = ["scenario.min_queries=2", "scenario.min_duration_s=0", "scenario.warmup_requests=2", "tracking=none"]
    data = ["dataset=file", f"dataset.path={texts(folder / 'texts.jsonl')}"]
    checked = [f"accuracy={check}", f"accuracy.kept_in={kept}", "accuracy.tokens=128"]
    config, _, _ = compose(["model=smollm2", *short, *data, *checked, "engine.args.enforce_eager=true", *words])
    result = trial.run(config, [], folder / name)
    (file,) = kept.iterdir()
    scores = Scores.load(file)
    assert scores
    return result, scores


def test_int4_and_a_coarse_cache_are_refused_and_another_batch_size_passes(tmp_path: Path):
    baseline, base = scored(tmp_path, "baseline")
    source = prepare(compose(["model=smollm2"])[0]).model.folder
    _, batches = scored(tmp_path, "batches", "engine.args.max_num_seqs=3", "engine.args.max_num_batched_tokens=64")
    _, int4 = scored(tmp_path, "int4", f"model.path={rounded(source, tmp_path / 'model')}")
    assert [len(values) for values in base.by_text.values()] == [32, 8] and 1 < baseline.metrics["nll"] < 6
    assert baseline.phases["accuracy"] > 0 and 'dtype="bfloat16"' in baseline.facts["numerics"]
    assert abs(baseline.metrics["decode_nll_gap"]) < 0.01
    coarse = [f"backend.env.PYTHONPATH={plugged(tmp_path / 'plugin')}", "engine.args.num_gpu_blocks_override=64"]
    _, decodes_worse = scored(tmp_path, "coarse", *coarse)
    same, worse, coarse_cache = (accuracy.judged(scores, base, 0.03) for scores in (batches, int4, decodes_worse))
    assert same.over < 0 and abs(same.metrics[OVER_NLL]) < 0.005
    assert worse.over > 0 and worse.metrics[OVER_NLL] > 0.1 and worse.words.startswith("NLL +")
    assert coarse_cache.over > 0 and abs(coarse_cache.metrics[OVER_NLL]) < 0.005


def test_int4_is_not_shown_to_keep_its_rouge_and_another_batch_size_is(tmp_path: Path):
    pytest.importorskip("rouge_score")
    baseline, base = scored(tmp_path, "baseline", check="rouge")
    assert [len(values) for values in base.by_text.values()] == [32] * 3
    assert 1 < baseline.metrics["rougeL"] <= baseline.metrics["rouge1"] < 100 and baseline.phases["accuracy"] > 0
    source = prepare(compose(["model=smollm2"])[0]).model.folder
    _, batches = scored(tmp_path, "batches", "engine.args.max_num_seqs=3", check="rouge")
    _, int4 = scored(tmp_path, "int4", f"model.path={rounded(source, tmp_path / 'model')}", check="rouge")
    same, worse = (accuracy.judged(scores, base, 0.01) for scores in (batches, int4))
    assert abs(same.metrics["rouge1_over_baseline"]) < 2
    assert worse.over > max(0, same.over) and worse.words.startswith("rouge")
