"""Tensors, never rows: encoders, objectives, survival heads and metrics."""
