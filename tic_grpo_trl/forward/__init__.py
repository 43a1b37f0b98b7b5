"""Log-probabilities of real tokens only."""
