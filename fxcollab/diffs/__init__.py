"""The visual diff of training and inference graphs."""
