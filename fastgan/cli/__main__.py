"""``python -m fastgan.cli``, where the script `fastgan` is not on PATH."""

import sys

from . import main

sys.exit(main())
