"""The names of the database roles, for revisions that grant rights."""

from __future__ import annotations

import re

from alembic import context


def role(name: str) -> str:
    """A role of ours under the prefix in use. Raises ValueError where the prefix is no lower-case identifier."""
    prefix = context.config.attributes.get("role_prefix", "lachesis")
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", prefix):
        raise ValueError(
            f"Expected lower-case letters, digits and underscores in LACHESIS_ROLE_PREFIX, found {prefix!r}."
        )
    return f"{prefix}_{name}"
