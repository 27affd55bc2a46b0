"""Rows, never tensors: settings, servers, schema, loading, the store and the command line."""

__version__ = "0.1.0"
