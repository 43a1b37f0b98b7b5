"""Rollouts that don't wait for their longest response: what is unfinished goes on in later rollouts."""
