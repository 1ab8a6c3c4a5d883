"""What is chosen for well-known models, and what the search costs."""
