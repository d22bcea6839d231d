"""What the tests of training's gradients share: models, objectives, sums over groups of windows."""

from collections.abc import Sequence
from functools import cache

import jax
import numpy as np

from klong_jax.models.config import DecoderConfig, DTypes, MoeConfig, Remat
from klong_jax.models.decoder import build
from klong_jax.rl.loss import RlLossConfig, rl_loss
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer
from klong_jax.training.batches import Group, Layout, lay_out
from klong_jax.training.frozen import Selection
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

LIMIT, VOCAB = 48, 50
MIXTURE = MoeConfig(8, 2, 16, "sigmoid", shared_size=16, dense_layers=1, router_bias=True)
MODELS = {
    "tied": DecoderConfig(VOCAB, 16, 2, 4, 2, 8, 32),
    "mixture": DecoderConfig(VOCAB, 16, 3, 4, 2, 8, 32, tie_embeddings=False, moe=MIXTURE),
}
OPTIMIZER = make_optimizer(OptimizerConfig("adamw", 1e-2))


@cache
def trainer(
    model: str, dtype: str, remat: Remat, objective: str, frozen: tuple[str, ...] = ()
) -> tuple[Trainer, object]:
    graph, params = build(MODELS[model], 0, DTypes(dtype, dtype))
    if objective == "rl":
        loss = rl_loss(graph, RlLossConfig(kl_beta=0.1, temperature=0.7), remat=remat)
    else:
        loss = sft_loss(graph, remat=remat)
    return Trainer(loss, OPTIMIZER, selection=Selection(frozen)), params


def gradients(
    groups: Sequence[Group],
    layout: Layout,
    *,
    model: str = "tied",
    dtype: str = "float64",
    remat: Remat = "none",
    objective: str = "sft",
    frozen: tuple[str, ...] = (),
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Summed gradients and logs of groups, each with a weight of its own."""
    with jax.enable_x64(dtype == "float64"):
        made, params = trainer(model, dtype, remat, objective, frozen)
        weights = np.linspace(-1, 1.5, len(groups)).tolist()
        total = None
        for batch in lay_out(groups, weights, layout):
            total = made.add(params, total, batch)
        grads, logs = total
        return [np.asarray(leaf) for leaf in jax.tree.leaves(grads)], {
            name: np.asarray(value) for name, value in logs.items()
        }


def off(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest entry of its tensor."""
    return max(
        float(np.abs(a - b).max() / (np.abs(b).max() or 1))
        for a, b in zip(found, expected, strict=True)
    )


def listening(compiled: list[str]) -> None:
    """Notes every compilation from now on, until listeners are cleared."""

    def listen(event: str, duration: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
