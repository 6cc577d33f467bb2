"""The attention operator and its explicit derivatives."""

from .sdpa import Gradients, Hvp, Jvp, Vjp, sdpa, sdpa_hvp, sdpa_jvp, sdpa_vjp

__all__ = ["Gradients", "Hvp", "Jvp", "Vjp", "sdpa", "sdpa_hvp", "sdpa_jvp", "sdpa_vjp"]
