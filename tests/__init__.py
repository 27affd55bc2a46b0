"""Tests mirror the rooms; `reference.py` holds the slow, obvious twins."""
