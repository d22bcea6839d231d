"""Evaluation of policies on held-out tasks, over the same runner that training uses."""
