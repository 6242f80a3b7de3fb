"""Fuse specialists into one model; see --help, the README and examples/configs/.

torchrun --nproc-per-node 8 examples/pretrain_fuser.py [--config FILE] [--resume] [key.sub=value ...]
"""

import sys

from ultrafuser_mega.launch.local import main

if __name__ == "__main__":
    sys.exit(main())
