"""Fuse specialists into one model; see --help, the README and examples/configs/.

torchrun --nproc-per-node 8 examples/pretrain_fuser.py [--config FILE] [--resume] [key.sub=value ...]
"""

from ultrafuser_mega.cli.rank import main

if __name__ == "__main__":
    main()
