"""The pipelines, their configurations and the `dfpo` command line."""
