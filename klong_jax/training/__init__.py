"""What every trainer shares: optimiser, gradient accumulation, checkpoints, metrics."""
