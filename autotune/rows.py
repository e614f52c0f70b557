"""Dataclasses as the rows of a CSV file."""

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


def write(path: Path, kind: type[Row], found: Iterable[Row]) -> None:
    """A row for each of `found`, below the names of `kind`'s fields."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([field.name for field in dataclasses.fields(kind)])
        rows.writerows(dataclasses.astuple(one) for one in found)
