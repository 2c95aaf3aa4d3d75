"""`python -m meshlib.cli` is meshctl, also where scripts are not on the PATH."""

from meshlib.cli import main

main()
