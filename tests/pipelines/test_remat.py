"""The policy of rematerialisation follows from what the compiler says of memory."""

import json
from functools import cache
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Window
from klong_jax.models.config import DecoderConfig, Remat
from klong_jax.models.decoder import build
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import use_mesh
from klong_jax.pipelines import remat as chosen
from klong_jax.pipelines.remat import Step, fitting_trainer, least_bytes, needed_bytes
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, abstract_state, init_state
from klong_jax.training.batches import Layout, lay_out
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

CONFIG = DecoderConfig(64, 32, 2, 4, 2, 8, 64)
LENGTH = 512
OPTIMIZER = make_optimizer(OptimizerConfig("adamw"))
GRAPH, PARAMS = build(CONFIG, 0)
PARAMS_BYTES = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))


@cache
def trainer(remat: Remat) -> Trainer:
    # Kept, so that what was compiled once is not compiled again here.
    return Trainer(sft_loss(GRAPH, remat=remat), OPTIMIZER)


def step(shared: int = 0, pack: bool = False) -> Step:
    layout = Layout(LENGTH, 2, (shared,), whole=False, pack=pack)
    return Step(trainer, CONFIG, "float32", abstract_state(PARAMS, OPTIMIZER), [layout])


def choose(folder: Path, made: Step | None = None) -> tuple[Trainer, str]:
    said = StringIO()
    console = Console(file=said, width=1000)
    return fitting_trainer("auto", made or step(), folder, console), said.getvalue()


def test_what_repeats_least_and_fits_is_taken_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_mesh(make_mesh(MeshShape())):
        most, less = (needed_bytes(step(), trainer(remat)) for remat in ("none", "attention"))
        assert most and less and least_bytes(step(), "attention") <= less < 0.9 * most

        monkeypatch.setattr(chosen, "free_memory", lambda: int(less / 0.94))
        made, why = choose(tmp_path)
        assert made is trainer("attention")
        assert why.startswith("remat=attention: none needs ")

        # Another time there is less memory, or a device that was not there before.
        monkeypatch.setattr(chosen, "free_memory", lambda: PARAMS_BYTES)
        made, why = choose(tmp_path)
        assert (made, why) == (trainer("attention"), "remat=attention, as when the run began\n")
        file = tmp_path / "remat.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "on": {**known["on"], "device": "another"}}))
        said = r"under no policy \(none needs at least .* full needs at least .* mesh\.\*"
        with pytest.raises(UserError, match=said):
            choose(tmp_path)
        monkeypatch.setattr(chosen, "free_memory", lambda: None)
        made, why = choose(tmp_path)
        assert made is trainer("full")
        assert "how much memory a device has is not known" in why
        assert json.loads(file.read_text())["on"] == known["on"]


def test_what_is_compiled_for_the_choice_is_what_runs(tmp_path: Path) -> None:
    compiled: list[str] = []

    def listen(event: str, duration: float, *, fun_name: str = "", **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with use_mesh(make_mesh(MeshShape())):
            made, why = choose(tmp_path, step(shared=128))
            assert why.startswith("remat=none: none needs ")
            assert compiled == ["jit(read)", "jit(after)", "jit(back)"]  # update was there already
            compiled.clear()
            tokens, unused = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.float32)
            trained = np.arange(LENGTH) >= 128
            window = Window(0, 128, tokens, trained, unused, unused.astype(np.int32), LENGTH)
            state = init_state(jax.tree.map(jnp.copy, PARAMS), OPTIMIZER)
            batches = lay_out([(window,) * 3], [1.0], step(shared=128).layouts[0])
            state, _ = made.step(state, batches, 1.0)
            programs = {"accumulate", "read", "after", "back", "update"}
            assert not programs & {name[4:-1] for name in compiled}

            # Windows that share rows are another shape.
            compiled.clear()
            needed_bytes(packed := step(pack=True), made)
            assert compiled == ["jit(accumulate)"]
            compiled.clear()
            made.step(state, lay_out([(window,) * 3], [1.0], packed.layouts[0]), 1.0)
            assert not programs & {name[4:-1] for name in compiled}
    finally:
        jax.monitoring.clear_event_listeners()


def test_what_is_frozen_has_no_gradient_and_what_the_host_holds_takes_no_memory() -> None:
    config = OptimizerConfig("adamw", frozen=("embedding", "blocks.*.kernel"), offload=True)
    optimizer, selection = make_optimizer(config), config.selection
    made = Trainer(sft_loss(GRAPH, remat="none"), optimizer, selection=selection)
    layout = Layout(16, 2)
    programs: set[str] = set()

    def listen(event: str, duration: float, *, fun_name: str = "", **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            programs.add(fun_name)

    with use_mesh(make_mesh(MeshShape())):
        state = abstract_state(PARAMS, optimizer, selection)
        learnt = sum(x.nbytes for x in jax.tree.leaves(selection.split(PARAMS)[0]))
        partial = Step(lambda _: made, CONFIG, "float32", state, [layout])
        # The optimiser's counter and the step are on the device, beside parameters and gradients.
        assert 0 < least_bytes(partial, "none") - PARAMS_BYTES - learnt <= 12
        assert needed_bytes(partial, made)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            tokens, unused = np.zeros(9, np.int32), np.zeros(9, np.float32)
            window = Window(0, 0, tokens, tokens == 0, unused, tokens, 9)
            real = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer, selection)
            for _ in range(2):
                real, _ = made.step(real, lay_out([(window,)], [1.0], layout), 1.0)
            assert not {"jit(accumulate)", "jit(update)"} & programs
        finally:
            jax.monitoring.clear_event_listeners()
