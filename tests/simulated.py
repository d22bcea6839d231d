"""Processes in which the CPU stands for several devices, whose number is fixed at their start."""

import os


def devices(count: int) -> str:
    """`XLA_FLAGS` of such a process.

    Most of its time is the compiler's. What is compared are meshes, each of which compiles all
    anew, so fusions go through the emitter that does not set up a compiler for each of them: half
    the time. It is for these programs alone, which the same test compares with others' numbers:
    elsewhere it was seen to give wrong gradients.
    """
    return (
        f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false "
        f"--xla_force_host_platform_device_count={count}"
    )
