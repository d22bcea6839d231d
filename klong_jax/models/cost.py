"""How many operations a decoder takes, counted from its numbers.

Counted, not measured: compilers cannot look into hand-written kernels. A multiplication with an
addition is two operations. Attention is counted causally: only pairs of a query and a key that it
sees. Norms, rotations and softmaxes are left out.
"""

from collections.abc import Sequence
from typing import assert_never

from klong_jax.models.config import DecoderConfig, Remat


def parameters(config: DecoderConfig) -> int:
    """All parameters of matrices and embeddings."""
    tied = 1 if config.tie_embeddings else 2
    return layer_matrices(config, active=False) + tied * config.vocab_size * config.hidden_size


def layer_matrices(config: DecoderConfig, *, active: bool) -> int:
    """Parameters of the layers' matrices; if `active`, only those that one token meets."""
    width, head = config.hidden_size, config.head_dim
    attention = 2 * width * head * (config.num_heads + config.num_kv_heads)
    dense = 3 * width * config.intermediate_size
    total = config.num_layers * attention + config.dense_layers * dense
    if moe := config.moe:
        experts = moe.top_k if active else moe.num_experts
        mixture = width * (moe.num_experts + 3 * (experts * moe.expert_size + moe.shared_size))
        total += (config.num_layers - config.dense_layers) * mixture
    return total


def forward_flops(config: DecoderConfig, rows: int, new: int, cached: int, predicted: int) -> float:
    """Operations of one forward pass.

    Args:
        config: The decoder.
        rows: Sequences.
        new: Tokens of each that are computed.
        cached: Tokens of each that stand before them, whose keys and values are known.
        predicted: Tokens of each whose logits are computed.
    """
    attention = _attention_flops(config, new, cached)
    matrices = 2 * new * layer_matrices(config, active=True)
    logits = 2 * predicted * config.vocab_size * config.hidden_size
    return float(rows * (attention + matrices + logits))


def training_flops(
    config: DecoderConfig, new: int, cached: int, predicted: int, learnt: float = 1.0
) -> float:
    """Operations of a forward and a backward pass over one sequence.

    Each product of the forward pass takes two in the backward pass, one for the gradient of each
    factor; that of a matrix which is not learnt is left out.

    Args:
        config: The decoder.
        new: Tokens that are computed.
        cached: Tokens before them, whose keys and values are known.
        predicted: Tokens whose logits are computed.
        learnt: The share of the parameters that are learnt.
    """
    forward = forward_flops(config, 1, new, cached, predicted)
    matrices = new * layer_matrices(config, active=True)
    matrices += predicted * config.vocab_size * config.hidden_size
    return 3 * forward - (1 - learnt) * 2 * matrices


def repeated_flops(config: DecoderConfig, remat: Remat, rows: int, new: int, cached: int) -> float:
    """Operations of a forward pass that the backward pass repeats under a policy.

    Args:
        config: The decoder.
        remat: The policy.
        rows: Sequences.
        new: Tokens of each that are computed.
        cached: Tokens of each that stand before them.
    """
    attention = rows * _attention_flops(config, new, cached)
    matrices = rows * 2 * new * layer_matrices(config, active=True)
    match remat:
        case "none":
            return 0.0
        case "dots":
            # A grouped matrix product is no dot to the policy.
            return float(rows * 2 * new * _routed_matrices(config))
        case "attention":
            return float(matrices)
        case "full":
            return float(attention + matrices)
        case _:
            assert_never(remat)


def kept_numbers(config: DecoderConfig, remat: Remat) -> int:
    """Numbers that all layers keep of one token for the backward pass, at least.

    What a layer of experts keeps of them is left out.
    """
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    projected = heads + 2 * config.num_kv_heads * config.head_dim
    layers, dense = config.num_layers, config.dense_layers
    match remat:
        case "full":
            return layers * width
        case "attention":
            return layers * (width + heads)
        case "dots":
            every = 2 * width + projected + heads
            return layers * every + dense * 2 * config.intermediate_size
        case "none":
            every = 2 * width + projected + heads
            return layers * every + dense * 3 * config.intermediate_size
        case _:
            assert_never(remat)


def _attention_flops(config: DecoderConfig, new: int, cached: int) -> float:
    pairs = new * cached + new * (new + 1) / 2
    return 4 * config.num_layers * config.num_heads * config.head_dim * pairs


def _routed_matrices(config: DecoderConfig) -> int:
    """Parameters of the routed experts' matrices that one token meets."""
    if config.moe is None:
        return 0
    each = 3 * config.hidden_size * config.moe.top_k * config.moe.expert_size
    return (config.num_layers - config.dense_layers) * each


def stream_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Bytes that one token's matrix products read and write in all layers, at least."""
    width, head = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_heads * head, config.num_kv_heads * head
    attention = (3 * width + heads + 2 * kv_heads) + (heads + width)
    dense = 3 * (width + config.intermediate_size)
    total = config.num_layers * attention + config.dense_layers * dense
    if moe := config.moe:
        routed = 3 * moe.top_k * (width + moe.expert_size) + 3 * (width + moe.shared_size)
        total += (config.num_layers - config.dense_layers) * routed
    return total * itemsize


def cache_numbers(config: DecoderConfig) -> int:
    """Numbers of one token's keys and values in all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim


def prefix_sharing_flops(
    config: DecoderConfig,
    prefix: int,
    fresh: Sequence[int],
    *,
    prefix_trained: bool = True,
    learnt: float = 1.0,
) -> tuple[float, float]:
    """Operations of training on windows with a common prefix, forward and backward.

    Every token's prediction is computed, but for those of a prefix that is computed once and not
    trained. Nothing is counted for layers that are computed again to save memory.

    Args:
        config: The decoder.
        prefix: Tokens that all windows begin with.
        fresh: Tokens of each window behind them.
        prefix_trained: Whether any token of the prefix is trained.
        learnt: The share of the parameters that are learnt.

    Returns:
        With the prefix computed in every window, and with its keys and values computed once.
    """

    def both(new: int, cached: int, predicted: int) -> float:
        return training_flops(config, new, cached, predicted, learnt)

    naive = sum(both(prefix + tokens, 0, prefix + tokens) for tokens in fresh)
    once = both(prefix, 0, prefix if prefix_trained else 0)
    return naive, once + sum(both(tokens, prefix, tokens) for tokens in fresh)
