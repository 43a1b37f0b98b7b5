"""Plan a run and estimate its memory, before anything is loaded."""
