"""Tables and nothing else, one file a Postgres schema; `metadata` gathers them for the migrations' drift check."""

from app.schema import label, model, omop, ops
from app.schema.base import Base

metadata = Base.metadata
SCHEMAS = ("omop", "label", "model", "ops")

__all__ = ["SCHEMAS", "Base", "label", "metadata", "model", "omop", "ops"]
