"""Factors in training: a PyTorch layer, PEFT, and the way back to a plain LoRA or a full model."""
