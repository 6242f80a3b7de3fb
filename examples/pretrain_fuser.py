"""Fuse specialists into one model: stage 1 trains the gate, stage 2 everything.

    torchrun --nproc-per-node 8 examples/pretrain_fuser.py
    torchrun --nproc-per-node 8 examples/pretrain_fuser.py --config my.yaml stage2.steps=1000 dtype=bf16
    torchrun --nproc-per-node 8 examples/pretrain_fuser.py --config my.yaml --resume

Without --config it runs the embedded default: three toy specialists, made on first use, on generated
text / code / math data. Every key of the configuration can be overridden as key.sub=value.
"""

import argparse
import sys
from pathlib import Path

from ultrafuser_mega.training.launch import train_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; default: the embedded one")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a configuration value")
    args = parser.parse_args()
    return train_main(args.config, args.overrides, args.resume)


if __name__ == "__main__":
    sys.exit(main())
