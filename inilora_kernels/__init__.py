"""LoRA factors that start from the pretrained weights: B·A ≈ W for every target matrix, with a certificate.

from inilora_kernels import approximate_model
factors = approximate_model("path/to/model", rank=8)
factors.save("factors.safetensors")
"""

from .approximate import approximate, approximate_model
from .errors import InitializationError
from .factors import Certificate, Factors, FactorSet

__all__ = ["Certificate", "FactorSet", "Factors", "InitializationError", "approximate", "approximate_model"]
