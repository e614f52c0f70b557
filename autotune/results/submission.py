"""The tree of an MLPerf submission: what goes where, what a person has to write, a check stricter than MLPerf's own.

Its form is that of tools/submission of mlcommons/inference b66003e1, for v6.1.
"""

import hashlib
import json
import math
import platform
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from autotune.config import vllm_flags
from autotune.config.schema import BenchmarkConfig, BenchmarkScenario
from autotune.measure import loadgen_log, rules
from autotune.measure.result import Result
from autotune.system.files import read_json, write_whole

NAMES = {"offline": "Offline", "server": "Server", "interactive": "Interactive", "single_stream": "SingleStream"}
UNVERIFIED = "Unverified: made by autotune, not reviewed by MLCommons."
LOGS = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
ACCURACY = "mlperf_log_accuracy.json"
VIEWABLE = 4096  # characters that are left of an accuracy log, at either end: truncate_accuracy_log.py
STATUS = ("available", "preview", "rdi")
TO_WRITE = "To be written by the submitter"
# Fields of a system's description; those in NEEDED must say something (constants.py).
NEEDED = (
    *("division", "submitter", "system_type", "status", "system_name", "number_of_nodes"),
    *("host_processor_model_name", "host_processors_per_node", "host_processor_core_count", "host_memory_capacity"),
    *("host_memory_configuration", "host_storage_capacity", "host_storage_type", "host_networking"),
    *("host_network_card_count", "host_networking_topology", "accelerators_per_node", "accelerator_model_name"),
    *("accelerator_memory_capacity", "accelerator_host_interconnect", "accelerator_memory_configuration"),
    *("accelerator_interconnect", "cooling", "framework", "operating_system", "other_software_stack"),
)
OTHERS = (
    *("host_processor_frequency", "host_processor_caches", "host_processor_interconnect", "accelerator_frequency"),
    *("accelerator_interconnect_topology", "accelerator_on-chip_memories", "hw_notes", "sw_notes"),
    "system_type_detail",
)
MEASUREMENTS = (
    *("input_data_types", "retraining", "starting_weights_filename"),
    *("weight_data_types", "weight_transformations"),
)
PAGES = {
    "calibration.md": "how the weights were quantized, and with what calibration data; or that they were not.",
    "bandwidth.md": "the measured bandwidth of the network or the I/O device to the accelerators.",
}


@dataclass(frozen=True)
class Run:
    """A run that is complete: its folder and its result."""

    folder: Path
    result: Result


Runs = Mapping[tuple[str, str], Run]  # by scenario, and performance, accuracy or a compliance test


@dataclass(frozen=True)
class Tree:
    """Places of a submission's files."""

    out: Path
    division: str
    submitter: str
    system: str
    benchmark: BenchmarkConfig

    @property
    def root(self) -> Path:
        return self.out / self.division / self.submitter

    @property
    def description(self) -> Path:
        return self.root / "systems" / f"{self.system}.json"

    def scenario(self, name: str) -> Path:
        return self.root / "results" / self.system / str(self.benchmark.name) / NAMES[name]


def answers_in(path: Path) -> dict[int, NDArray[np.int32]]:
    """The token ids of the answers in an accuracy log at `path`, by sample; of several to one, the first."""
    found: dict[int, NDArray[np.int32]] = {}
    for entry in json.loads(path.read_text()):
        found.setdefault(entry["qsl_idx"], np.frombuffer(bytes.fromhex(entry["data"]), dtype=np.int32))
    return found


def write(tree: Tree, runs: Runs, scored: Mapping[str, Mapping[str, float]], ends: Collection[int]) -> None:
    """Write the tree of `runs`; what a person has written into it stays. `scored` are the scores by scenario.

    `ends` are the model's tokens that end an answer.
    """
    for (name, kind), run in runs.items():
        place = tree.scenario(name)
        if kind == "performance":
            _copy(run.folder, place / "performance" / "run_1", LOGS)
            _copy(run.folder, place, ["user.conf"])
            write_whole(place / "README.md", _run_page(tree, name, run))
            _fill(place / "measurements.json", _measurements(run.result), MEASUREMENTS)
        elif kind == "accuracy":
            _copy(run.folder, place / "accuracy", [*LOGS, ACCURACY])
            text, log = str(dict(scored[name])), place / "accuracy" / ACCURACY
            write_whole(place / "accuracy" / "accuracy.txt", f"{text}\n\nhash={_sha256(log)}\n")
            _truncate(log)
        else:
            _copy(run.folder, place / kind / "accuracy", [ACCURACY])
            write_whole(place / kind / "verify_accuracy.txt", test06(run.folder / ACCURACY, name, ends))
    some = next(iter(runs.values())).result
    _fill(tree.description, _system(tree, some), [*NEEDED, *OTHERS])
    write_whole(tree.root / "src" / str(tree.benchmark.name) / "README.md", _source_page(some))
    for name, what in PAGES.items():
        if not (path := tree.root / "documentation" / name).exists():
            write_whole(path, f"{TO_WRITE}: {what}\n")


