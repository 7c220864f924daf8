"""What factors lack that another program has computed: certificates, and the hashes of the weights they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .errors import FactorFileError
from .factors import Certificate, Factors
from .kernels.streaming import losses
from .model.checkpoint import open_checkpoint
from .model.location import located
from .model.needed import tensors_of_modules, tensors_read
from .solvers.optimum import optimum


def certified(factors: Mapping[str, Factors], base: str | Path) -> dict[str, Factors]:
    """The factors, named as the model names its modules, with certificates and the sha256 of their weights.

    base: the model that they were computed from; each W is read once. `convert` and the exports refuse factors without
        a sha256, as nothing else says which model they belong to.

    Raises FactorFileError if they are another model's, and CheckpointError.
    """
    base = located(base)
    # Of a sharded model on the hub, the shards that hold these weights, and no others.
    checkpoint = open_checkpoint(base, choose=tensors_read(factors, str(base)))
    tensors = tensors_of_modules(checkpoint.tensors, list(factors), str(base))
    found = {}
    for module, part in factors.items():
        tensor = tensors[module]
        W = checkpoint.read(tensor)
        shape = (part.B.shape[0], part.A.shape[1])
        if W.shape != shape:
            raise FactorFileError(
                f"{base}: {tensor} is {tuple(W.shape)}, but the factors' product is {shape}; give their base"
            )
        energy, (loss,) = losses(W, [(part.A, part.B)])
        least = optimum(W, part.rank)
        certificate = Certificate(loss, least.loss, energy, part.certificate.steps, least.certified)
        found[tensor.removesuffix(".weight")] = replace(
            part, certificate=certificate, source_sha256=checkpoint.sha256(tensor)
        )
    return found
