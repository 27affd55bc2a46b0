"""Presets of recipes: what several encoders share, as data."""
