"""JAX-native generation: prefill and decode with a cached prefix, many rollouts at once."""
