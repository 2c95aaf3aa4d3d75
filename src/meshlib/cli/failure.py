"""How does a command fail? In one sentence, and with exit code 1."""

from __future__ import annotations


class CommandFailed(Exception):
    """The command can't do what was asked. The message is for the person who typed it; exit code 1."""
