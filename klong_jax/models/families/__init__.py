"""The families of models that are read from and written for Hugging Face, a small file each."""

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig
from klong_jax.models.families.base import Family, HfConfig
from klong_jax.models.families.glm4_moe import GLM4_MOE
from klong_jax.models.families.llama import LLAMA
from klong_jax.models.families.qwen3 import QWEN3
from klong_jax.models.families.qwen3_moe import QWEN3_MOE

FAMILIES = {family.model_type: family for family in (QWEN3, QWEN3_MOE, LLAMA, GLM4_MOE)}


def family_of_hf(config: HfConfig) -> Family:
    """The family of a config.json.

    Raises:
        UserError: No family reads its model type.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type is {kind!r}; the known ones are {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def family_of(config: DecoderConfig) -> Family:
    """The family that a decoder can be written as.

    Raises:
        UserError: No architecture of Hugging Face's that klong knows computes the same.
    """
    for family in FAMILIES.values():
        if family.expresses(config):
            return family
    raise UserError(
        "model: no Hugging Face architecture among "
        f"{', '.join(FAMILIES)} computes what this decoder does; export another one."
    )
