"""`python -m compress`, which `accelerate launch -m compress` needs."""

from compress.cli import main

main()
