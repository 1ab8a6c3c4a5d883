"""Where to split: the candidates, what they cost, and which to take."""
