"""A submission's tree: made from runs of real LoadGen against a server that answers with the references."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from autotune.commands import submission
from autotune.commands.submission import Submission
from autotune.config import CONF
from autotune.config.command_line import compose
from autotune.config.schema import BenchmarkConfig, LiveConfig
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import InputError
from autotune.live.backend import LiveEngine
from autotune.live.gpu import Gpus
from autotune.live.load_generator import LoadGenerator
from autotune.measure import rouge, rules, trial
from autotune.measure.backend import DryRunOutcome
from autotune.measure.result import Result, State
from autotune.measure.slot import Slot
from autotune.results import submission as submission_tree
from autotune.results.study import load
from autotune.results.submission import Run, Tree
from benchmarks.h100 import closed
from tests.test_loadgen import Server

SAMPLES = 512  # instead of 13,368
LEAST_S = 1.0  # instead of 600
CHECKOUT = os.environ.get("AUTOTUNE_MLPERF_INFERENCE", "")  # of github.com/mlcommons/inference
with suppress(ImportError):  # the extra `mlperf`
    from absl import logging as absl_logging

    # ROUGE's logger would keep, and close when logging is set up anew, what pytest has in stderr's place.
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

WORDS = ("storm", "river", "council", "market", "village", "doctor", "season", "border", "engine", "harvest")


def article(number: int) -> str:
    """A text that no other article has, with a full stop."""
    return " ".join(WORDS[number // 10**digit % 10] for digit in range(3)) + f" {number}."


class Referring(BaseHTTPRequestHandler):
    """/v1/completions with the reference of each prompt, as ids: one event with the first, one with the others."""

    answers: ClassVar[dict[tuple[int, ...], list[int]]] = {}
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.send_response(200)
        if self.path == "/reset_prefix_cache":
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        assert body["max_tokens"] == 128 and body["min_tokens"] == 1 and body["temperature"] == 0
        assert "ignore_eos" not in body and body["return_token_ids"]
        ids = self.answers[tuple(body["prompt"])]
        events = [json.dumps({"choices": [{"text": "x", "token_ids": part}]}) for part in (ids[:1], ids[1:])]
        events.append(json.dumps({"choices": [], "usage": {"completion_tokens": len(ids)}}))
        text = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class Referee:
    """A backend whose server knows the references, and whose runs are real LoadGen's."""

    Config = LiveConfig
    needs_weights, shares = True, False
    facts: ClassVar[dict[str, str]] = {"vllm": "0.0", "node": os.uname().nodename}
    flags: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: LiveConfig, cache_dir: Path) -> None:
        self.config = config

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return dict(args)

    def prepare_dry_runs(self) -> None:
        """They take no time."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        return DryRunOutcome("", dict(args))

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> Iterator[LiveEngine]:
        tokenizer = model.tokenizer()
        ids = [tokenizer.encode(article(number)).ids for number in range(len(samples))]
        Referring.answers = dict(zip((tuple(prompt.tolist()) for prompt in samples.prompts), ids, strict=True))
        server = Server(("127.0.0.1", 0), Referring)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served = SimpleNamespace(
            url=f"http://127.0.0.1:{server.server_port}",
            model="m",
            check_alive=lambda: None,
            process=SimpleNamespace(wait=lambda _: None),
        )
        with LoadGenerator(samples, folder / "clients.log") as load:
            yield LiveEngine(
                server=served,  # type: ignore[arg-type]
                samples=samples,
                config=self.config,
                gpus=Gpus(0),
                facts=dict(self.facts),
                command=["vllm", "serve", model.path],
                start={},
                load=load,
                folder=folder,
                has_metrics=False,
                resolved={},
            )
        server.shutdown()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which MLPerf's rules have other sizes."""
    monkeypatch.setattr(rules, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(rules, "LEAST_S", LEAST_S)
    monkeypatch.setattr(rouge, "splitter", lambda: lambda text: [text])  # one sentence each, on both sides
    monkeypatch.chdir(tmp_path)
    rules._own.cache_clear()
    yield tmp_path
    rules._own.cache_clear()


def planted(small: Path, record: str) -> BenchmarkConfig:
    """A study of one trial, whose data set has SAMPLES articles, and the benchmark `record` with that size."""
    body = yaml.safe_load((CONF / "benchmark" / f"{record}.yaml").read_text())
    body["samples"] = body["scenarios"]["offline"]["min_queries"] = SAMPLES
    texts = list(map(article, range(SAMPLES)))
    length = sum(map(len, texts))
    body["scores"]["gen_len"] = {"least": 0.9 * length, "most": 1.1 * length}
    rules.RECORDS.mkdir()
    (rules.RECORDS / "small.yaml").write_text(yaml.safe_dump(body))
    data = small / "articles.jsonl"
    data.write_text("\n".join(json.dumps({"input": f"Tell of {text}", "output": text}) for text in texts))
    words = [
        "model=tiny",
        "engine.args.load_format=pt",
        f"dataset.path={data}",
        f"benchmark={record}",
        "scenario=offline",
        "backend=live",
    ]
    config = compose([*words, "tracking=none", "backend.client_processes=1", f"cache_dir={small / 'cache'}"])[0]
    made = rules._own(body["name"])
    backend = {**config.backend, "_target_": "tests.test_submission.Referee", "steps": False}
    folder = small / "multirun" / "s" / "trial-0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(trial.as_yaml(replace(config, study="s", benchmark=made, backend=backend)))
    result = Result(State.complete, values=[1.0], metrics={"tokens_per_s": 1.0}, command=["vllm", "serve", "m"])
    result.save(folder)
    return made


def fill_in(tree: Tree) -> None:
    """Write what only a person can; that of nobody, for a test."""
    body = json.loads(tree.description.read_text())
    body = {name: value or "1" for name, value in body.items()} | {"status": "available"}
    tree.description.write_text(json.dumps(body))
    for path in tree.root.glob("results/*/*/*/measurements.json"):
        path.write_text(json.dumps({name: value or "a test's" for name, value in json.loads(path.read_text()).items()}))
    for name in submission_tree.PAGES:
        (tree.root / "documentation" / name).write_text("A test.\n")


LOGS = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
FILES = {  # of a scenario: what MLPerf's checker asks for, and nothing else
    *("user.conf", "README.md", "measurements.json", *(f"performance/run_1/{name}" for name in LOGS)),
    *(f"accuracy/{name}" for name in (*LOGS, "mlperf_log_accuracy.json", "accuracy.txt")),
    *("TEST06/verify_accuracy.txt", "TEST06/accuracy/mlperf_log_accuracy.json"),
}
EDGE = {"server": None, "single_stream": 100.0}
OVERRIDES = ["backend._target_=tests.test_submission.Referee"]


def asked(small: Path, **changes: Any) -> Submission:
    common = {"study": "s", "out": str(small / "tree"), "submitter": "test", "system": "none", "trial": "trial-0"}
    return Submission(**{**common, "offline": 9000.0, "server": 250.0, **changes})


@pytest.mark.slow
def test_tree_of_512_samples_is_complete_by_our_check_and_the_runs_are_kept(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("rouge_score")
    benchmark = planted(small, "llama3_1_8b")
    missing = submission.submit(load("s"), asked(small), OVERRIDES)
    said = capsys.readouterr().out
    assert "Unverified" in said and "A person has to fill in:" in said
    tree = Tree(small / "tree", "closed", "test", "none", benchmark)
    assert all(str(tree.out) in line for line in missing), missing
    fill_in(tree)
    before = {path: path.stat().st_mtime for path in small.glob("multirun/s/submission/*/result.json")}
    assert len(before) == 6
    assert submission.submit(load("s"), asked(small), OVERRIDES) == []
    assert before == {path: path.stat().st_mtime for path in small.glob("multirun/s/submission/*/result.json")}
    for name in ("offline", "server"):
        place = tree.scenario(name)
        assert {str(path.relative_to(place)) for path in place.rglob("*.*")} == FILES
        told = (place / "accuracy" / "accuracy.txt").read_text()
        log = (small / "multirun/s/submission" / f"{name}-accuracy" / submission_tree.ACCURACY).read_bytes()
        assert "'gen_num': 512" in told and f"hash={hashlib.sha256(log).hexdigest()}" in told
        assert (place / "accuracy" / submission_tree.ACCURACY).stat().st_size < 10 * 1024  # MLPerf's checker's limit
        assert "TEST06 verification complete" in (place / "TEST06" / "verify_accuracy.txt").read_text()
    runs = [f"multirun/s/submission/{name}-performance" for name in ("offline", "server")]
    monkeypatch.setattr(sys, "argv", ["closed.py", *runs])
    with pytest.raises(SystemExit, match="False"):
        closed.main()
    assert capsys.readouterr().out.count("nothing against it") == 2


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="AUTOTUNE_MLPERF_INFERENCE names no checkout of mlcommons/inference")
@pytest.mark.parametrize(("record", "rates"), [("llama3_1_8b", {}), ("llama3_1_8b_edge", EDGE)])
def test_tree_of_512_samples_passes_the_checker_of_a_checkout_with_only_its_sizes_changed(
    small: Path, record: str, rates: dict[str, Any]
):
    pytest.importorskip("rouge_score")
    benchmark = planted(small, record)
    submission.submit(load("s"), asked(small, **rates), OVERRIDES)
    tree = Tree(small / "tree", "closed", "test", "none", benchmark)
    fill_in(tree)
    assert by_mlperfs_checker(tree) == ""
    (unchanged,) = submission.submit(load("s"), asked(small, **rates, checker=CHECKOUT), OVERRIDES)
    of_sizes = (
        "performance_sample_count",
        "samples per query",
        "Test duration",
        "cover all dataset",
        "accuracy not met",
    )
    objections = [line for line in unchanged.splitlines() if not any(word in line for word in of_sizes)]
    assert [line for line in objections if not re.search("Checks failed|NoResults|SUMMARY", line)] == []


def log_of(folder: Path, **changes: Any) -> Run:
    """A performance run whose detail log says that all is well, but for `changes`."""
    names = ("qsl", "sample_index", "schedule")
    values = {f"effective_{name}_rng_seed": seed for name, seed in zip(names, rules.SEEDS, strict=True)}
    values |= {"result_validity": "VALID", "num_errors": 0, "requested_use_token_latencies": True}
    values |= {"effective_sample_concatenate_permutation": True, "effective_performance_sample_count": 13368}
    values |= {"effective_min_sample_count": 100, "effective_min_duration_ms": 600000}
    values |= {"requested_server_ttft_latency": 500000000, "requested_server_tpot_latency": 30000000}
    values |= {"result_first_token_99.00_percentile_latency_ns": 4e8}
    values |= {"result_time_per_output_token_99.00_percentile_ns": 2e7, **changes}
    lines = [":::MLLOG " + json.dumps({"key": key, "value": value}) for key, value in values.items()]
    (folder / submission_tree.LOGS[1]).write_text("\n".join(lines))
    return Run(folder, Result(State.complete, values=[1.0], metrics={"failed_requests": 0.0}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"result_validity": "INVALID"}, ["LoadGen: INVALID ()"]),
        ({"error_runtime": "x"}, ["LoadGen logged errors (error_runtime)"]),
        ({"num_errors": 2}, ["LoadGen logged errors (2)"]),
        ({"effective_schedule_rng_seed": 1}, ["LoadGen's seeds are not MLPerf's"]),
        ({"result_first_token_99.00_percentile_latency_ns": 6e8}, ["p99 TTFT is 600 ms, and not under 500 ms"]),
        ({"result_time_per_output_token_99.00_percentile_ns": 4e7}, ["p99 TPOT is 40 ms, and not under 30 ms"]),
        (
            {"effective_min_duration_ms": 60000},
            ["LoadGen's effective_min_duration_ms is 60000, and not 600000 or more"],
        ),
        (
            {"effective_sample_concatenate_permutation": False},
            ["LoadGen's effective_sample_concatenate_permutation is False, and not 1 or more"],
        ),
        (
            {"requested_server_ttft_latency": 2000000000},
            ["LoadGen's requested_server_ttft_latency is 2000000000, and not 500000000"],
        ),
    ],
)
def test_our_check_sees_what_mlperfs_passes_over(tmp_path: Path, changes: dict[str, Any], told: list[str]):
    tree = Tree(tmp_path, "closed", "a", "b", rules._own("llama3.1-8b"))
    found = submission_tree.problems(tree, {("interactive", "performance"): log_of(tmp_path, **changes)}, {})
    assert found == ["offline is missing", *(f"interactive performance: {line}" for line in told)]


