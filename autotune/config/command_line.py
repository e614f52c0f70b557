"""The command line: its words as a Config or as a command's options, errors in one line."""

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from autotune.config import CONF, bounds, fields, overrides, schema, sweeper, words
from autotune.config.advice import told
from autotune.config.redact import install, redact
from autotune.config.words import parsed
from autotune.errors import AutotuneError, InputError
from autotune.text import one_line

SHOW = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help"}  # Hydra's flags that run nothing
STARTED = time.localtime()
Options = TypeVar("Options")


def register() -> None:
    """Make resolvers, schema and sweeper known to Hydra; a second call changes nothing."""
    if OmegaConf.has_resolver("model_name"):
        return
    OmegaConf.register_resolver("model_name", model_name)
    OmegaConf.register_resolver("mlperf_limit", mlperf_limit)
    OmegaConf.register_resolver("file_name", study_name)  # Hydra makes the folder before anything else is checked
    # Hydra's ${now:…} moves on between a study's name and its trials' names.
    OmegaConf.register_resolver("started", lambda pattern: time.strftime(pattern, STARTED))
    OmegaConf.register_resolver("fields", lambda *_: fields.render().replace("$", "$$"))  # Hydra fills in help's $WORDS
    schema.register()
    sweeper.register()


def model_name(path: str | None) -> str:
    """A short name for the model at `path`, fit for a file."""
    return re.sub(r"[^\w.-]+", "-", Path(path or "model").name.lower()).strip("-.")[:100] or "model"


def mlperf_limit(limit: float | None, field: str, model: str) -> float:
    """MLPerf's `limit` for a model, as the default of the scenario's `field`. Raises InputError if it has none."""
    if limit is None:
        instead = "scenario.ttft_ms=<ms> scenario.tpot_ms=<ms> (null for none), or a workload (workload=chat)"
        raise InputError(f"{field}: MLPerf has no limits for {model}; write {instead}")
    return limit


def study_name(name: str) -> str:
    """`name`, if a folder of multirun/ may have it. Raises InputError."""
    bounds.check(name, "study", bounds.study)
    return name


def compose(arguments: Sequence[str], defaults: Sequence[str] = ()) -> tuple[schema.Config, dict[str, Any], list[str]]:
    """The Config that `arguments` compose, the parameters of its space as written, and the arguments that sweep.

    `defaults` are overrides that hold unless `arguments` say otherwise.
    """
    show_help(arguments)
    register()
    words.check(arguments)
    folder, rest = words.split_config_dir(arguments)
    arguments = [*defaults, *rest]
    if wrong := [argument for argument in arguments if argument.startswith("-") or not re.search("[=~]", argument)]:
        raise InputError(f"{wrong[0]!r}: write key=value, or --help")
    sweeps = [argument for argument in arguments if parsed(argument).is_sweep_override()]
    with words.naming_files(folder), hydra.initialize_config_dir(str(CONF)):
        fixed = [argument for argument in arguments if argument not in sweeps]
        composed = hydra.compose("config", overrides=fixed, return_hydra_config=True)
        return overrides.typed(composed), dict(composed.hydra.sweeper.params or {}), sweeps


def without_sweep(words: Sequence[str]) -> list[str]:
    """A command line that shows something (`--cfg job`) without `-m` and what it sweeps: Hydra shows single trials."""
    if not any(word.partition("=")[0] in SHOW for word in words):
        return list(words)
    kept, swept = [], []
    for word in words:
        is_override = "=" in word and not word.startswith("-")
        if is_override and parsed(word).is_sweep_override():
            swept.append(word)
        elif word not in ("-m", "--multirun"):
            kept.append(word)
    if swept:
        print(f"# one trial, without what is swept: {' '.join(swept)}", file=sys.stderr)
    return kept


class Parser(argparse.ArgumentParser):
    """Parser of a command that takes flags; what it can't parse is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


@contextmanager
def without_usage() -> Iterator[None]:
    """Raise InputError for flags that Hydra's parser does not take: it would print a usage of its own."""
    before: Any = argparse.ArgumentParser.error
    own: Any = Parser.error
    argparse.ArgumentParser.error = own  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]


def show_help(words: Sequence[str]) -> None:
    """Print the help of a command that runs as a module of its own and exit, if `words` ask for it."""
    if {"--help", "-h"} & set(words):
        print(sys.modules["__main__"].__doc__)
        sys.exit()


def options(kind: type[Options], words: Sequence[str]) -> Options:
    """The dataclass `kind` from words `key=value`.

    Raises InputError for a word, a key or a value that `kind` does not take, and for a key that is missing.
    """
    show_help(words)
    if wrong := [word for word in words if "=" not in word]:
        raise InputError(f"{wrong[0]}: write key=value, or --help")
    made: Any = OmegaConf.structured(kind)
    keys = [word.partition("=")[0] for word in words]
    for at, word in enumerate(words):
        if keys[at] in keys[:at]:
            raise InputError(f"{word}: write {keys[at]}= once")
        try:
            made = OmegaConf.merge(made, OmegaConf.from_dotlist([word]))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise InputError(f"{told(error)}; see --help") from None
    if missing := OmegaConf.missing_keys(made):
        raise InputError(f"{min(missing)}= is missing; see --help")
    options = OmegaConf.to_object(made)
    assert isinstance(options, kind)
    bounds.check(options)
    return options


def own_and_overrides(kind: type[Any], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's `words`: those for its own options, the fields of the dataclass `kind`, and overrides of a study."""
    keys = {field.name for field in dataclasses.fields(kind)}
    own = [word for word in words if word.partition("=")[0] in keys or "=" not in word]
    return own, [word for word in words if word not in own]


def load_as_key(words: Sequence[str]) -> list[str]:
    """A command's `words` with `--load 200` as `target_load=200`: as a key, `load` is a group."""
    if "--load" in words[-1:]:
        raise InputError("--load: write --load <queries/s, or users>")
    text = "\0".join(words)
    return re.sub(r"(^|\0)--load[\0=]", r"\1target_load=", text).split("\0") if words else []


def write_out(text: str, output: str | None) -> None:
    """Write `text` to the file `output`, or to standard output. Raises InputError."""
    if output is None:
        sys.stdout.write(text)  # print would make a plain text of a Deployable
        return
    try:
        Path(output).write_text(redact(text))
    except OSError as error:
        raise InputError(f"output={output}: {error.strerror}; write a file's path") from None


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    install(sys.argv[1:])  # a command that runs as a module of its own (python -m autotune.verify) has not yet
    try:
        yield
    except (AutotuneError, HydraException, OmegaConfBaseException, YAMLError) as error:
        sys.exit(f"autotune: {one_line(told(error))}")
    except OSError as error:  # a folder in a file's place, no permission, no space, a name that is too long
        if error.filename is None:
            raise
        sys.exit(f"autotune: {error.filename}: {error.strerror}")
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        sys.exit(f"autotune: {error}: raise the limit on processes (ulimit -u, or the container's)")
    except KeyboardInterrupt:
        sys.exit(130)
