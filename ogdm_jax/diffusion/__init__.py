"""The mathematics of diffusion: processes, denoisers, grids, one-step rules, noise levels."""
