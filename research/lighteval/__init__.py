"""Evaluate a model with lighteval, which runs in its own environment."""
