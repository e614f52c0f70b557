"""Choosing what to try: the space, samplers and pruners, suggestions of a simulation or another study."""
