"""vLLM's flags as configured: names with underscores, null for vLLM's default."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

FLAG = "engine.args."  # prefix of flags in configuration keys
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def gpus(args: Mapping[str, Any]) -> int:
    """Number of GPUs that a server with these flags takes."""
    return prod(int(args.get(name) or 1) for name in PARALLEL)


def command_line(args: Mapping[str, Any], is_switch: Callable[[str], bool] = lambda _: True) -> list[str]:
    """Arguments of `vllm serve` for `args`: nulls are left out, lists become several words, objects JSON.

    A boolean becomes `--flag` or `--no-flag` if `is_switch(flag)`, else a value.
    """
    words: list[str] = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool) and is_switch(name.replace("-", "_")):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            words += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag of a command line, without its leading hyphens, and the words that follow it."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name, [value] if equals else []))
        else:
            flags[-1][1].append(word)
    return flags
