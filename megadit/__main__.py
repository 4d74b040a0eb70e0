"""`python -m megadit`: how the launchers start a rank."""

from megadit.cli import main

main()
