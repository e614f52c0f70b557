"""Write a study's report again, one HTML page that needs no network, to report.html in the study's folder:

    autotune report study=demo

study  its name below multirun/, or its folder
"""

import sys
import time
from dataclasses import dataclass

import optuna
from omegaconf import MISSING

from autotune.config.command_line import errors_in_one_line, options
from autotune.results import report
from autotune.results.study import load
from autotune.search import account


@dataclass
class Report:
    study: str = MISSING


def main() -> None:
    with errors_in_one_line():
        chosen = options(Report, sys.argv[1:], __doc__)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        began = time.monotonic()
        study = load(chosen.study)
        account.write(study)
        path = report.write(study)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, written in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
