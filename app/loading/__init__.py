"""Loaders: what comes from outside, decoded, validated and published, one module a format."""
