"""`python -m app.cli`: the command line where the script `lachesis` is not on the PATH."""

from app.cli import main

main()
