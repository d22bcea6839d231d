"""What Hydra composes from configs/, validated before anything runs."""
