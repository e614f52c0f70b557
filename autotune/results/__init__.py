"""Finished studies: read from their folders, shown as text, figures, a page, and in MLflow."""