def test_scores_are_held_to_both_bounds(tmp_path: Path):
    benchmark = rules._own("llama3.1-8b")
    good = {"rouge1": 38.5, "rouge2": 15.8, "rougeL": 24.3, "rougeLsum": 35.5, "gen_len": 8_000_000.0}
    assert submission_tree.broken_scores(benchmark, good) == []
    for name, value in {"rouge1": 38.39, "rouge2": float("nan"), "gen_len": 9_000_000.0}.items():
        assert [line.split()[0] for line in submission_tree.broken_scores(benchmark, good | {name: value})] == [name]


@pytest.mark.parametrize(
    ("ids", "first", "count", "wrong"),
    [
        ([5, 6, 9], [5], 3, []),
        ([5, 6], [5], 2, []),
        ([5, 9, 6], [5], 3, ["EOS check pass: False"]),
        ([5, 9, 9], [5], 3, ["EOS check pass: False"]),
        ([5, 6], [7], 2, ["First token check pass: False"]),
        ([5, 6], [], 2, ["First token check pass: False"]),
        ([5, 6], [5], 3, ["Sample length check pass: False"]),
    ],
)
def test_compliance_test_knows_the_models_own_ends(
    tmp_path: Path, ids: list[int], first: list[int], count: int, wrong: list[str]
):
    data, token = (np.array(one, dtype=np.int32).tobytes().hex() for one in (ids, first))
    log = tmp_path / "log.json"
    log.write_text(json.dumps([{"qsl_idx": 0, "data": data, "token_data": token, "token_count": count}]))
    text = submission_tree.test06(log, "server", {9})
    assert [line for line in text.splitlines() if line.endswith("False")] == wrong
    assert text.endswith("failed\n" if wrong else "complete\n")
    assert "First token check pass: Skipped" in submission_tree.test06(log, "offline", {9})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"offline": None, "server": None}, "no scenario: llama3.1-8b has offline, server, interactive"),
        ({"single_stream": 2.0}, "single_stream: llama3.1-8b has offline, server, interactive"),
        ({"trial": "trial-7"}, "has no such trial"),
        ({"words": ["scenario.min_duration_s=0.5"]}, "a run lasts 1 s or more"),
        ({"words": ["dataset.max_output_tokens=64"]}, r"an answer has max\. 128 tokens"),
        ({"words": ["dataset.count=8"]}, "all 512 samples are used"),
        ({"checker": "nowhere"}, "it has no tools/submission/submission_checker"),
    ],
)
def test_mistakes_are_told_before_a_run(small: Path, changes: dict[str, Any], told: str):
    planted(small, "llama3_1_8b")
    words = changes.pop("words", [])
    with pytest.raises(InputError, match=told):
        submission.submit(load("s"), asked(small, **changes), [*OVERRIDES, *words])
    assert not (small / "multirun" / "s" / "submission").exists()


