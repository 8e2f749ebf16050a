"""How many weights are zero, as pruning leaves them; they are stored, read and multiplied like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import CheckpointError
from pronghorn.weights.types import FORMATS, Parameter, Tensor, sides


def sparsity(parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The share of zeros in matrices, and how many of them are 2:4: of each four inputs, two or more are zero.

    Reads all matrices, one at a time (Mishra et al. 2021, arXiv:2104.08378, for 2:4).
    """
    import numpy as np

    from pronghorn._native import Pool, pack
    from pronghorn.machine import usable_processors

    pool = Pool(usable_processors())
    n_weights = n_zeros = n_matrices = n_two_of_four = 0
    for name, parameter in parameters.items():
        if parameter.kind != "matrix":
            continue
        tensor = tensors[name]
        if tensor.dtype in FORMATS:
            raise CheckpointError(f"tensor {tensor.name} is {tensor.dtype}: zeros are counted before quantizing")
        values = np.empty(parameter.shape, np.float32)
        try:
            pack(tensor.data, tensor.dtype, *sides(parameter), False, values.data.cast("B"), "f32", 0, False, pool)
        except ValueError as error:
            raise CheckpointError(f"tensor {tensor.name} ({tensor.dtype}) {error}") from None
        zero = (values.T if parameter.transposed else values) == 0  # [n_out, n_in]
        whole = zero.shape[1] // 4 * 4
        n_matrices += 1
        n_weights += zero.size
        n_zeros += int(np.count_nonzero(zero))
        n_two_of_four += bool((zero[:, :whole].reshape(len(zero), -1, 4).sum(2, dtype=np.uint8) >= 2).all() and whole)
    return {"zeros": n_zeros / n_weights, "matrices": n_matrices, "two_of_four": n_two_of_four}
