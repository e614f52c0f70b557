"""The configuration of a trial, ready to deploy:

    autotune export study=demo format=kubernetes output=vllm.yaml

study   its name below multirun/, or a folder; a single trial's, too
trial   baseline, trial-7, …; without it the best one
format  command      a line of shell
        vllm         a file for `vllm serve --config`
        compose      a file for `docker compose up`
        kubernetes   a Deployment and its Service for `kubectl apply -f`
        diff         what differs from vLLM's defaults, and who chose it; needs the vLLM and the model of the study
output  a file; without it the terminal
host    address to listen on; 127.0.0.1 for command and vllm, 0.0.0.0 within a container
port    8000
image   the container's; without it vLLM's own of the version that was measured

What is secret (HF_TOKEN, …) is never written: the shell, compose's environment or a Kubernetes secret holds it.
"""

import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from autotune.config import vllm_flags
from autotune.config.command_line import errors_in_one_line, options, write_out
from autotune.config.redact import HIDDEN
from autotune.config.schema import Config
from autotune.errors import InputError
from autotune.measure.prepare import prepare
from autotune.measure.result import Result
from autotune.results.study import Study, load
from autotune.text import shorten

SECRET = "vllm-secrets"  # the Kubernetes secret that holds the variables which are hidden here
LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
SHM_GIB_PER_GPU = 2  # what vLLM's own Kubernetes page gives /dev/shm
START_FACTOR = 3  # a first start downloads the model and compiles, which the measured one had behind it
START_LEAST_S = 900.0


class Format(Enum):
    command = "command"
    vllm = "vllm"
    compose = "compose"
    kubernetes = "kubernetes"
    diff = "diff"


@dataclass
class Export:
    study: str = MISSING
    format: Format = MISSING
    trial: str | None = None
    output: str | None = None
    host: str | None = None
    port: int = 8000
    image: str | None = None


@dataclass(frozen=True)
class Deployment:
    """What a trial served, free of everything that only the measurement needed."""

    title: str  # study, trial and what it measured, in one line
    name: str  # fit for a container
    model: str  # Hub id or folder
    flags: dict[str, Any]  # by name with hyphens, as a YAML file for vLLM has them; negations as `no-…`
    words: list[str]  # the same as a command line
    env: dict[str, str]
    secrets: list[str]  # variables that are needed, and not known here
    gpus: int  # 0 on a CPU
    start_s: float  # to wait for it to be healthy
    image: str

    @property
    def folder(self) -> str | None:
        """The model's folder, if it does not come from the Hub."""
        return self.model if self.model.startswith("/") else None


def deployment(study: Study, trial: str, image: str | None = None) -> Deployment:
    """What `trial` served. Raises InputError if it can't be said."""
    result, config = study.results[trial], study.config_of(trial)
    model, words = result.command[2], result.command[3:]
    if Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())
    if hidden := [word for word in words if HIDDEN in word]:
        raise InputError(
            f"{study.folder / trial}: a flag's value is hidden there ({hidden[0]}); give it by an environment"
        )
    env = {name: str(value) for name, value in config.backend.get("env", {}).items()}
    on_gpu = _on_gpu(result)
    if on_gpu:
        env = {name: value for name, value in env.items() if not name.startswith("VLLM_CPU_")}
    secrets = [name for name, value in env.items() if HIDDEN in value]
    if not model.startswith("/") and "HF_TOKEN" not in secrets:
        secrets.append("HF_TOKEN")
    values = ", ".join(
        f"{name} {value:.4g}" for name, value in zip(study.objective.metrics, result.values, strict=True)
    )
    kind = "estimated" if result.estimated else "measured"
    return Deployment(
        title=f"Study {study.name}, {trial}: {kind} {values} ({shorten(result.params) or 'the defaults'})",
        name=re.sub(r"[^a-z0-9]+", "-", f"vllm-{config.model.name}".lower()).strip("-")[:50].strip("-"),
        model=model,
        flags=_flags(words),
        words=words,
        env={name: value for name, value in env.items() if name not in secrets},
        secrets=secrets,
        gpus=vllm_flags.gpus(result.args) if on_gpu else 0,
        start_s=max(START_LEAST_S, START_FACTOR * result.phases.get("start", 0.0)),
        image=image or _image(result, on_gpu),
    )


