"""Plugins and callbacks that start the LoRA from factors in trainers that make the PeftModel themselves."""
