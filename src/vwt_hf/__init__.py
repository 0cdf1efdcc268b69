"""Training-free visual-word tokenisation for Hugging Face vision transformers (arXiv 2411.15397).

Importing this package registers it with transformers; models that do not ask for `vwt` are untouched.
"""

from .auto import register, unregister
from .compress import compress, restore
from .config import VWTConfig
from .families import supported
from .vocabulary import VisualVocabulary

__version__ = "0.1.0"
__all__ = ["VWTConfig", "VisualVocabulary", "compress", "register", "restore", "supported", "unregister"]

register()
