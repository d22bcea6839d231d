"""Grading what an agent left behind against its task's rubric."""
