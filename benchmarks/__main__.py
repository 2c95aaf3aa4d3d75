"""Runs the measurements: `python -m benchmarks`, which is `make bench`."""

from benchmarks.run import main

if __name__ == "__main__":
    main()
