"""What the generated forward of a training model calls."""
