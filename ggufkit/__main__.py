"""python -m ggufkit: the command line."""

from .cli import main

main()
