"""`python -m vwt_hf.cli`, for where the command `vwt-hf` is not on the path."""

import sys

from . import main

sys.exit(main())
