"""`python -m fxsplit`."""

from fxsplit.cli import main

main()
