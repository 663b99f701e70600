"""`python -m bksdm_runtime` is `bksdm-run`."""

from bksdm_runtime.cli import main

main()
