"""Training-free visual-word tokenisation for Hugging Face vision transformers (arXiv 2411.15397).

Importing this package registers it with transformers; models that do not ask for `vwt` are untouched.
"""

import os
import sys

__version__ = "0.1.0"
__all__ = ["VWTConfig", "VisualVocabulary", "compress", "count_tokens", "restore", "supported"]


def _is_the_command() -> bool:
    """Whether this process is `vwt-hf` or `python -m vwt_hf.cli`, and no program that imports the package."""
    # What python was told to run, a file or the name after -m; the arguments that follow it are those of sys.argv.
    ran = sys.orig_argv[-len(sys.argv)] if 0 < len(sys.argv) <= len(sys.orig_argv) else ""
    return ran == "vwt_hf.cli" or os.path.basename(ran).lower().removesuffix(".exe") == "vwt-hf"


# The command gives help at once, and importing torch takes seconds: there a verb registers when it runs.
if not _is_the_command():
    from .auto import register
    from .compress import compress, restore
    from .config import VWTConfig
    from .evaluation import count_tokens
    from .families import supported
    from .vocabulary import VisualVocabulary

    register()
