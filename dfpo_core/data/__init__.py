"""Rows: where they come from, how they are split, and how a question becomes a prompt."""
