"""The words of a command line before Hydra reads them: what it would take and a study would not heed is refused."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from autotune.config import CONF
from autotune.config.advice import known_keys
from autotune.config.redact import redact
from autotune.errors import InputError
from autotune.text import one_line

GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
# What a study heeds of Hydra's own configuration, and what is to be written instead of the rest.
HEEDED = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweeper.storage", "hydra.sweeper.study_name", "hydra.sweeper.params"),
    *("hydra.sweeper.sampler", "hydra.searchpath", "hydra.output_subdir", "hydra.verbose", "hydra.mode", "hydra.help"),
    *("hydra.job_logging", "hydra/job_logging", "hydra.hydra_logging", "hydra/hydra_logging", "hydra.hydra_help"),
)
INSTEAD = {
    "hydra.launcher": "write launcher=inline, gpus or slurm, and its fields as launcher.n_jobs=…",
    "hydra.sweeper.sampler": "write sampler=tpe, random, grid, …",
    "hydra.sweeper.n_trials": "write n_trials=…",
    "hydra.sweeper.n_jobs": "write launcher=gpus launcher.n_jobs=…",
    "hydra.sweeper.direction": "write objective=… or objective.directions=[…]",
    "hydra.sweeper.max_failure_rate": "write max_failures=…",
    "hydra.sweep.subdir": "a trial's folder is trial-<its number>",
    "hydra.job.env_set": "write backend.env.NAME=…",
    "hydra.job.chdir": "trials run where autotune was started",
    "hydra": "leave it out",
}
FLAGS = {
    "--config-name": "write --config-dir FOLDER and an option of it: space=mine, experiment=mine",
    "--config-path": "write --config-dir FOLDER and an option of it: space=mine, experiment=mine",
    "--load": "write target_load=<queries/s>, or load=rate, load=concurrency",
    "--experimental-rerun": "the same command with study=<name> goes on with a study",
}
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
SHORT = {"-cn": "--config-name", "-cp": "--config-path"}


def check(words: Sequence[str]) -> None:
    """Raise InputError for a word of Hydra's that a study would not heed, a key set twice, a wrong --config-dir.

    With another sweeper (hydra/sweeper=optuna) all of Hydra's words are its own.
    """
    split_config_dir(words)
    _check_flags(words)
    own = not any(word.startswith("hydra/sweeper=") and word != "hydra/sweeper=autotune" for word in words)
    seen: set[str] = set()
    for word in words:
        if word.startswith("-") or not ("=" in word or word.startswith("~")):
            continue
        if digits := re.search(r"\d{300}", word):  # no float holds it
            raise InputError(f"{word[: digits.start() + 8]}…: a number of 300 digits or more; write a smaller one")
        override = parsed(word)
        key = override.key_or_group
        _check_override(word, override)
        if own and (key.startswith(("hydra.", "hydra/")) or key == "hydra"):
            _check_heeded(key)
        if not override.is_delete():
            flag = key.replace("-", "_") if ".args." in key else key  # as vLLM's command line does
            where = f"{flag}@{override.package or ''}"
            if where in seen:
                raise InputError(f"{key} is set twice; write it once")
            seen.add(where)


def _check_flags(words: Sequence[str]) -> None:
    """Raise InputError for a flag of Hydra's that means nothing here."""
    if any(word.startswith(("-p", "--package")) for word in words) and not {"--cfg", "-c"} & set(words):
        raise InputError("--package: it picks what --cfg shows; write --cfg job --package GROUP")
    for word in words:
        flag = SHORT.get(word.partition("=")[0], word.partition("=")[0])
        for name, instead in FLAGS.items():
            if flag == name or (len(flag) > len("--config-") and name.startswith(flag)):
                raise InputError(f"{word}: autotune does not take {name}; {instead}")


def _check_override(word: str, override: Override) -> None:
    """Raise InputError for an override without a key, and for values that Hydra would take for something else."""
    key = override.key_or_group
    if not key:
        raise InputError(f"{word}: write key=value")
    if key in GROUPS and not override.is_sweep_override() and not _is_option(key, override.value()):
        raise InputError(f"{word}: write the name of a file in conf/{key}")
    if type(override.value()) is int and override.value() not in (0, 1) and known_keys().get(key) is bool:
        raise InputError(f"{word}: write true or false")  # which OmegaConf takes it for
    if key in FOLDERS and (override.value() in (None, "???") or not str(override.value()).strip()):
        raise InputError(f"{word}: write a folder, or leave it out")
    if key == "hydra.searchpath":
        _check_folders(override)
    if key == "hydra/sweeper" and override.value() == "basic":  # it has no samplers, which sampler=… would choose from
        raise InputError(f"{word}: write sampler=grid for each combination once")


