"""Train from the command line, the same as `lmoe train`: python train.py injection.num_experts=8 optim.lr=1e-3."""

import sys

from lmoe.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
