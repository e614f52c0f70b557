"""The operating system: processes, signals, leases of GPUs, files and the machine."""
