"""The numbers that make a decoder, and the named choices of how it is run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import content_hash

Remat = Literal["none", "dots", "attention", "full"]
"""What a layer keeps for its backward pass, from most to least: everything; the results of its
matrix multiplications and what attention gave; its input and what attention gave; its input. The
later in this order, the more is computed a second time."""

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]
"""Matrices that adapters can stand beside; the last three are those of MLPs and shared experts."""

DType = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class DTypes:
    """Parameters and computation in separate precisions.

    Attributes:
        params: What parameters, and so gradients and the optimiser's state, are held in.
        compute: What parameters are cast to where they are used; also the KV cache's.
    """

    params: DType = "float32"
    compute: DType = "float32"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low rotary frequencies for contexts beyond the original one.

    Attributes:
        factor: How much longer the wavelengths beyond the original context become.
        low_freq_factor: Wavelengths above original_length / this are stretched in full.
        high_freq_factor: Those below original_length / this are left alone.
        original_length: The context the frequencies were made for.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP.

    Attributes:
        num_experts: Routed experts a layer.
        top_k: Experts a token goes to.
        expert_size: Width of an expert.
        router: "softmax" over all experts, the largest k chosen (Qwen3), or a "sigmoid" each
            (GLM-4.5, DeepSeek-V3).
        normalise_top_k: Whether the chosen weights are made to sum to 1.
        shared_size: Width of the expert that every token goes to; 0 for none.
        dense_layers: Leading layers that keep an MLP.
        scaling_factor: The routed experts' output is multiplied by it.
        router_bias: Whether each expert has a bias that is added to its score for the choice
            only, never to its weight: what balances load without a loss (Wang et al. 2024).
    """

    num_experts: int
    top_k: int
    expert_size: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise_top_k: bool = True
    shared_size: int = 0
    dense_layers: int = 0
    scaling_factor: float = 1.0
    router_bias: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.num_experts:
            raise UserError(
                f"model.moe: top_k={self.top_k} must lie between 1 and num_experts="
                f"{self.num_experts}."
            )


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
        intermediate_size: Width of the MLP of dense layers.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added inside the root of RMSNorm.
        tie_embeddings: Whether output and input embeddings are one.
        qk_norm: Whether queries and keys are RMS-normalised a head (Qwen3).
        attention_bias: Whether queries, keys and values have biases (GLM-4.5).
        rotary_fraction: The part of a head, from its start, that positions rotate.
        rope_scaling: Stretched rotary frequencies (Llama 3.1), or None.
        moe: The mixture of experts, or None for an MLP in every layer.
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
    attention_bias: bool = False
    rotary_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"model: rotary positions need an even part of head_dim={self.head_dim}, not "
                f"rotary_fraction={self.rotary_fraction} of it."
            )
        if self.moe and not 0 <= self.moe.dense_layers < self.num_layers:
            raise UserError(
                f"model.moe: dense_layers={self.moe.dense_layers} must be less than "
                f"num_layers={self.num_layers}."
            )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head positions rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def dense_layers(self) -> int:
        """Leading layers with an MLP; all of them without experts."""
        return self.moe.dense_layers if self.moe else self.num_layers

    @property
    def fingerprint(self) -> str:
        """Identifies the architecture; a checkpoint of another one is refused."""
        return content_hash(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """The numbers as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "DecoderConfig":
        """Reads what `to_json` wrote.

        Raises:
            TypeError: A field is missing or unknown.
        """
        scaling, moe = fields.get("rope_scaling"), fields.get("moe")
        nested = {
            "rope_scaling": RopeScaling(**scaling) if scaling else None,
            "moe": MoeConfig(**moe) if moe else None,
        }
        return cls(**{**fields, **nested})


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how.

    Attributes:
        rank: Columns of A and rows of B.
        alpha: What an adapter gives is multiplied by alpha / rank.
        targets: Names of the matrices.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank

    @property
    def name(self) -> str:
        """Identifies the adapters; a checkpoint of others is refused."""
        return f"rank {self.rank}, alpha {self.alpha:g}, {' '.join(sorted(self.targets))}"

    def to_json(self) -> dict[str, Any]:
        """The numbers as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "LoraConfig":
        """Reads what `to_json` wrote.

        Raises:
            TypeError: A field is missing or unknown.
        """
        return cls(**{**fields, "targets": tuple(fields["targets"])})
