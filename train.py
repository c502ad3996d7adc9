"""Train the compressing autoencoder on the residual stream of a language model (paper 2.7, Fig. 3)."""

import sys

from rsdyn.commands import main

if __name__ == "__main__":
    sys.exit(main("train"))
