"""Measure the residual stream as a dynamical system: the paper's measures, with null models (paper 2.2-2.6, 2.8)."""

import sys

from rsdyn.commands import main

if __name__ == "__main__":
    sys.exit(main("analyze"))
