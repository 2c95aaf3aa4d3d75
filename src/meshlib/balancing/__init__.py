"""Which endpoint? One policy a file; a picker is built for a fixed set of endpoints and replaced with it."""

from meshlib.balancing.picker import EMPTY, HASHING, Picker, Target, build_picker

__all__ = ["EMPTY", "HASHING", "Picker", "Target", "build_picker"]
