"""``python -m fxcollab_cli``."""

from .app import main

main()
