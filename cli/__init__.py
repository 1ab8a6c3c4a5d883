"""The command line of fxcollab."""
