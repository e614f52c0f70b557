"""Models and samples."""
