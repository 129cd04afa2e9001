"""Training the discriminator of DG: a second application of training/."""
