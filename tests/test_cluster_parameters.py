"""What SLURM's users write for times and memory."""

import pytest

from autotune.errors import InputError
from autotune.sweep.cluster import gigabytes, minutes


def test_time_limits_are_read_as_slurm_reads_them():
    forms = {"90": 90, "90:30": 91, "1:30:00": 90, "2-12": 3600, "2-12:30": 3630, "2-00:00:00": 2880}
    assert {form: minutes(form) for form in forms} == forms


def test_memory_is_read_with_its_unit():
    forms = {"64": 64, "64G": 64, "64GB": 64, "512M": 0.5, "1.5T": 1536, "64 GiB": 64}
    assert {form: gigabytes(form) for form in forms} == forms


@pytest.mark.parametrize("wrong", ["two days", "", "-5", "1:2:3:4", "5x"])
def test_what_is_neither_is_named(wrong: str):
    with pytest.raises(InputError, match=r"launcher.parameters.timeout_min=.*: write minutes"):
        minutes(wrong)
    with pytest.raises(InputError, match=r"launcher.parameters.mem_gb=.*: write GB"):
        gigabytes(wrong)
