"""Write the configuration of a trial, ready to deploy:

    autotune export study=demo format=kubernetes output=vllm.yaml

study   its name below multirun/, or a folder; a single trial's, too
trial   baseline, trial-7, …; without it the best one
format  command      a line of shell
        vllm         a file for `vllm serve --config`
        compose      a file for `docker compose up`
        kubernetes   a Deployment and its Service for `kubectl apply -f`
        diff         what differs from vLLM's defaults, and who chose it; needs the vLLM and the model of the study
python  for diff: an interpreter with that vLLM; without it this one
output  a file; without it the terminal
host    address to listen on; 127.0.0.1 for command and vllm, 0.0.0.0 within a container
port    8000
image   the container's; without it vLLM's own image of the version that was measured

Secrets (HF_TOKEN, …) are never written: the shell, compose's environment or a Kubernetes secret holds them.
"""

import json
import math
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import jinja2
import yaml
from omegaconf import MISSING

from autotune.config import vllm_flags
from autotune.config.bounds import within
from autotune.config.command_line import compose, errors_in_one_line, options, write_out
from autotune.config.overrides import check_trusted
from autotune.config.redact import HIDDEN, Deployable
from autotune.config.schema import Config
from autotune.errors import InputError
from autotune.measure.prepare import prepare
from autotune.measure.result import Result
from autotune.results.study import Study, load
from autotune.text import aligned, rounded, shorten

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


CONTAINERS = {Format.compose: "compose.yaml.j2", Format.kubernetes: "kubernetes.yaml.j2"}


@dataclass
class Export:
    study: str = MISSING
    format: Format = MISSING
    trial: str | None = None
    output: str | None = None
    host: str | None = None
    port: int = within(8000, 1, 65535)
    image: str | None = None
    python: str | None = None


@dataclass(frozen=True)
class Deployment:
    """A trial's server, without anything that only the measurement needed."""

    title: str  # study, trial and what it measured, in one line
    name: str  # fit for a container
    model: str  # Hub id or folder
    flags: list[str]  # after `vllm serve MODEL`
    env: dict[str, str]
    secrets: list[str]  # variables that are needed, and not known here
    gpus: int  # 0 on a CPU
    start_s: float  # to wait for it to be healthy
    image: str

    @property
    def folder(self) -> str | None:
        """The model's folder, if it does not come from the Hub."""
        return self.model if self.model.startswith("/") else None

    @property
    def shm_gib(self) -> int:
        return SHM_GIB_PER_GPU * max(1, self.gpus)

    def arguments(self, host: str, port: int) -> list[str]:
        """The words that follow `vllm serve`."""
        return [self.model, *self.flags, "--host", host, "--port", str(port)]


def deployment(study: Study, trial: str, image: str | None = None) -> Deployment:
    """The server of `trial`. Raises InputError if a flag's value is hidden."""
    result, config = study.results[trial], study.config_of(trial)
    if len(result.command) < 3:
        raise InputError(f"{study.folder / trial}: its result.json holds no `vllm serve MODEL`; choose another trial")
    model, flags = result.command[2], result.command[3:]
    if Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())
    if hidden := [word for word in flags if HIDDEN in word]:
        raise InputError(
            f"{study.folder / trial}: a flag's value is hidden there ({hidden[0]}); give it by an environment variable"
        )
    env = {name: str(value) for name, value in config.backend.get("env", {}).items()}
    on_gpu = "gpu" in result.facts or result.facts.get("simulated", "cpu") != "cpu"
    if on_gpu:
        env = {name: value for name, value in env.items() if not name.startswith("VLLM_CPU_")}
    secrets = [name for name, value in env.items() if HIDDEN in value]
    if not model.startswith("/") and "HF_TOKEN" not in secrets:
        secrets.append("HF_TOKEN")
    return Deployment(
        title=_title(study, trial),
        name=re.sub(r"[^a-z0-9]+", "-", f"vllm-{config.model.name}".lower()).strip("-")[:50].strip("-"),
        model=model,
        flags=flags,
        env={name: value for name, value in env.items() if name not in secrets},
        secrets=secrets,
        gpus=vllm_flags.gpus(result.args) if on_gpu else 0,
        start_s=max(START_LEAST_S, START_FACTOR * result.phases.get("start", 0.0)),
        image=image or _image(result, on_gpu),
    )


def _title(study: Study, trial: str) -> str:
    result = study.results[trial]
    pairs = zip(study.objective.metrics, result.values, strict=True)
    values = ", ".join(f"{metric} {rounded(value)}" for metric, value in pairs)
    kind = "estimated" if result.estimated else "measured"
    return f"Study {study.name}, {trial}: {kind} {values} ({shorten(result.params) or 'the defaults'})"


def _image(result: Result, on_gpu: bool) -> str:
    """vLLM's own image; a simulation has no version, and gets the newest."""
    tag = f"v{version.partition('+')[0]}" if (version := result.facts.get("vllm")) else "latest"
    return f"{'vllm/vllm-openai' if on_gpu else 'public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo'}:{tag}"


