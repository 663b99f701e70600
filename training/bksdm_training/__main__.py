"""python -m bksdm_training, and so accelerate launch -m bksdm_training."""

from bksdm_training.cli import main

main()
