"""Accelerate config files, which the build maps into the package as `tic_grpo_trl.accelerate_configs`."""
