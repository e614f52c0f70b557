"""The commands besides a trial and a study: `autotune plan …` runs `plan.main` here."""

NAMES = ("plan", "verify", "export", "compare", "report", "space", "log", "calibrate")
