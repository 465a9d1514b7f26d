"""One-step text-to-image diffusion by SwiftBrush v2 distillation, in JAX."""
