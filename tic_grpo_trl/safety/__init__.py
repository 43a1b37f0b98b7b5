"""Protection of a run's results from bad numbers, meaningless ratios and leaked credentials."""
