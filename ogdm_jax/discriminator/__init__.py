"""Training the discriminator of DG (arXiv 2211.17091): a second application of training/.

    python train.py --config configs/digits_dg.py --workdir runs/digits_dg
        --config.dg.prior=runs/digits

The run draws samples of the prior, the model that will be guided (generated.py), trains
log p_data - log p_model on real and generated images (pairs.py, loss.py), and keeps the checkpoint
whose guided samples are nearest to the data (evaluation.py). It never keeps the one of the lowest
loss: on mixtures the loss reaches its optimum long before the samples do, and an over-fitted
discriminator lowers the loss while its samples get worse. guidance.py opens a trained one.

This is not OGDM's discriminator: that one is trained beside the denoiser and needs none of this
(methods/ogdm.py).
"""
