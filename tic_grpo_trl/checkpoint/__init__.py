"""Checkpoints from which a run resumes exactly."""
