"""The training graph from the captured one, and back."""
