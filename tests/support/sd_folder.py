"""The golden pipelines as folders of diffusers: JSON texts as save_pretrained wrote them, weights by
the rule of the golden files.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.golden_support import Golden

PARTS = {"unet": "unet_", "vae": "vae_", "text_encoder": "text_"}


def write(golden: Golden, folder: Path) -> Path:
    """Writes the folder; returns it."""
    for name, value in golden.arrays.items():
        if name.startswith("file/"):
            path = folder / name.removeprefix("file/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(value))
    for part, prefix in PARTS.items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        state = {k: np.ascontiguousarray(v) for k, v in golden.state_dict(prefix).items()}
        save_file(state, folder / part / f"{stem}.safetensors")
    return folder
