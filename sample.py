"""Samples a trained model: python sample.py --workdir DIR --num 64 --out DIR|FILE.npz|FILE.png ...

The same as the command `ogdm sample` (ogdm_jax/cli/sample.py): see `python sample.py --help`.
"""

from ogdm_jax.cli.sample import main

if __name__ == "__main__":
    main()
