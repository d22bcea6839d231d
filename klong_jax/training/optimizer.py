"""The optimiser: Muon on matrices and AdamW on the rest, or AdamW on everything."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax
from optax import contrib

from klong_jax.models.decoder import Params
from klong_jax.models.routing import is_router_bias
from klong_jax.training.average import with_average
from klong_jax.training.frozen import Selection
from klong_jax.training.offload import Offloaded, Optimizer
from klong_jax.training.schedules import Schedule, make_schedule


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        kind: "muon" (Jordan 2024; matrices orthogonalised, the rest by AdamW) or "adamw".
        learning_rate: Peak rate; under Muon that of the matrices.
        warmup_steps: Steps of linear warm-up.
        total_steps: Steps until the rate ends at a tenth of the peak; 0 keeps it constant.
        adam_ratio: Rate of the AdamW part as a share of Muon's.
        b2: Second-moment decay of AdamW.
        weight_decay: Decoupled decay.
        clip_norm: Largest global norm of the gradient.
        schedule: How the rate goes after the warm-up; see `make_schedule`.
        decay_share: The share of all steps over which "wsd" falls.
        frozen: Patterns of the names of parameters that are left as they are.
        learnt: Patterns of names outside of which all parameters are left so too.
        ema_decay: What the moving average of the parameters keeps of itself at each step; 0 makes
            none.
        offload: Whether the optimiser's state is held in the host's memory.
    """

    kind: Literal["muon", "adamw"] = "adamw"
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    total_steps: int = 0
    adam_ratio: float = 0.3
    b2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    schedule: Schedule = "cosine"
    decay_share: float = 0.2
    frozen: tuple[str, ...] = ()
    learnt: tuple[str, ...] = ("*",)
    ema_decay: float = 0.0
    offload: bool = False

    @property
    def selection(self) -> Selection:
        """Which parameters the optimiser is given."""
        return Selection(self.frozen, self.learnt)


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """Builds what updates the parameters that are learnt as the config says."""

    def schedule(ratio: float) -> optax.Schedule:
        return make_schedule(
            config.schedule,
            config.learning_rate * ratio,
            config.warmup_steps,
            config.total_steps,
            config.decay_share,
        )

    if config.kind == "muon":
        update = contrib.muon(
            schedule(1.0),
            weight_decay=config.weight_decay,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=schedule(config.adam_ratio),
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        update = optax.adamw(schedule(1.0), b2=config.b2, weight_decay=config.weight_decay)
    clip = optax.clip_by_global_norm(config.clip_norm)
    # Weight decay would pull at the routers' biases, though no gradient reaches them.
    kept = optax.masked(optax.set_to_zero(), _router_biases)
    chain = (update, kept) if config.offload else (clip, update, kept)
    optimizer = optax.chain(*chain)
    if config.ema_decay:
        optimizer = with_average(optimizer, config.ema_decay)
    return Offloaded(clip, optimizer) if config.offload else optimizer


def _router_biases(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_router_bias(path), params)


def _matrices(params: Params) -> Params:
    """Marks what Muon takes: embeddings, and each layer of the stacked kernels."""

    def mark(path: tuple[object, ...], value: jax.Array) -> contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            return contrib.MuonDimensionNumbers(value.ndim - 2, value.ndim - 1)
        if "embedding" in name:
            return contrib.MuonDimensionNumbers(0, 1)
        return None

    return jax.tree_util.tree_map_with_path(mark, params)
