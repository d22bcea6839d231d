"""Tokenizers, chat templates, and the text formats of tasks and trajectories."""
