"""Arguments of data sets and the cache's folder: what can't be used is named before anything starts."""

import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from autotune.data.samples import Samples
from autotune.errors import InputError
from autotune.measure.prepare import _partial, cache_of

CONF = Path(__file__).parents[1] / "conf" / "dataset"


def records(tokenizer: Tokenizer, option: str, **changes: Any) -> list[Any]:
    """The records of conf/dataset/<option>.yaml with some arguments changed, None to leave one out."""
    written = yaml.safe_load((CONF / f"{option}.yaml").read_text())["records"]
    written = {name: "natural" if "${" in str(value) else value for name, value in written.items()}
    changed = {name: value for name, value in {**written, **changes}.items() if value is not None}
    make = _partial(changed, "dataset.records")
    assert make
    return list(make(tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("option", "changes", "message"),
    [
        ("synthetic", {"prompt_bounds": [5]}, r"prompt_bounds=\[5\]: write two whole numbers"),
        ("synthetic", {"prompt_bounds": [1.5, 9]}, r"prompt_bounds=\[1.5, 9\]: write two whole numbers"),
        ("synthetic", {"prompt_bounds": 5}, "prompt_bounds=5: write two whole numbers"),
        ("synthetic", {"prompt_bounds": [9, 5]}, r"prompt_bounds=\[9,5\]: write the lower one first"),
        ("synthetic", {"output_bounds": [0, 5]}, r"output_bounds=\[0,5\]: write the lower one first, from 1"),
        (
            "synthetic",
            {"output_bounds": [1, 10**12]},
            "output_bounds=.*: write the lower one first, from 1 to 1,000,000",
        ),
        ("synthetic", {"prompt_bound": 5}, r"prompt_bound: no such argument; did you mean prompt_bounds\?"),
        ("synthetic", {"count": "abc"}, "count=abc: write a whole number"),
        ("synthetic", {"count": True}, "count=True: write a whole number"),
        ("synthetic", {"count": 2.0}, "count=2.0: write a whole number"),
        ("synthetic", {"count": 0}, "count=0: write a number from 1 to 1,000,000"),
        ("synthetic", {"count": 10**12}, "count=1000000000000: write a number from 1 to 1,000,000"),
        ("synthetic", {"prompt_tokens": float("nan")}, "prompt_tokens=nan: write a finite number"),
        ("synthetic", {"output_tokens": float("inf")}, "output_tokens=inf: write a finite number"),
        ("synthetic", {"prompt_sigma": -1}, "prompt_sigma=-1: write a number from 0 to 10"),
        ("synthetic", {"prompt_sigma": 1000}, "prompt_sigma=1000: write a number from 0 to 10"),
        ("synthetic", {"output_deviation": -1}, "output_deviation=-1: write a number from 0"),
        ("synthetic", {"shared_prefix": 1.1}, "shared_prefix=1.1: write a number from 0 to 1"),
        ("synthetic", {"seed": None}, "seed is missing; write a value"),
        ("synthetic", {"_target_": None}, "write a _target_"),
        ("sharegpt", {"turns": 5}, "turns=5: write a text"),
        ("sharegpt", {"max_prompt_tokens": "many"}, r"max_prompt_tokens=many: write a whole number from 0 or null"),
        ("cnn_dailymail", {"expected": "all"}, "expected=all: write a whole number"),
    ],
)
def test_arguments_of_data_sets_are_checked_by_name_type_and_range(
    tokenizer: Tokenizer, option: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"^dataset\.records.*{message}"):
        records(tokenizer, option, **changes)


def test_records_that_are_no_function_are_named() -> None:
    with pytest.raises(InputError, match=r"^dataset\.records=5: write a _target_"):
        _partial(5, "dataset.records")


def config(folder: Path) -> Any:
    return SimpleNamespace(cache_dir=str(folder))


@pytest.mark.parametrize("path", ["/etc/hostname", "/etc/hostname/below", "/proc/autotune", "/sys/autotune"])
def test_a_cache_folder_that_can_not_be_written_is_named(path: str) -> None:
    with (
        pytest.raises(InputError, match=f"^cache_dir={path}: .*; write a folder with room"),
        cache_of(config(Path(path))),
    ):
        pass


@pytest.fixture
def files_end_at_4_kib() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("files_end_at_4_kib")
def test_a_cache_without_room_is_named_and_keeps_no_half_file(tmp_path: Path) -> None:
    prompts = [np.zeros(9_000, dtype=np.int32)]
    many = Samples("d", "0", prompts, np.array([2], dtype=np.int32), True, tmp_path / "samples/d.npz")
    with pytest.raises(InputError, match=f"^cache_dir={tmp_path}: File too large"), cache_of(config(tmp_path)):
        many.save()
    assert not list((tmp_path / "samples").iterdir())


def test_a_file_elsewhere_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^TMPDIR: No usable temporary directory"), cache_of(config(tmp_path)):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in …")
    with pytest.raises(InputError, match=r"^/nowhere: No such file"), cache_of(config(tmp_path)):
        Path("/nowhere").read_bytes()


def test_a_token_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    prompts = [np.array([1, 2]), np.array([3, 512])]
    found = Samples("d", "0", prompts, np.array([2, 2]), True, tmp_path / "d.npz")
    found.check_vocabulary(513)
    with pytest.raises(
        InputError, match=r"d, record 2: token id 512, and the model has 512 tokens; .*engine\.args\.tok"
    ):
        found.check_vocabulary(512)
