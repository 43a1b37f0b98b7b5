"""What keeps bad numbers, meaningless ratios and credentials out of a run's results."""
