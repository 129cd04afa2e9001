"""Training a denoiser: state, optimiser, step, loop, checkpoints, logs, evaluation."""
