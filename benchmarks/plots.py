"""Plots."""

from pathlib import Path

from .results import Results


def draw(results: Results, folder: Path) -> None:
    """To come."""
