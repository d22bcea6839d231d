"""tau-bench results: a list of {"traj": [OpenAI messages], "task_id", "trial", "reward"}."""

from typing import Any

from klong_jax.text.formats.base import Format, Record, Recording
from klong_jax.text.formats.openai import read_messages


def _matches(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("traj"), list)


def _read(record: Record) -> Recording:
    value, place = record.value, record.place
    messages = read_messages(value, "traj", place)
    meta = {key: item for key, item in value.items() if key != "traj"}
    if "reward" in meta:
        meta["score"] = meta["reward"]
    named = "task_id" in meta
    trial = f"-trial{meta['trial']}" if "trial" in meta else ""
    return Recording(
        source=place,
        recording_id=f"task{meta['task_id']}{trial}" if named else record.name,
        messages=messages,
        meta=meta,
    )


TAU_BENCH = Format("tau-bench", _matches, _read)