def test_what_a_person_wrote_stays(tmp_path: Path):
    path = tmp_path / "system.json"
    path.write_text(json.dumps({"cooling": "air", "framework": "", "own": "x"}))
    submission_tree._fill(path, {"framework": "vLLM 1", "cooling": "water"}, ["cooling", "framework", "status"])
    assert json.loads(path.read_text()) == {"cooling": "air", "framework": "vLLM 1", "own": "x", "status": ""}


def test_rouge_of_a_text_with_itself_and_its_length():
    pytest.importorskip("rouge_score")
    found = rouge.scores([" The cat sat. "], ["The cat sat."], lambda text: [text])
    assert found == {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0, "rougeLsum": 100.0, "gen_len": 12, "gen_num": 1}
    assert rouge.cleaned("It is n't so , he said .") == "It isn't so, he said."


def by_line(text: str) -> list[str]:
    return text.split(" / ")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # C.-Y. Lin, ROUGE (2004): 3.1, where the stemmer makes "kill" of "killed", and 3.2, of two sentences.
        ("police kill the gunman", "police killed the gunman", [1, 1, 1, 1]),
        ("the gunman kill police", "police killed the gunman", [1, 1 / 3, 2 / 4, 2 / 4]),
        ("w1 w2 w6 w7 w8 / w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", [8 / 15, 2 / 13, 8 / 15, 8 / 15]),
        # Its sentences the other way round: w2 is found within its sentence, and not in a sequence through both.
        ("w1 w3 w8 w9 w5 / w1 w2 w6 w7 w8", "w1 w2 w3 w4 w5", [8 / 15, 2 / 13, 6 / 15, 8 / 15]),
    ],
)
def test_rouge_is_that_of_its_authors_examples(answer: str, reference: str, expected: list[float]):
    pytest.importorskip("rouge_score")
    found = rouge.scores([answer, "x y"], [reference, "x y"], by_line)
    assert [found[name] for name in rouge.NAMES] == [round(50 * (1 + value), 4) for value in expected]
    assert found["gen_len"] == len("\n".join(by_line(answer))) + 3 and found["gen_num"] == 2


