"""What modules keep from call to call beside parameters: compared and restored."""
