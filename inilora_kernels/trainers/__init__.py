"""Doors of trainers that make the PeftModel themselves: what starts its LoRA from factors all the same."""
