"""How does a command fail? In one sentence, and with exit code 1."""

from __future__ import annotations


class CommandFailed(Exception):
    """The command can't do what was asked. The message is for the person who typed it; exit code 1."""


def told(error: Exception) -> str:
    """What the system says, with the file that it says it of, and without its number."""
    words = getattr(error, "strerror", None) or str(error)
    file = getattr(error, "filename", None)
    return f"{file}: {words}" if file else words
