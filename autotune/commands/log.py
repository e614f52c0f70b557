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
from autotune.measure.result import Result
from autotune.results.tracking import Tracker, check
from autotune.text import count


def main() -> None:
    parser = Parser(prog="autotune log", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="multirun/STUDY, or one trial's folder")
    parser.add_argument(
        "--uri",
        default=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///multirun/mlflow.db"),
        help="MLflow tracking URI",
    )
    parser.add_argument(
        "--experiment", default=os.environ.get("MLFLOW_EXPERIMENT_NAME", "autotune"), help="MLflow experiment"
    )
    with errors_in_one_line():
        options = parser.parse_args()
        trials = log(options.folder, TrackingConfig(uri=options.uri, experiment=options.experiment))
    print(f"MLflow at {redact(options.uri)} has {count(trials, 'trial')} of {options.folder}")


def log(folder: Path, config: TrackingConfig) -> int:
    """Log the trials in `folder` and below it; returns how many there are. Raises InputError and TrackingError."""
    results = {path.parent: Result.load(path.parent) for path in sorted(folder.glob("**/result.json"))}
    trials = {path: result for path, result in results.items() if result.ran}
    if not trials:
        raise InputError(f"{folder}: no result.json of a trial that ran below it")
    check(config)
    single = list(trials) == [folder]
    tracker = Tracker(config, None if single else folder.name, folder)
    for path, result in trials.items():
        tracker.log_trial(path, result)
    tracker.summarise(folder)
    tracker.end("FINISHED")
    return len(trials)


if __name__ == "__main__":
    main()
