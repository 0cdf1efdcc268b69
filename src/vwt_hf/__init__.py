"""Training-free visual-word tokenisation for Hugging Face vision transformers (arXiv 2411.15397).

Importing this package registers it with transformers; models that do not ask for `vwt` are untouched.
"""

import os
import sys

__version__ = "0.2.0.dev0"
__all__ = [
    "VWTConfig",
    "VisualVocabulary",
    "calibrate",
    "collate_images",
    "compress",
    "count_tokens",
    "embed",
    "evaluate_model",
    "register",
    "restore",
    "supported",
    "token_lengths",
    "unregister",
]


def _is_the_command() -> bool:
    """Whether all that this process runs is `vwt-hf`, and it is no program that imports the package for itself."""
    # What python was told to run: a file, the module after -m or the code after -c. What follows is in sys.argv, too.
    ran = sys.orig_argv[-len(sys.argv)] if 0 < len(sys.argv) <= len(sys.orig_argv) else ""
    statements = {"import sys", "from vwt_hf.cli import main", "sys.exit(main())"}
    script = os.path.basename(ran).lower().removesuffix(".exe")
    return script == "vwt-hf" or ran == "vwt_hf.cli" or statements.issuperset(ran.split("; "))


# The command gives help at once, and importing torch takes seconds: there a verb registers when it runs.
if not _is_the_command():
    from .auto import register, unregister
    from .calibrate import calibrate
    from .compress import compress, restore
    from .config import VWTConfig
    from .data_loading import collate_images, token_lengths
    from .embedding import embed
    from .evaluate_model import evaluate_model
    from .families import supported
    from .token_count import count_tokens
    from .vocabulary import VisualVocabulary
    from .vocabulary import files as vocabulary_files

    # Programs import them by the name that they had before they lay in `vocabulary`.
    sys.modules[f"{__name__}.vocabulary_files"] = vocabulary_files

    register()
