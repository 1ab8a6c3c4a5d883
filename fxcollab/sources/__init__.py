"""Where models come from, as text and as plain data."""
