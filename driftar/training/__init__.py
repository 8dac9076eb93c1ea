"""Training: tasks, losses, sample banks, the loop and its checkpoints (import the submodules)."""
