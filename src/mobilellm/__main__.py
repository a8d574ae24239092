"""`python -m mobilellm`, the same as `mobilellm`."""

from mobilellm.cli import main

main()
