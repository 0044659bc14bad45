"""DFPO: robust RL post-training of language models with a flow critic. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
