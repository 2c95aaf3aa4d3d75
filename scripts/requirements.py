"""Print the requirements of the dependency groups named on the command line, one a line, for `pip install -r`.

pip reads [dependency-groups] itself only from 25.1 on; Python 3.11 ships an older one.
"""

import sys
import tomllib
from pathlib import Path

groups = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["dependency-groups"]
print("\n".join(requirement for name in sys.argv[1:] for requirement in groups[name]))
