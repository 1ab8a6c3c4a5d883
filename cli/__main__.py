"""``python -m fxcollab_cli``."""

from fxcollab_cli.app import main

main()
