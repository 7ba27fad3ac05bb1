"""`python -m moesim` is the `moesim` command."""

from moesim.cli.main import main

main()
