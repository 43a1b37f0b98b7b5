"""Recipes, which the build maps into the package as `tic_grpo_trl.recipes`."""