def command(served: Deployment, host: str, port: int) -> str:
    variables = [f"{name}={value}" for name, value in served.env.items()]
    words = [*(["env", *variables] if variables else []), "vllm", "serve", *served.arguments(host, port)]
    lines = [f"# {served.title}"]
    if host == LOCAL:
        lines.append(f"# For this machine alone; --host {EVERYWHERE} serves others, too.")
    return "\n".join([*lines, *_needed_variables(served), shlex.join(words)]) + "\n"


def vllm(served: Deployment, host: str, port: int) -> str:
    lines = [f"# {served.title}", "#   vllm serve --config <this file>"]
    lines += [f"# Set first: export {shlex.quote(f'{name}={value}')}" for name, value in served.env.items()]
    body = {"model": served.model, **_as_mapping(served.flags), "host": host, "port": port}
    text = yaml.safe_dump(body, sort_keys=False, width=120, allow_unicode=True)
    return "\n".join([*lines, *_needed_variables(served), text])


def _needed_variables(served: Deployment) -> list[str]:
    if_gated = {"HF_TOKEN": ", if the model is gated"}
    return [f"# Needs {name} in the environment{if_gated.get(name, '')}." for name in served.secrets]


def _as_mapping(flags: list[str]) -> dict[str, Any]:
    """`flags` as a YAML file for vLLM has them: `--no-x` as `no-x: true`, which each of its versions reads."""

    read = ((name, [_as_value(word) for word in words]) for name, words in vllm_flags.groups(flags))
    return {name: values[0] if len(values) == 1 else values or True for name, values in read}


def _as_value(word: str) -> Any:
    """The object in `word`, or the number that is written again as it stands there; else `word` itself."""
    with suppress(ValueError):
        value = json.loads(word)
        if isinstance(value, dict) or (isinstance(value, (int, float)) and str(value) == word):
            return value
    return word


def in_container(template: str, served: Deployment, host: str, port: int) -> str:
    """A file for docker compose or Kubernetes, from its template beside this module."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["scalar"] = _scalar
    return templates.get_template(template).render(served=served, host=host, port=port)


def _scalar(value: str) -> str:
    """A YAML string on one line, quoted where it could be read as something else."""
    style = '"' if "\n" in value else None
    text: str = yaml.safe_dump(
        [value], default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True
    )
    return text.strip().removeprefix("[").removesuffix("]")


def diff(config: Config, result: Result, python: str | None) -> str:
    """Each flag whose value is not vLLM's default for this model, and which part of the configuration chose it.

    vLLM is that of the interpreter `python`; no program or folder is taken from `config`. Raises InputError if the
    vLLM or the model that it was measured with is not here.
    """
    backend = {key: value for key, value in config.backend.items() if key not in ("python", "prefix", "env")}
    backend |= {"python": python} if python else {}
    prepared = prepare(replace(config, backend=backend, cache_dir=compose([])[0].cache_dir))
    defaults = prepared.backend.dry_run(prepared.model, {})
    if defaults.refusal:
        raise InputError(f"vLLM refuses its own defaults for this model: {defaults.refusal}")
    choices = {
        "the sampler": {name.removeprefix(vllm_flags.FLAG).partition(".")[0] for name in result.params},
        "engine": config.engine.args,
        "model": config.model.args,
    }
    chosen_by = {name.replace("-", "_"): group for group in reversed(choices) for name in choices[group]}
    rows, same = [("flag", "vLLM's default", "here", "chosen by")], []
    for flag, value in prepared.args.items():
        default = defaults.resolved.get(flag, "unset")
        if value is None:
            continue
        if value == default:
            same.append(flag)
        else:
            rows.append((flag, vllm_flags.as_text(default), vllm_flags.as_text(value), chosen_by.get(flag, "scenario")))
    lines = aligned(rows, left=True)
    if same:
        lines.append(f"The same as vLLM's default: {', '.join(same)}")
    return "\n".join(lines) + "\n"


def text(options: Export) -> str:
    """The file that `options` ask for. Raises InputError."""
    study = load(options.study)
    trial = study.chosen(options.trial)
    if options.format is Format.diff:
        config = study.config_of(trial)
        check_trusted(config, (), study.folder / trial)
        return diff(config, study.results[trial], options.python)
    served = deployment(study, trial, options.image)
    if options.format in CONTAINERS:
        return in_container(CONTAINERS[options.format], served, options.host or EVERYWHERE, options.port)
    write = command if options.format is Format.command else vllm
    return write(served, options.host or LOCAL, options.port)


def main() -> None:
    with errors_in_one_line():
        chosen = options(Export, sys.argv[1:])
        write_out(Deployable(text(chosen)), chosen.output)


if __name__ == "__main__":
    main()
