"""Compiles the kernels where the package's build found no compiler: python -m seavlm.engine.kernels"""

import sys

from seavlm.engine.kernels.build import build

try:
    print(*build(), sep="\n")
except RuntimeError as error:
    sys.exit(str(error))
