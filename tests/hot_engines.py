"""Run requests on a vLLM engine that was changed to each of some configurations, and on fresh engines of the same.

    python tests/hot_engines.py MODEL ASYNC_SCHEDULING FOLDER NAME…

prints, for each configuration of these names, what both made of the requests: the tokens of each and what was in each
step. The engine runs in this process, so that all requests are there before its first step.
"""

import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np

from autotune.config import vllm_flags
from autotune.live import hot_engine, probe, recorder
from autotune.live.recording import LAYOUT

START = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 512, "num_gpu_blocks_override": 64}
WANTED: dict[str, dict[str, Any]] = {
    "sequences": {"max_num_seqs": 3},
    "tokens": {"max_num_batched_tokens": 96, "long_prefill_token_threshold": 64},
    "blocks": {"num_gpu_blocks_override": 6, "scheduling_policy": "priority"},  # requests are preempted
    "caching": {"enable_prefix_caching": False},
}
PROMPTS = [[(7 * number + at) % 1000 + 10 for at in range(20 + 37 * number % 200)] for number in range(10)]


def engine(model: str, flags: dict[str, Any]) -> Any:
    from vllm import LLM

    priority = {"enable_prefix_caching": True} | flags
    made = LLM(model, load_format="dummy", enforce_eager=True, dtype="float32", seed=0, **priority)
    core = made.llm_engine.engine_core.engine_core
    core.input_queue = queue.Queue()  # which an engine in a process of its own has
    return made


def answers(llm: Any, folder: Path) -> dict[str, Any]:
    """The tokens of each request, and the counts of each step."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    done = llm.generate(prompts, sampling, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():  # until the workers have heard of the end of all
        core.step_fn()
    (file,) = folder.glob("*.rows")
    steps = np.frombuffer(file.read_bytes(), LAYOUT)["counts"].tolist()
    os.truncate(file, 0)
    return {"tokens": [list(one.outputs[0].token_ids) for one in done], "steps": steps}


def in_a_fork(work: Any, *arguments: Any) -> Any:
    """The result of `work`, which leaves nothing behind in this process."""
    read, write = os.pipe()
    if os.fork() == 0:
        folder = Path(sys.argv[3]) / str(os.getpid())
        folder.mkdir()
        os.environ[recorder.FOLDER] = str(folder)
        with os.fdopen(write, "w") as file:
            json.dump(work(folder, *arguments), file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        return json.loads(file.read())


def fresh(folder: Path, model: str, flags: dict[str, Any]) -> dict[str, Any]:
    return answers(engine(model, flags), folder)


def changed(folder: Path, model: str, start: dict[str, Any]) -> dict[str, Any]:
    llm, parser = engine(model, start), probe.make_parser()
    core = llm.llm_engine.engine_core.engine_core
    fixed = ["--model", model, "--enforce-eager", "--dtype", "float32", *vllm_flags.command_line(start, {})]
    found = {"start": answers(llm, folder)}
    for name in sys.argv[4:]:
        wanted = WANTED[name]
        plan = probe.plan(parser, fixed, [*fixed, *vllm_flags.command_line(wanted, {})])
        active = core.autotune_change(plan.get("changes", {}))
        read = {name: active.get(name) for name in plan.get("expected", {})}
        found[name] = answers(llm, folder) | {"plan": plan, "active": active, "read": read}
    return found


def main() -> None:
    model, asynchronous, _, *names = sys.argv[1:]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    answer, sys.stdout = sys.stdout, sys.stderr
    hot_engine.install()
    recorder.install()
    start = START | {"async_scheduling": asynchronous == "true"}
    made = {"changed": in_a_fork(changed, model, start)}
    made["fresh"] = {name: in_a_fork(fresh, model, start | WANTED[name]) for name in names}
    print(json.dumps(made), file=answer)


if __name__ == "__main__":
    main()
