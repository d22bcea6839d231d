"""Meshes, sharding rules, multi-host start, and programs compiled ahead of time for TPUs."""
