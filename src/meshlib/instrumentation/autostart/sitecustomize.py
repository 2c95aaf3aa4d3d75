"""How does a Python process that knows no mesh get on it? Python imports this from PYTHONPATH as it begins.

`meshctl run` puts this folder there, and so does the injection of Kubernetes' pods, beside a library of packages.
PYTHONPATH is inherited: by what a process executes, by the workers it spawns. One's own sitecustomize runs first.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
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
    library = _here.parent
    try:
        if (library / "any").is_dir():
            _take(library)
        from meshlib.instrumentation import instrument
    except ImportError as error:  # another environment's interpreter, say of a build tool
        print(f"meshlib: {sys.executable} is not on the mesh: {error}", file=sys.stderr)
        return
    instrument()


def _take(library: Path) -> None:
    """meshlib/instrumentation/library.py says what it is. ImportError where it can't be used; nothing of it stays."""
    own = EXTENSION_SUFFIXES[0].split(".")[1]
    if not (library / own).is_dir():
        there = ", ".join(sorted(each.name for each in library.glob("cpython-*")))
        raise ImportError(f"the pod's library is for {there or 'no Python'}, and this is {own}")
    path, modules = list(sys.path), set(sys.modules)
    sys.path.extend(str(library / each) for each in (own, "abi3", "any"))
    try:
        from meshlib.instrumentation.library import too_old

        if found := "; ".join(too_old()):
            raise ImportError(found)
    except BaseException:
        sys.path[:] = path
        for name in sys.modules.keys() - modules:
            if name.partition(".")[0] == "meshlib":
                del sys.modules[name]
        raise


try:
    _run_the_hidden_one()
finally:
    _begin()
