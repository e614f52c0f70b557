"""Fit a device's constants to measured trials; see `autotune calibrate --help`."""

from autotune.sim.calibrate import main

if __name__ == "__main__":
    main()
