"""``python -m fastgan``: the program `fastgan`, as torchrun starts it (``torchrun -m fastgan train ...``)."""

import sys

from fastgan.cli import main

sys.exit(main())
