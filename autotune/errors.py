"""Exceptions by stage. Each message is one line: what is wrong, where, and what to write instead."""


class AutotuneError(Exception):
    """An error that a user can act on; shown without a traceback."""


class InputError(AutotuneError):
    """The configuration, the data set or the model is not usable as written."""


class StartError(AutotuneError):
    """vLLM did not start; `after_s` is how long the attempt took, in seconds, if that is known."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class MeasureError(AutotuneError):
    """The run broke off; its measurements can't be used."""


class TrackingError(AutotuneError):
    """MLflow can't be reached or refused a record."""


class StoppedError(AutotuneError):
    """The study asked the trial to end before it was done."""


class BehindError(AutotuneError):
    """The trial can't be the study's best: it was ended for that."""
