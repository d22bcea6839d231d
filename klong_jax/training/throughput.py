"""How fast a step was, from what it did and how long that took."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from klong_jax.core.trajectory import Window
from klong_jax.models.config import DecoderConfig
from klong_jax.models.cost import prefix_sharing_flops, training_flops
from klong_jax.parallel.topology import CHIPS
from klong_jax.training.batches import Group, Layout, SharedBatch, WindowBatch

# Dense bf16 operations a second by the names that JAX gives devices. NVIDIA's are of the data
# sheets of the SXM parts.
_PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True)
class Meter:
    """Measures the steps of one run.

    Attributes:
        model: The decoder's numbers.
        devices: How many devices work on a step.
        peak_flops: Operations a second of one of them at most; None if that is not known.
        learnt: The share of the parameters that are learnt.
    """

    model: DecoderConfig
    devices: int
    peak_flops: float | None
    learnt: float = 1.0

    @classmethod
    def of_devices(
        cls, model: DecoderConfig, devices: int, kind: str, learnt: float = 1.0
    ) -> "Meter":
        """A meter for so many devices of a kind, such as "TPU v5p"."""
        return cls(model, devices, _PEAK_FLOPS.get(kind), learnt)

    def rates(
        self, groups: Sequence[Group], layout: Layout, seconds: float, waited: float
    ) -> dict[str, float]:
        """What a step on groups of windows says of its speed.

        Args:
            groups: What was trained on.
            layout: What of them was computed once.
            seconds: How long the step took.
            waited: Seconds of them in which there was no data to work on.

        Returns:
            `trained_tokens_per_s`; `trajectory_tokens_per_s`, in which what a window repeats of
            the one before it does not count; `waiting_share` of the time; and, where the peak is
            known, `mfu`: counted operations, without padding or what rematerialisation repeats, as
            a share of the peak.
        """
        windows = [window for group in groups for window in group]
        trained = sum(int(window.trained_mask.sum()) for window in windows)
        rates = {
            "trained_tokens_per_s": trained / seconds,
            "trajectory_tokens_per_s": sum(map(fresh_tokens, windows)) / seconds,
            "waiting_share": waited / seconds,
        }
        if self.peak_flops is not None:
            done = step_flops(self.model, groups, layout, self.learnt)
            rates["mfu"] = done / seconds / (self.devices * self.peak_flops)
        return rates


def step_flops(
    model: DecoderConfig, groups: Sequence[Group], layout: Layout, learnt: float = 1.0
) -> float:
    """Operations of the forward and backward pass over groups of windows.

    Attention counts only pairs that see each other, and no matrix that is frozen a gradient.
    """
    total = 0.0
    for group in groups:
        lengths = [len(window.tokens) for window in group]
        if shared := layout.shared_by(group):
            fresh = [length - shared for length in lengths]
            _, done = prefix_sharing_flops(
                model, shared, fresh, prefix_trained=layout.trained, learnt=learnt
            )
            total += done
        else:
            total += sum(training_flops(model, length, 0, length, learnt) for length in lengths)
    return total


def fresh_tokens(window: Window) -> int:
    """Tokens by which a window takes its trajectory further.

    All of a first window; of a later one those from its first trained token on.
    """
    if window.index == 0:
        return len(window.tokens)
    first = int(window.trained_mask.argmax())
    return len(window.tokens) - first if window.trained_mask[first] else 0


def padding_share(batches: Sequence[WindowBatch | SharedBatch]) -> float:
    """The share of the positions of micro-batches, as they are on the host, that is padding.

    As the experts' load counts them: what follows the last trained token of a window is padding.
    """
    computed = real = 0
    for batch in batches:
        if isinstance(batch, SharedBatch):
            tokens = batch.prefix.tokens
            computed += tokens.size
            real += np.count_nonzero(batch.prefix.weight) * tokens.shape[1]
        for part in batch.windows if isinstance(batch, SharedBatch) else (batch,):
            computed += part.tokens.size
            real += _real_count(part)
    return 1 - real / computed


def _real_count(batch: WindowBatch) -> int:
    if batch.segments is not None:
        return int(np.count_nonzero(batch.segments))
    backwards = batch.trained[:, ::-1] > 0
    return int(np.logical_or.accumulate(backwards, axis=1).sum())
