"""Trajectory-splitting SFT: windows of demonstrations, their loss, and the training run."""
