"""What to try: the space, samplers and pruners, and what a simulation or another study suggests."""
