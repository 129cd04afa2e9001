"""Trains a diffusion model: python train.py [--config configs/NAME.py] [--workdir DIR] ...

The same as the command `ogdm train` (ogdm_jax/cli/train.py): see `python train.py --help`.
"""

from ogdm_jax.cli.train import main

if __name__ == "__main__":
    main()
