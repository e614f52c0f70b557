"""Log a study or a single trial to MLflow later, when the server was down for example:

    autotune log multirun/STUDY --uri http://host:5000

What MLflow has already is left as it is.
"""

import argparse
import os
from pathlib import Path

from autotune.config.command_line import Parser, errors_in_one_line
from autotune.config.redact import redact
from autotune.config.schema import TrackingConfig
from autotune.errors import InputError
from autotune.results.study import VERIFY
from autotune.results.tracking import Tracker, check, trials_in
from autotune.text import count


def main() -> None:
    parser = Parser(prog="autotune log", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="multirun/STUDY, or one trial's folder")
    parser.add_argument(
        "--uri",
        default=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///multirun/mlflow.db"),
        help="MLflow's tracking URI; without it MLFLOW_TRACKING_URI, or sqlite:///multirun/mlflow.db",
    )
    parser.add_argument(
        "--experiment",
        default=os.environ.get("MLFLOW_EXPERIMENT_NAME", "autotune"),
        help="MLflow's experiment; without it MLFLOW_EXPERIMENT_NAME, or autotune",
    )
    with errors_in_one_line():
        options = parser.parse_args()
        trials = log(options.folder, TrackingConfig(uri=options.uri, experiment=options.experiment))
    print(f"MLflow at {redact(options.uri)} has {count(trials, 'trial')} of {options.folder}")


def log(folder: Path, config: TrackingConfig) -> int:
    """Log the trials in `folder`, and the repeats of `autotune verify` below it; returns how many there are.

    Raises InputError and TrackingError.
    """
    found = {place: trials for place in (folder, folder / VERIFY) if (trials := trials_in(place))}
    if not found:
        raise InputError(f"{folder}: no result.json of a trial that ran below it")
    check(config)
    for place, trials in found.items():
        name = f"{place.parent.name}-{VERIFY}" if place.name == VERIFY else place.name
        tracker = Tracker(config, None if place in trials else name, place)
        for path, result in trials.items():
            tracker.log_trial(path, result)
        tracker.summarise(place)
        tracker.end("FINISHED")
    return sum(map(len, found.values()))


if __name__ == "__main__":
    main()
