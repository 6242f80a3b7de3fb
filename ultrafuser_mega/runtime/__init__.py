"""Devices, Megatron-core off CUDA, layouts to process groups, the exchange, failures.

Importing this package loads Megatron-core, quietly: its notes about optional accelerators that are not
installed would otherwise appear once per rank (`ultrafuser doctor` tells what was found).
"""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules  # noqa: F401

logging.getLogger("megatron").setLevel(logging.ERROR)