def _on_gpu(result: Result) -> bool:
    return "gpu" in result.facts or result.facts.get("simulated", "cpu") != "cpu"


def _image(result: Result, on_gpu: bool) -> str:
    """vLLM's own image; a simulation has no version, and gets the newest."""
    tag = f"v{version.partition('+')[0]}" if (version := result.facts.get("vllm")) else "latest"
    return f"{'vllm/vllm-openai' if on_gpu else 'public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo'}:{tag}"


def command(what: Deployment, host: str, port: int) -> str:
    listen = ["--host", host, "--port", str(port)]
    words = [f"{name}={value}" for name, value in what.env.items()]
    words = [*(["env", *words] if words else []), "vllm", "serve", what.model, *what.words, *listen]
    lines = [f"# {what.title}"]
    if host == LOCAL:
        lines.append(f"# For this machine alone; --host {EVERYWHERE} serves others, too.")
    lines += [f"# Needs {name} in the environment{_if_gated(name)}." for name in what.secrets]
    return "\n".join([*lines, shlex.join(words)]) + "\n"


def vllm(what: Deployment, host: str, port: int) -> str:
    lines = [f"# {what.title}", "#   vllm serve --config <this file>"]
    lines += [f"# Set first: export {shlex.quote(f'{name}={value}')}" for name, value in what.env.items()]
    lines += [f"# Needs {name} in the environment{_if_gated(name)}." for name in what.secrets]
    return _yaml(lines, {"model": what.model, **what.flags, "host": host, "port": port})


def compose(what: Deployment, host: str, port: int) -> str:
    check = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/health')"
    environment = what.env | {name: f"${{{name}{':-' if name == 'HF_TOKEN' else ':?'}}}" for name in what.secrets}
    mount = f"{what.folder}:{what.folder}:ro" if what.folder else "huggingface:/root/.cache/huggingface"
    gpus = {"driver": "nvidia", "count": what.gpus, "capabilities": ["gpu"]}
    arguments = [what.model, *what.words, "--host", host, "--port", str(port)]
    service: dict[str, Any] = {
        "image": what.image,
        "entrypoint": ["vllm", "serve"],
        "command": [word.replace("$", "$$") for word in arguments],
        "ports": [f"{port}:{port}"],
        "volumes": [mount],
        "environment": {
            name: value if name in what.secrets else value.replace("$", "$$") for name, value in environment.items()
        },
        "shm_size": f"{_shm_gib(what)}gb",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", check],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{what.start_s:.0f}s",
        },
        "restart": "unless-stopped",
    }
    if what.gpus:
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    body: dict[str, Any] = {"services": {what.name: service}}
    if not what.folder:
        body["volumes"] = {"huggingface": None}
    return _yaml([f"# {what.title}", *_image_note(what)], body)


def kubernetes(what: Deployment, host: str, port: int) -> str:
    labels = {"app.kubernetes.io/name": what.name}
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "timeoutSeconds": 5}
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name, "optional": name == "HF_TOKEN"}}}
        for name in what.secrets
    ]
    arguments = [what.model, *what.words, "--host", host, "--port", str(port)]
    model_at = what.folder or "/root/.cache/huggingface"
    model = {"hostPath": {"path": what.folder, "type": "Directory"}} if what.folder else {"emptyDir": {}}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": what.image,
        "command": ["vllm", "serve"],
        "args": [word.replace("$(", "$$(") for word in arguments],
        "env": [*({"name": name, "value": value.replace("$(", "$$(")} for name, value in what.env.items()), *secret],
        "ports": [{"name": "http", "containerPort": port}],
        "startupProbe": {**probe, "failureThreshold": math.ceil(what.start_s / 10)},
        "readinessProbe": {**probe, "failureThreshold": 1},
        "livenessProbe": {**probe, "failureThreshold": 6},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "model", "mountPath": model_at, "readOnly": bool(what.folder)},
        ],
    }
    if what.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": what.gpus}}
    pod = {
        "enableServiceLinks": False,  # a service called vllm would set VLLM_PORT, which vLLM takes for its own
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_shm_gib(what)}Gi"}},
            {"name": "model", **model},
        ],
    }
    deployed = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": what.name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "Recreate"},  # a second one would wait for the first one's GPUs
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": what.name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": port, "targetPort": "http"}]},
    }
    notes = [f"# {what.title}", *_image_note(what)]
    if what.secrets:
        given = " ".join(f'--from-literal={name}="${name}"' for name in what.secrets)
        notes.append(f"# First: kubectl create secret generic {SECRET} {given}")
    if what.folder:
        notes.append(f"# The node needs the model in {what.folder}.")
    return _yaml(notes, deployed, service)


