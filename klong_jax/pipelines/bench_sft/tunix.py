"""A peer on JAX: Tunix's Qwen3 under its own trainer's step, every window whole.

Run where `google-tunix` is installed; klong_jax does not ask for it.
"""

import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.errors import JaxRuntimeError

from klong_jax.models.config import DecoderConfig, DTypes
from klong_jax.parallel.aot import exhausted
from klong_jax.pipelines.bench_sft.job import Job, Outcome, answer


def contend(job: Job) -> Outcome:
    """Steps of a `PeftTrainer` on all parameters, accumulating over windows as optax does."""
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    model = qwen3.Qwen3(_config(qwen3, job.model, job.dtypes, job.way["remat"]), rngs=nnx.Rngs(0))
    settings = TrainingConfig(
        eval_every_n_steps=1 << 30, gradient_accumulation_steps=job.work.windows
    )
    trainer: Any = PeftTrainer(model, optax.adamw(1e-4), settings)
    train_step, _ = trainer.jit_train_and_eval_step()
    length = job.work.prefix + job.work.window
    rest = {
        "input_mask": jnp.arange(length)[None] >= job.work.prefix,
        "positions": jnp.arange(length)[None],
        "attention_mask": jnp.tril(jnp.ones((length, length), bool))[None],
    }
    rows = [row[None] for row in job.work.rows(job.model.vocab_size)]

    def step(rows: list[np.ndarray]) -> float:
        losses = [train_step({"input_tokens": row, **rest})[0] for row in rows]
        return float(np.mean(jax.device_get(losses)))

    try:
        step(rows[:1])
        times = []
        for _ in range(job.repeats):
            started = time.perf_counter()
            loss = step(rows)
            times.append(time.perf_counter() - started)
    except JaxRuntimeError as error:
        if not exhausted(error):
            raise
        return Outcome(None)
    stats = jax.devices()[0].memory_stats() or {}
    return Outcome(median(times), int(stats.get("peak_bytes_in_use", 0)), loss)


def _config(qwen3: Any, model: DecoderConfig, dtypes: DTypes, remat: str) -> Any:
    return qwen3.ModelConfig(
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        embed_dim=model.hidden_size,
        hidden_dim=model.intermediate_size,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        rope_theta=int(model.rope_theta),
        norm_eps=model.norm_eps,
        use_tied_embedding=model.tie_embeddings,
        remat_config=qwen3.RematConfig[remat],
        dtype=jnp.dtype(dtypes.compute),
        param_dtype=jnp.dtype(dtypes.params),
    )


if __name__ == "__main__":
    answer(contend)
