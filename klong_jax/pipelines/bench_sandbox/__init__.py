"""The sandbox service beside what else runs commands in containers."""
