"""Logs to MLflow what it lacks of a study, or of a single trial: after its server was down, say.

autotune log multirun/STUDY --uri http://host:5000
"""

import argparse
import sys
from pathlib import Path

from autotune.config.redact import redact
from autotune.config.schema import TrackingConfig
from autotune.errors import TrackingError
from autotune.measure.result import Result
from autotune.results.tracking import Tracker, check


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="autotune log", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="multirun/STUDY, or one trial's folder")
    parser.add_argument("--uri", default="sqlite:///multirun/mlflow.db", help="MLflow tracking URI")
    parser.add_argument("--experiment", default="autotune", help="MLflow experiment")
    options = parser.parse_args()
    found = {path.parent: Result.load(path.parent) for path in sorted(options.folder.glob("**/result.json"))}
    trials = {folder: result for folder, result in found.items() if result.ran}
    if not trials:
        sys.exit(f"{options.folder}: no result.json below it")
    single = list(trials) == [options.folder]
    try:
        config = TrackingConfig(uri=options.uri, experiment=options.experiment)
        check(config)
        tracker = Tracker(config, None if single else options.folder.name, options.folder)
        for folder, result in trials.items():
            tracker.log_trial(folder, folder.name, result)
        tracker.summarise(options.folder)
        tracker.end("FINISHED")
    except TrackingError as error:
        sys.exit(str(error))
    print(f"{len(trials)} trials of {options.folder} are in MLflow at {redact(options.uri)}")


if __name__ == "__main__":
    main()
