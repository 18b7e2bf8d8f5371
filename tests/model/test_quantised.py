"""Quantised matrices, beside the library that made them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from jllama.adapt.quant import quantize
from jllama.model.quantised import dequantised


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("inputs,shape", [(1, (2, 256, 3, 40)), (2, (2, 3, 128, 40))])
def test_a_quantised_matrix_is_read_as_by_its_library(kind, inputs, shape):
    stacked = quantize(jax.random.normal(jax.random.key(0), shape), inputs, kind)
    matrix = jax.tree.map(lambda x: x[1], stacked)
    assert jnp.unique(matrix.qvalue.astype(jnp.int32)).size >= 15, "all values of 4 bits"
    wanted, got = (np.asarray(jax.jit(read)(matrix)) for read in (qwix.dequantize, dequantised))
    assert (got.dtype, got.shape) == (np.float32, shape[1:])
    np.testing.assert_array_equal(got.view(np.int32), wanted.view(np.int32))
