"""A first run says that it compiles; it is tried with an empty cache of numba's, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_an_empty_cache_is_known(tmp_path: Path) -> None:
    code = "from inilora_kernels.kernels.cpu.compiled import compiled_before; print(compiled_before())"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    answers = []
    for compile_now in (False, True):
        if compile_now:
            products = (
                "import numpy as np\n"
                "from inilora_kernels.kernels.cpu.gram import add_inner_products, add_outer_products\n"
                "W, X, Y = (np.ones(shape, np.float32) for shape in ((4, 8), (4, 8), (4, 4)))\n"
                "add_inner_products(W.reshape(-1), 8, 0, 4, 0, 8, X, Y, 0)\n"
                "add_outer_products(W.reshape(-1), 8, 0, 4, 0, 8, Y, X, 0)"
            )
            subprocess.run([sys.executable, "-c", products], env=environment, check=True)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        answers.append(done.stdout.strip())
    # As in a container whose user may write nowhere.
    environment |= {"NUMBA_CACHE_LOCATOR_CLASSES": "None", "INILORA_CACHE": "/dev/null/none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [*answers, done.stdout.strip()] == ["False", "True", "False"]
