"""From prompts to micro-batches."""
