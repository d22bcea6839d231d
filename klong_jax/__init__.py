"""klong_jax: train LLM agents for extremely long-horizon tasks on JAX."""
