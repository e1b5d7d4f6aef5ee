"""``python -m impure_fast.cli``."""

from . import main

main()
