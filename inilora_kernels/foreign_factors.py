"""What factors lack that another program has computed: certificates, and the hashes of the weights they belong to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from .errors import FactorFileError, TargetError
from .factors import Certificate, Factors
from .kernels.streaming import losses
from .model.checkpoint import open_checkpoint
from .model.location import located
from .model.names import match_names
from .solvers.optimum import optimum


def certified(factors: Mapping[str, Factors], base: str | Path) -> dict[str, Factors]:
    """The factors, named as the model names its modules, with certificates and the sha256 of their weights.

    base: the model that they were computed from; each W is read once. `convert` and the exports refuse factors without
        a sha256, as nothing else says which model they belong to.

    Raises FactorFileError if they are another model's, and CheckpointError.
    """
    base = located(base)

    def names_in(tensors: Collection[str]) -> dict[str, str]:
        weights = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
        try:
            return match_names(list(factors), weights, str(base))
        except TargetError as error:
            raise FactorFileError(f"the factors are not of this model: {error}") from error

    def tensors_read(tensors: Collection[str], config: object) -> list[str]:
        return [f"{name}.weight" for name in names_in(tensors).values()]

    # Of a sharded model on the hub, the shards that hold these weights, and no others.
    checkpoint = open_checkpoint(base, choose=tensors_read)
    names = names_in(checkpoint.tensors)
    found = {}
    for module, part in factors.items():
        tensor = f"{names[module]}.weight"
        W = checkpoint.read(tensor)
        shape = (part.B.shape[0], part.A.shape[1])
        if W.shape != shape:
            raise FactorFileError(
                f"{base}: {tensor} is {tuple(W.shape)}, but the factors' product is {shape}; give their base"
            )
        energy, (loss,) = losses(W, [(part.A, part.B)])
        least = optimum(W, part.rank)
        certificate = Certificate(loss, least.loss, energy, part.certificate.steps, least.certified)
        found[names[module]] = replace(part, certificate=certificate, source_sha256=checkpoint.sha256(tensor))
    return found
