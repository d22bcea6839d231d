"""Where a decoder's parameters go before there are any: shapes, dtypes and shardings."""

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from klong_jax.models.config import DecoderConfig, DTypes, LoraConfig
from klong_jax.models.decoder import Decoder, Params, abstract
from klong_jax.models.lora import abstract_adapted
from klong_jax.parallel.rules import param_shardings


def placed(
    config: DecoderConfig, dtypes: DTypes, mesh: Mesh | None, lora: LoraConfig | None = None
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The graph and the parameters' shapes, to be read onto a mesh or, without one, one device.

    Args:
        config: The decoder's numbers.
        dtypes: Its precisions.
        mesh: Where its parameters go; one device if None.
        lora: The adapters beside them, if there are any.

    Raises:
        UserError: The mesh does not divide a parameter.
    """
    graph, params = abstract_adapted(config, lora, dtypes) if lora else abstract(config, dtypes)
    if mesh is None:
        alone = SingleDeviceSharding(jax.devices()[0])
        return graph, jax.tree.map(lambda leaf: leaf.update(sharding=alone), params)
    shardings = param_shardings(params, mesh)
    return graph, jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), params, shardings
    )
