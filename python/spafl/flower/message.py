"""What Flower's messages and contexts hold: one field of bytes, and the run's configuration."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict

RECORD, FIELD = "spafl", "parcel"
"""Where a message holds its bytes."""


def wrap(parcel: bytes) -> RecordDict:
    """A message's content: one field of bytes."""
    return RecordDict({RECORD: ConfigRecord({FIELD: parcel})})


def unwrap(message: Message) -> object:
    """The bytes of a message, or None where it has none."""
    record = message.content.get(RECORD) if message.has_content() else None
    return record.get(FIELD) if isinstance(record, ConfigRecord) else None


def config_text(context: Context) -> str:
    """The run's configuration: the text of a TOML file, empty if there is none."""
    text = context.run_config.get("spafl-config")
    return text if isinstance(text, str) else ""