def by_mlperfs_checker(tree: Tree) -> str:
    """What MLPerf's own checker of CHECKOUT objects to, with the sizes of this test in its constants."""
    name = str(tree.benchmark.name)
    sizes = f"""
import sys
sys.path.insert(0, {str(Path(CHECKOUT) / "tools" / "submission")!r})
from submission_checker import constants
one = constants.MODEL_CONFIG["v6.1"]
for key in ("performance-sample-count", "dataset-size"):
    one[key][{name!r}] = {SAMPLES}
length = sum(len(article) for article in {[article(number) for number in range(SAMPLES)]!r})
targets = list(one["accuracy-target"][{name!r}])
targets[targets.index("GEN_LEN") + 1] = 0.9 * length
one["accuracy-target"][{name!r}] = tuple(targets)
one["accuracy-upper-limit"][{name!r}] = ("GEN_LEN", 1.1 * length)
constants.OFFLINE_MIN_SPQ_SINCE_V4[{name!r}] = {SAMPLES}
constants.TEST_DURATION_MS = {LEAST_S * 1e3:.0f}
from submission_checker import main
sys.argv = ["main", "--input", {str(tree.out)!r}, "--version", "v6.1", "--csv", {str(tree.out / "summary.csv")!r}]
sys.exit(main.main())
"""
    done = subprocess.run([sys.executable, "-c", sizes], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr
