"""Processes, signals, GPUs, files and the machine."""
