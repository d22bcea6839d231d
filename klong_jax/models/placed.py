"""Where a decoder's parameters go before there are any: shapes, dtypes and shardings."""

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from klong_jax.models.config import DecoderConfig, DTypes
from klong_jax.models.decoder import Decoder, Params, abstract
from klong_jax.parallel.rules import param_shardings


def placed(
    config: DecoderConfig, dtypes: DTypes, mesh: Mesh | None
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The graph and the parameters' shapes, to be read onto a mesh or, without one, one device.

    Raises:
        UserError: The mesh does not divide a parameter.
    """
    graph, params = abstract(config, dtypes)
    if mesh is None:
        alone = SingleDeviceSharding(jax.devices()[0])
        return graph, jax.tree.map(lambda leaf: leaf.update(sharding=alone), params)
    shardings = param_shardings(params, mesh)
    return graph, jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), params, shardings
    )
