"""What the tests run in a process where vwt_hf is not imported: `import plain_process` and call one function."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

from names import COMMON
from tiny import MODELS, answers, sample_pixel_values, tiny_model


def reload(folder: str) -> None:
    """Loads what lies in `folder`/plain and /short with plain transformers; writes what came of it to /*-again."""
    for kind in ("plain", "short"):
        for name in MODELS:
            source, target = Path(folder, kind, name), Path(folder, f"{kind}-again", name)
            model_class = type(tiny_model(name))
            model = model_class.from_pretrained(source)
            model.save_pretrained(target)
            torch.save(answers(model, sample_pixel_values()), target / "answers.pt")
            facts = {
                "class": f"{model_class.__module__}.{model_class.__qualname__}",
                "keys": list(model.state_dict()),
            }
            (target / "facts.json").write_text(json.dumps(facts))
            if name in COMMON:  # of the others it does not know every tower
                transformers.AutoModel.from_pretrained(source)
    assert "vwt_hf" not in sys.modules


def write_checkpoints(output: str) -> str:
    """Saves the common tiny models, with their answers, below `output`; returns the transformers version."""
    for name in COMMON:
        model = tiny_model(name)
        model.save_pretrained(Path(output, name))
        torch.save(answers(model, sample_pixel_values()), Path(output, name, "answers.pt"))
    return transformers.__version__
