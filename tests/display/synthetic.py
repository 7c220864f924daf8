"""Factor sets with the names and shapes of real models, and synthetic certificates."""

from __future__ import annotations

import torch

from inilora_kernels.factors import Certificate, Factors

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def one(
    error: float = 0.85, least: float = 0.85, *, rank: int = 8, shape: tuple[int, int] = (24, 16), curve: bool = False
) -> Factors:
    """A matrix of energy 4 of which BA leaves `error`, where `least` is the least that the rank allows."""
    history = tuple((step, 4 * (least + 0.5 / step)) for step in (1, 10, 100, 1000)) if curve else ()
    return Factors(
        A=torch.zeros(rank, shape[1]),
        B=torch.zeros(shape[0], rank),
        certificate=Certificate(loss=4 * error, optimum=4 * least, energy=4.0, steps=1000 if curve else 0),
        source_sha256="",
        history=history,
        singular_values=tuple(1.0 / order for order in range(1, 13)),
    )


def all_linear(
    error: float = 0.85, least: float = 0.85, layers: int = 30, *, curve: bool = False
) -> dict[str, Factors]:
    """210 matrices, as all-linear finds them in a LLaMA of 30 layers."""
    return {
        f"model.layers.{layer}.{'self_attn' if kind in SEVEN[:4] else 'mlp'}.{kind}": one(error, least, curve=curve)
        for layer in range(layers)
        for kind in SEVEN
    }
