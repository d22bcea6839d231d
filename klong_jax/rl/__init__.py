"""Progressive RL: stages of growing timeouts over groups of judged rollouts."""
