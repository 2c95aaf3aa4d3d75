"""Which endpoint? One policy a file; a picker is built for a fixed set of endpoints and replaced with it."""

from meshlib.balancing.picker import EMPTY, Picker, Target, build_picker

__all__ = ["EMPTY", "Picker", "Target", "build_picker"]
