"""What happens between two checkpoints: the loop, its engine and optimizer, evaluation, and which weights are kept."""
