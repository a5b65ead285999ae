"""The command ``python benchmarks/select.py``; what it does is in selection.py beside it.

A script's folder comes first on sys.path, so for every script in this folder the standard library's own
``import select`` finds this file: imported under that name, it steps aside for the real module.
"""

import importlib.machinery
import importlib.util
import os
import sys

if __name__ == "select":
    _here = os.path.dirname(os.path.abspath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec(
        "select", [path for path in sys.path if os.path.abspath(path) != _here]
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["select"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    import selection

    selection.main()
