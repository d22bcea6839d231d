"""Settings of what programs run on: processes, mesh, kernels; and compiling ahead of time."""

from math import prod
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from klong_jax.core.errors import UserError
from klong_jax.models.config import Remat
from klong_jax.pipelines.config.section import Section

if TYPE_CHECKING:
    from klong_jax.parallel.distributed import Place
    from klong_jax.parallel.mesh import MeshShape


class MeshSection(Section):
    """Devices along each axis of the mesh; 0 takes what the other axes leave, for one axis."""

    data: int = Field(ge=0)
    """Replicas of everything; windows are spread over them."""
    fsdp: int = Field(ge=0)
    """Windows, parameters and the optimiser's state are spread over it."""
    expert: int = Field(ge=0)
    """Experts are spread over it; to other layers it is a second fsdp."""
    context: int = Field(ge=0)
    """The tokens of one window are spread over it."""
    tensor: int = Field(ge=0)
    """Heads, MLP columns and vocabulary are spread over it."""

    def shape(self, devices: int) -> "MeshShape":
        """The sizes on so many devices.

        Raises:
            UserError: They cannot be filled in.
        """
        # Imported on use: commands that train nothing start without JAX.
        from klong_jax.parallel.mesh import MeshShape

        sizes = self.model_dump()
        open_axes = [axis for axis, size in sizes.items() if size == 0]
        rest, over = divmod(devices, prod(size for size in sizes.values() if size))
        if len(open_axes) > 1 or (open_axes and (over or not rest)):
            taken = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
            raise UserError(
                f"mesh: {' and '.join(f'mesh.{axis}=0' for axis in open_axes)} cannot take what "
                f"{taken or 'nothing'} leaves of {devices} devices; leave one axis open and give "
                "sizes whose product divides them."
            )
        return MeshShape(**{**sizes, **dict.fromkeys(open_axes, rest)})


class KernelsSection(Section):
    """Backend of each kernel; null chooses by platform and shape."""

    attention: str | None
    """Such as reference or cpu, which run everywhere."""
    grouped_matmul: str | None
    """Such as reference, cpu or xla, which run everywhere; hopper or triton on GPUs."""
    linear_cross_entropy: str | None
    """reference, which holds all logits at once; xla; hopper on such GPUs."""
    rotary_norm: str | None
    """reference, which runs everywhere; triton on GPUs."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if not self.chosen():
            return self
        # Imported on use: commands that train nothing start without JAX.
        from klong_jax.kernels.attention import api as attention
        from klong_jax.kernels.grouped_matmul import api as grouped_matmul
        from klong_jax.kernels.linear_cross_entropy import api as linear_cross_entropy
        from klong_jax.kernels.rotary_norm import api as rotary_norm

        known = {
            "attention": attention.BACKENDS,
            "grouped_matmul": grouped_matmul.BACKENDS,
            "linear_cross_entropy": linear_cross_entropy.BACKENDS,
            "rotary_norm": rotary_norm.BACKENDS,
        }
        for kernel, backend in self.chosen().items():
            if backend not in known[kernel]:
                raise UserError(
                    f"kernels.{kernel}={backend}: there is no such backend; choose one of "
                    f"{', '.join(known[kernel])}, or null."
                )
        return self

    def chosen(self) -> dict[str, str]:
        """Kernel name to backend name, of those that do not choose themselves."""
        return {kernel: backend for kernel, backend in self.model_dump().items() if backend}


class ProcessesSection(Section):
    """The processes of a run on many hosts; each is started with the same other settings.

    Slurm, Open MPI, Kubernetes TPU pods and JAX's own variables are recognised without them.
    """

    cluster: bool
    """Let JAX find the other processes, as on the hosts of a Cloud TPU pod."""
    coordinator: str | None = Field(pattern=r"^.+:\d+$")
    """HOST:PORT of the first process; null if there is one process or JAX finds the others."""
    count: int | None = Field(gt=0)
    """How many processes there are."""
    index: int | None = Field(ge=0)
    """Which of them this is, from 0."""

    @model_validator(mode="after")
    def _says_all(self) -> Self:
        given = (self.coordinator, self.count, self.index)
        if any(value is not None for value in given) and None in given:
            raise UserError(
                "processes: coordinator, count and index say together which process this is; give "
                "all three or none."
            )
        if self.count is not None and self.index is not None and self.index >= self.count:
            raise UserError(
                f"processes.index={self.index}: must be below processes.count={self.count}."
            )
        return self

    def place(self) -> "Place | None":
        """Which process this is, if that is said here."""
        from klong_jax.parallel.distributed import Place

        if self.coordinator is None or self.count is None or self.index is None:
            return None
        return Place(self.coordinator, self.count, self.index)


class AotConfig(Section):
    """Compiles training and serving for TPUs that are not here, and says whether they fit."""

    model: str
    """A model by name, such as qwen3_8b or glm45_air."""
    topology: str
    """Generation and chips along each dimension, such as v5p:4x8x8 or v5e:8x8."""
    step: Literal["sft", "rl", "prefill", "decode"]
    """What is compiled: a training step, or a call of the engine with a full cache."""
    prefix: int = Field(ge=0)
    """Tokens of the pinned prefix."""
    window: int = Field(gt=0)
    """Tokens after it."""
    shared_prefix: int = Field(ge=0)
    """Tokens of the prefix that a training step computes once for all windows of a trajectory; 0
    computes windows whole."""
    together: int = Field(gt=0)
    """How many windows of a trajectory that is."""
    rows: int = Field(ge=0)
    """Windows of a micro-batch or sequences that are served; 0 is one for each place of data, fsdp
    and expert."""
    mesh: MeshSection
    kernels: KernelsSection
    remat: Remat
    """What a layer keeps for its backward pass."""
    optimizer: Literal["adamw", "muon"]
    """How parameters are updated."""
    chunk: int = Field(gt=0)
    """Prompt tokens a row and prefill call."""
    decode_steps: int = Field(gt=0)
    """Tokens sampled a call."""
    fit: Literal["given", "smallest"]
    """smallest looks for the smallest slice of the topology's generation that fits."""
    buffers: bool
    """List the largest buffers even if everything fits."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.shared_prefix > self.prefix:
            raise UserError(
                f"shared_prefix={self.shared_prefix}: must be at most prefix={self.prefix}."
            )
        if self.shared_prefix and self.step not in ("sft", "rl"):
            raise UserError(
                f"shared_prefix={self.shared_prefix}: is of training; set step=sft or rl, or leave "
                "it out."
            )
        return self
