"""Models, and the samples that are sent to them."""
