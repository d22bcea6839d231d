"""The numbers that make a decoder."""

from dataclasses import asdict, dataclass
from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import content_hash


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and SwiGLU.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        num_layers: Decoder blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides num_heads.
        head_dim: Width of a head; even.
        intermediate_size: Width of the MLP.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added inside the root of RMSNorm.
        tie_embeddings: Whether output and input embeddings are one.
        qk_norm: Whether queries and keys are RMS-normalised a head (Qwen3).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even for rotary positions.")

    @property
    def fingerprint(self) -> str:
        """Identifies the architecture; a checkpoint of another one is refused."""
        return content_hash(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """The numbers as a JSON object."""
        return asdict(self)
