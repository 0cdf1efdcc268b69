"""`python -m vwt_hf.cli`, for when the command `vwt-hf` is not on the path."""

import sys

from . import main

sys.exit(main())
