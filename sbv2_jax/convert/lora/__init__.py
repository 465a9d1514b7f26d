"""LoRA files read and written, fused into a model, extracted from one."""
