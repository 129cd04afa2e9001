"""The shipped configurations: base.py has every setting, the others are short overlays of it.

This folder is also the package ogdm_jax.configs (a link beside the other packages, and a
part of the wheel): a configuration of another project begins with
`from ogdm_jax.configs import base`.
"""
