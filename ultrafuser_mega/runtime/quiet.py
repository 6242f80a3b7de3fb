"""Warnings of the libraries below, which nobody who runs a command can act upon.

For programs: a command and a rank call :func:`quiet_dependencies` before they import Megatron-core. Importing the
package changes no filter, so what a user's own program wants to see stays visible.
"""

from __future__ import annotations

import logging
import warnings


def quiet_dependencies() -> None:
    """Leave out what Megatron-core and torch say at import, once per rank, about things that are as they should be."""
    # Every optional accelerator that is not installed, and CUDA settings that mean nothing on a CPU; what was found,
    # `ultrafuser doctor` tells.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # What Megatron-core 0.16 uses of torch and newer torch versions announce to replace.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
    # A CUDA build of torch on a machine with nvcc and without a GPU.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
