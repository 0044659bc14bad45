"""The pipeline's steps as KFP components: a signature each, and a body of a few lines that calls dfpo_core."""

STEPS = ("preflight", "prepare_data", "noise_data", "sft", "train", "evaluate", "promote", "close_run")
"""Folder, function and MLflow name of each step, in the order in which they run."""

IMAGE = "dfpo-cpu:0.1.0"
"""Base image of a component used on its own; the pipeline sets images from its parameters."""
