"""Text → a YAML scalar that every YAML version reads back as this text."""

from __future__ import annotations


def yaml_text(text: str) -> str:
    """A single-quoted scalar: backslashes are literal in it, and only the quote is doubled."""
    doubled = text.replace("'", "''")
    return f"'{doubled}'"
