"""The tests of chaos share `promise`, and what they measured becomes one page."""

from __future__ import annotations

from chaos.recording import promise, write_report

__all__ = ["promise"]


def pytest_sessionfinish() -> None:
    write_report()