def _copy(folder: Path, to: Path, names: Sequence[str]) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(folder / name, to / name)


def _fill(path: Path, known: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write a JSON file with the fields `names`: as it has them already, else as they are `known`, else empty."""
    before = read_json(path) if path.exists() else {}
    body = before | {name: before.get(name) or known.get(name, "") for name in names}
    write_whole(path, json.dumps(body, indent=2))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _truncate(path: Path) -> None:
    text = path.read_text()
    if len(text) > 2 * VIEWABLE:
        write_whole(path, f"{text[:VIEWABLE]}\n\n...\n\n{text[-VIEWABLE:]}")


def _run_page(tree: Tree, name: str, run: Run) -> str:
    lines = [f"# {tree.benchmark.name}, {NAMES[name]}", "", UNVERIFIED, "", "The server:", ""]
    lines += [
        f"    {run.result.shell_command}",
        "",
        "What LoadGen was told beside its own mlperf.conf is in user.conf.",
    ]
    lines += [f"Deviates from the closed division: {what}" for what in run.result.deviations]
    return "\n".join(lines) + "\n"


def _source_page(result: Result) -> str:
    facts = {name: result.facts.get(name, "") for name in ("autotune", "vllm", "torch", "loadgen")}
    told = "\n".join(f"- {name} {version}" for name, version in facts.items() if version)
    return f"# Source\n\n{UNVERIFIED}\n\nThe system under test is vLLM, asked by autotune over HTTP:\n\n{told}\n"


def _measurements(result: Result) -> dict[str, str]:
    """Fields on the weights that flags tell; `retraining` only the submitter knows."""
    quantization = vllm_flags.as_text(result.args.get("quantization") or "")
    dtype = vllm_flags.as_text(result.args.get("dtype") or "")
    told = {"input_data_types": "int32", "starting_weights_filename": result.command[2] if result.command else ""}
    if quantization or dtype not in ("", "auto"):
        told["weight_data_types"] = quantization or dtype
    if quantization:
        told["weight_transformations"] = f"quantization by vLLM: {quantization}"
    return told


def _system(tree: Tree, result: Result) -> dict[str, str]:
    """The fields that can be read here: of the machine only if the runs were made on it."""
    facts = result.facts
    known = {
        "division": tree.division,
        "submitter": tree.submitter,
        "system_type": tree.benchmark.system_type or "",
        "system_name": tree.system,
        "framework": f"vLLM {facts['vllm']}" if "vllm" in facts else "",
    }
    software = {"PyTorch": facts.get("torch"), "NVIDIA driver": facts.get("driver"), "LoadGen": facts.get("loadgen")}
    known["other_software_stack"] = ", ".join(f"{name} {version}" for name, version in software.items() if version)
    if "gpu" in facts:
        known |= {
            "accelerator_model_name": facts["gpu"],
            "accelerators_per_node": str(vllm_flags.gpus(result.args)),
        }
    if facts.get("node") == platform.node():
        known |= _machine()
    return known


def _machine() -> dict[str, str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models, sockets = re.findall(r"model name\s*: (.+)", text), set(re.findall(r"physical id\s*: (\d+)", text))
    cores = re.search(r"cpu cores\s*: (\d+)", text)
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    known = {
        "host_memory_capacity": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "operating_system": f"{release.get('PRETTY_NAME', platform.system())}, kernel {platform.release()}",
    }
    if models and sockets and cores:
        known |= {
            "host_processor_model_name": models[0],
            "host_processors_per_node": str(len(sockets)),
            "host_processor_core_count": cores[1],
        }
    return known


def test06(log: Path, name: str, ends: Collection[int]) -> str:
    """The words of TEST06's run_verification.py on the accuracy log of its run; stricter where an answer ends.

    MLCommons' script knows the end token of Llama 2; here it is one of `ends`, and nothing may follow it.
    """
    entries = json.loads(log.read_text())
    rows = [(np.frombuffer(bytes.fromhex(entry["data"]), dtype=np.int32), entry) for entry in entries]
    ended = all(not np.isin(ids[:-1], list(ends)).any() for ids, _ in rows)
    counted = bool(rows) and all(len(ids) == int(entry["token_count"]) for ids, entry in rows)
    first = "Skipped"
    if name != "offline":
        firsts = [np.frombuffer(bytes.fromhex(entry["token_data"]), dtype=np.int32) for _, entry in rows]
        same = zip((ids for ids, _ in rows), firsts, strict=True)
        first = str(all(len(token) == 1 and (ids[:1] == token).all() for ids, token in same))
    verdict = "complete" if ended and counted and first != "False" else "failed"
    return (
        f"First token check pass: {first}\nEOS check pass: {ended}\nSample length check pass: {counted}\n"
        f"TEST06 verification {verdict}\n"
    )


def passed(tree: Tree, name: str, test: str) -> bool:
    """True if the compliance `test` of scenario `name` found nothing."""
    return "False" not in (tree.scenario(name) / test / "verify_accuracy.txt").read_text()


def to_fill_in(tree: Tree, names: Collection[str]) -> list[str]:
    """The fields and pages of the tree that a person still has to write."""
    found = []
    body = read_json(tree.description)
    if missing := [name for name in NEEDED if not body.get(name)]:
        found.append(f"{tree.description}: {', '.join(missing)}")
    if body.get("status") and str(body["status"]).lower() not in STATUS:
        found.append(f"{tree.description}: status={body['status']}; write {', '.join(STATUS)}")
    for name in names:
        path = tree.scenario(name) / "measurements.json"
        if missing := [field for field in MEASUREMENTS if not read_json(path).get(field)]:
            found.append(f"{path}: {', '.join(missing)}")
    pages = (tree.root / "documentation" / name for name in PAGES)
    return found + [f"{page}: {TO_WRITE.lower()}" for page in pages if TO_WRITE in page.read_text()]


def problems(tree: Tree, runs: Runs, scored: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The reasons why `runs` are no submission; also what MLPerf's checker passes over."""
    names = list(dict.fromkeys(name for name, _ in runs))
    found = [f"{' or '.join(one)} is missing" for one in tree.benchmark.needs if not set(one) & set(names)]
    closed = tree.division == "closed"
    for (name, kind), run in runs.items():
        told = list(objections(run, tree.benchmark, name, kind))
        if kind == "accuracy":
            samples = len(answers_in(run.folder / ACCURACY))
            wanted = tree.benchmark.accuracy_samples or tree.benchmark.samples
            told += [f"{samples} answers instead of {wanted}"] if samples != wanted else []
            told += broken_scores(tree.benchmark, scored[name]) if closed else []
        elif kind != "performance":
            text = (tree.scenario(name) / kind / "verify_accuracy.txt").read_text()
            told += [line for line in text.splitlines() if line.endswith("False")]
        told += [f"deviates: {what}" for what in run.result.deviations] if closed else []
        found += [f"{name} {kind}: {what}" for what in told]
    return found


def objections(run: Run, benchmark: BenchmarkConfig, name: str, kind: str) -> Iterator[str]:
    """Yield what LoadGen's log of a run of scenario `name` says against it."""
    values = loadgen_log.values(run.folder / LOGS[1])
    if failed := run.result.metrics.get("failed_requests"):
        yield f"{failed:.0f} requests failed"
    errors = [key for key in values if key.startswith("error_")]
    if errors or values.get("num_errors"):
        yield f"LoadGen logged errors ({', '.join(errors) or values['num_errors']})"
    seeds = [values[f"effective_{name}_rng_seed"] for name in ("qsl", "sample_index", "schedule")]
    if seeds != rules.SEEDS:
        yield "LoadGen's seeds are not MLPerf's"
    if kind != "performance":
        return
    if values["result_validity"] != "VALID":
        yield f"LoadGen: {values['result_validity']} ({'; '.join(run.result.reasons)})"
    official: BenchmarkScenario = getattr(benchmark.scenarios, name)
    least = {
        "requested_use_token_latencies": True,
        "effective_sample_concatenate_permutation": True,  # equal issue
        "effective_performance_sample_count": benchmark.samples or 0,
        "effective_min_sample_count": official.min_queries,
        "effective_min_duration_ms": rules.LEAST_S * 1e3,
    }
    for key, value in least.items():
        if values[key] < value:
            yield f"LoadGen's {key} is {values[key]}, and not {value:g} or more"
    results = {
        "TTFT": ("first_token_99.00_percentile_latency_ns", official.ttft_ms),
        "TPOT": ("time_per_output_token_99.00_percentile_ns", official.tpot_ms),
    }
    for what, (key, limit_ms) in results.items():
        if not limit_ms:
            continue
        if values[setting := f"requested_server_{what.lower()}_latency"] != limit_ms * 1e6:
            yield f"LoadGen's {setting} is {values[setting]}, and not {limit_ms * 1e6:.0f}"
        if (found := values[f"result_{key}"]) >= limit_ms * 1e6:
            yield f"p99 {what} is {found / 1e6:.4g} ms, and not under {limit_ms:g} ms"


def broken_scores(benchmark: BenchmarkConfig, scored: Mapping[str, float]) -> list[str]:
    """The scores that are not within their bounds."""
    found = []
    for name, bounds in benchmark.scores.items():
        value, most = scored[name], math.inf if bounds.most is None else bounds.most
        if not bounds.least <= value <= most:
            found.append(f"{name} is {value:g}, not from {bounds.least:g}{f' to {most:g}' if most < math.inf else ''}")
    return found
