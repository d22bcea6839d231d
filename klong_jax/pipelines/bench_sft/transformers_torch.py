"""The peer that most people would take: Hugging Face transformers on torch, every window whole."""

import time
from statistics import median
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from klong_jax.models.config import DecoderConfig
from klong_jax.pipelines.bench_sft.job import Job, Outcome, answer


def contend(job: Job) -> Outcome:
    """Steps with torch's fused AdamW; parameters, gradients and moments in the compute dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(getattr(torch, job.dtypes.compute))
    with torch.device(device):
        model: Any = Qwen3ForCausalLM._from_config(_config(job.model), attn_implementation="sdpa")
    model.train()
    if job.way["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if job.way["compile"]:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = [torch.tensor(row, dtype=torch.long, device=device)[None]
            for row in job.work.rows(job.model.vocab_size)]  # fmt: skip
    trained = job.work.window * job.work.windows

    def step(rows: list[torch.Tensor]) -> float:
        total = 0.0
        for row in rows:
            labels = row.clone()
            labels[:, : job.work.prefix] = -100
            out = model(input_ids=row, labels=labels, num_items_in_batch=trained, use_cache=False)
            out.loss.backward()
            total += float(out.loss.detach())
            del out
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    try:
        # One window is enough to warm up: all have the same shape.
        step(rows[:1])
        times, loss = [], 0.0
        for _ in range(job.repeats):
            _wait(device)
            started = time.perf_counter()
            loss = step(rows)
            _wait(device)
            times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return Outcome(None)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Outcome(median(times), peak, loss)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _config(model: DecoderConfig) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
    )


if __name__ == "__main__":
    answer(contend)
