"""Compute kernels that know nothing of models."""
