"""Configuration: the schema, the command line, vLLM's flags, what is secret."""
