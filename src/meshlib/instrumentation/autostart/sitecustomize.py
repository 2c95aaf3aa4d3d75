"""How does `meshctl run` reach the Python processes that it starts? Python imports this from PYTHONPATH as it begins.

PYTHONPATH is inherited: by what a process executes, by the workers it spawns. One's own sitecustomize runs first.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_here = Path(__file__).parent


def _run_the_hidden_one() -> None:
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry or ".").resolve() != _here])
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _begin() -> None:
    try:
        from meshlib.instrumentation import instrument
    except ImportError as error:  # another environment's interpreter, say of a build tool
        print(f"meshctl run: {sys.executable} is not on the mesh: {error}", file=sys.stderr)
        return
    instrument()


try:
    _run_the_hidden_one()
finally:
    _begin()
