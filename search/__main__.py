"""``python -m search``."""

from search.cli.main import main

main()
