"""`python -m autotune.tracking`, the earlier name of `autotune log`."""

from autotune.commands.log import main

if __name__ == "__main__":
    main()
