"""Cross-entropy of hidden states against an output embedding, without a table of all logits."""

from klong_jax.kernels.linear_cross_entropy.api import (
    LinearCrossEntropy,
    linear_cross_entropy,
    token_logprobs,
)

__all__ = ["LinearCrossEntropy", "linear_cross_entropy", "token_logprobs"]