def diff(config: Config, result: Result) -> str:
    """Each flag whose value is not vLLM's default for this model, and which part of the configuration chose it.

    Raises InputError if the vLLM or the model that it was measured with is not here.
    """
    prepared = prepare(config)
    defaults = prepared.backend.dry_run(prepared.model, {})
    if defaults.refusal:
        raise InputError(f"vLLM refuses its own defaults for this model: {defaults.refusal}")
    swept = {name.rpartition(".")[2].replace("-", "_") for name in result.params}
    rows, same = [("flag", "vLLM's default", "here", "chosen by")], []
    for flag, value in prepared.args.items():
        default = defaults.resolved.get(flag, "unset")
        if value is None or value == default:
            same += [flag] if value is not None else []
            continue
        groups = {"the sampler": swept, "engine": config.engine.args, "model": config.model.args}
        by = next(
            (group for group, names in groups.items() if flag in {n.replace("-", "_") for n in names}), "scenario"
        )
        rows.append((flag, str(default), str(value), by))
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, _widths(rows), strict=True)).rstrip() for row in rows
    ]
    if same:
        lines.append(f"The same as vLLM's default: {', '.join(same)}")
    return "\n".join(lines) + "\n"


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]


def _flags(words: list[str]) -> dict[str, Any]:
    """`words` as a YAML file for vLLM has them: `--no-x` as `no-x: true`, which each of its versions reads."""

    def read(value: str) -> Any:
        return json.loads(value) if value.startswith("{") else yaml.safe_load(value) if _is_plain(value) else value

    found: dict[str, Any] = {}
    for name, values in vllm_flags.groups(words):
        found[name] = True if not values else read(values[0]) if len(values) == 1 else [read(v) for v in values]
    return found


def _is_plain(word: str) -> bool:
    """Whether it is a number that is written again as it stands here."""
    value = yaml.safe_load(word)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and str(value) == word


def _if_gated(name: str) -> str:
    return ", if the model is gated" if name == "HF_TOKEN" else ""


def _image_note(what: Deployment) -> list[str]:
    return ["# Simulated, so no version of vLLM is known; say which: image=…"] if what.image.endswith(":latest") else []


def _shm_gib(what: Deployment) -> int:
    return SHM_GIB_PER_GPU * max(1, what.gpus)


class _Dumper(yaml.SafeDumper):
    """Without anchors where two places hold the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(notes: list[str], *documents: Mapping[str, Any]) -> str:
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return "\n".join([*notes, text])


def text(options: Export) -> str:
    """What `options` ask for. Raises InputError."""
    study = load(options.study)
    trial = study.chosen(options.trial)
    if options.format is Format.diff:
        return diff(study.config_of(trial), study.results[trial])
    what = deployment(study, trial, options.image)
    write = {Format.command: command, Format.vllm: vllm, Format.compose: compose, Format.kubernetes: kubernetes}
    in_container = options.format in (Format.compose, Format.kubernetes)
    return write[options.format](what, options.host or (EVERYWHERE if in_container else LOCAL), options.port)


def main() -> None:
    with errors_in_one_line():
        chosen = options(Export, sys.argv[1:], __doc__)
        write_out(text(chosen), chosen.output)


if __name__ == "__main__":
    main()
