"""TRL's loss with the weight of the algorithm."""
