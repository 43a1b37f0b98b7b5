"""The training and evaluation commands."""
