"""The papers' theory and the comparison of algorithms: run from a checkout, not installed."""
