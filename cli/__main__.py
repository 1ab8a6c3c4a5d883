"""``python -m fxcollab_cli``."""

from .start import main

main()
