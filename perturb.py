"""Teleport the residual stream and measure whether it comes back (paper 2.8, Fig. 4D; METHOD section 10)."""

import sys

from rsdyn.commands import main

if __name__ == "__main__":
    sys.exit(main("perturb"))
