"""How a job comes to its ranks: torchrun on this machine, Slurm across machines."""