def _is_option(group: str, value: object) -> bool:
    """Tell whether `value` names an option of `group`; of a list, Hydra would let the last one win, save for spaces."""
    if isinstance(value, list) and group == "space":
        return all(isinstance(item, str) and item for item in value)
    return isinstance(value, str) and value != ""


def parsed(word: str) -> Override:
    """A word `key=value` as Hydra reads it. Raises InputError."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        why = re.sub(r"^\w+ while evaluating '.*': ", "", one_line(error))
        raise InputError(f"{redact(word)}: {redact(why)}{_of_syntax(why)}") from None


def _of_syntax(message: str) -> str:
    """Advice for a word that Hydra's grammar does not take."""
    if "empty choice" in message or "mismatch type argument" in message:
        return "; write choice(a,b), with default in it for vLLM's own value"
    if "token recognition" in message or "no viable alternative" in message or "mismatched input" in message:
        return "; close each bracket, and quote other signs than letters and digits: '\"a < b\"'"
    return ""


def _check_folders(override: Override) -> None:
    """Raise InputError for a folder of hydra.searchpath that is not there; Hydra goes on without it."""
    value = override.value()
    for path in map(str, value if isinstance(value, list) else []):
        if not path.startswith("pkg:") and not Path(path.removeprefix("file://")).is_dir():
            raise InputError(f"hydra.searchpath: {path}: no such folder; write --config-dir FOLDER")


def _check_heeded(key: str) -> None:
    """Raise InputError for a key of Hydra's that changes nothing here."""

    def below(key: str, name: str) -> bool:
        return key == name or key.startswith((f"{name}.", f"{name}/"))

    if not any(below(key, name) for name in HEEDED):
        instead = max((name for name in INSTEAD if below(key.replace("/", "."), name)), key=len)
        raise InputError(f"{key}: autotune does not heed it; {INSTEAD[instead]}")


def split_config_dir(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder of --config-dir, which Hydra's own command line takes, and `words` with it as an override.

    Raises InputError for none, two, or one that is not there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", type=Path, action="append", default=[])
    try:
        known, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        raise InputError("--config-dir: write --config-dir FOLDER") from None
    folders: list[Path] = known.config_dir
    if not folders:
        return None, rest
    if len(folders) > 1:
        raise InputError(f"--config-dir {folders[1]}: {folders[0]} is given already; write one folder")
    if not folders[0].is_dir():
        raise InputError(f"--config-dir {folders[0]}: {'not a' if folders[0].exists() else 'no such'} folder")
    return folders[0], [f"hydra.searchpath=[file://{folders[0].resolve()}]", *rest]


@contextmanager
def naming_files(folder: Path | None) -> Iterator[None]:
    """Raise InputError for what Hydra stumbles over and does not name: a broken file below `folder`, or a word."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        if str(error):
            raise
        raise InputError(_broken(folder, error)) from None
    except RecursionError:
        if not folder:
            raise
        raise InputError(f"--config-dir {folder}: the defaults of a file there lead back to it") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        if not _is_hydras(error):
            raise
        raise InputError(_broken(folder, error)) from None


def _broken(folder: Path | None, stumbled: Exception) -> str:
    """The first file below `folder` that is no configuration, and why; if all are, what Hydra `stumbled` over."""
    for file in sorted(folder.rglob("*.yaml")) if folder else []:
        try:
            OmegaConf.load(file)
            if header := re.search(r"^#\s*@\w+\s*$", file.read_text(), re.MULTILINE):
                raise ValueError(f"{header[0]!r} lacks its value")
        except Exception as error:  # a broken file may raise anything in YAML's or OmegaConf's depths
            return f"{file}: {one_line(error)}"
    return f"--config-dir {folder}: {one_line(stumbled)}" if folder else one_line(stumbled)


def _is_hydras(error: BaseException) -> bool:
    """Tell whether Hydra raised `error`, or what it reads YAML with."""
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    module = str(at.tb_frame.f_globals.get("__name__")) if at else ""
    return module.partition(".")[0] in ("hydra", "omegaconf", "yaml", "codecs", "antlr4")
