"""Finds the best vLLM server configuration for a model and a workload."""
