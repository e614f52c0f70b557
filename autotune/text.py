"""Words for people."""


def one_line(error: object) -> str:
    """An exception's message on one line, without what Hydra adds for its own developers."""
    cause = error.__cause__ if isinstance(error, BaseException) else None
    text = str(error).split("Config search path:")[0] + (f"\n{cause}" if cause else "")
    noise = ("full_key:", "object_type=", "reference_type=", "Set the environment variable")
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(noise)]
    return "; ".join(kept).replace(":; ", ": ").replace("'; '", "', '")
