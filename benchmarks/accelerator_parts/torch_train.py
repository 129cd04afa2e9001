"""The train step of EDM's own code: its networks, loss and augmentation, and its training loop's
operations.

Those are: gradients set to none, forward and backward, nan_to_num of the gradients, Adam, moving
average. Adam is fused and the moving average is one call over all tensors: the loop's own form is
slower.
"""

from collections.abc import Callable
from typing import Any

from accelerator_parts import Options, clock, edm_code, sizes


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    code = edm_code.load(options.edm)
    if name == "torch-product":
        return product(code, options)
    torch, rounds = code.torch, 1
    while True:
        try:
            return measure(code, name.removeprefix("torch-"), options, rounds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if rounds >= 8:
                raise
            rounds *= 2


def measure(code: Any, name: str, options: Options, rounds: int) -> dict[str, Any]:
    torch, size = code.torch, sizes.of(options.rehearse)
    adm, name = name.startswith("adm64-"), name.removeprefix("adm64-")
    name = f"channels_last-{name}" if adm else name
    shape, batch = (size.adm_shape, size.adm_batch) if adm else (size.shape, size.batch)
    net, pipe = _network(code, size, adm, shape)
    net = net.train().requires_grad_(True).to(code.device)
    parameters = [p for p in net.parameters() if p.requires_grad]
    net = edm_code.variant(code, net, name)
    # After the layout is chosen: with strides of their own all tensors are averaged one by one.
    average = [p.detach().clone() for p in parameters]
    loss = code.loss.EDMLoss()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4, fused=code.device.type == "cuda")
    images = torch.randint(
        0, 256, (batch, shape[2], *shape[:2]), dtype=torch.uint8, device=code.device
    )
    labels = (
        torch.eye(size.classes, device=code.device)[torch.arange(batch) % size.classes]
        if adm
        else None
    )
    if code.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def work() -> None:
        optimiser.zero_grad(set_to_none=True)
        for part in range(rounds):
            rows = slice(part * batch // rounds, (part + 1) * batch // rounds)
            given = images[rows].to(torch.float32) / 127.5 - 1
            classes = None if labels is None else labels[rows]
            loss(net=net, images=given, labels=classes, augment_pipe=pipe).sum().mul(
                1 / batch
            ).backward()
        for p in parameters:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-3)

    found = clock.timed(work, lambda: edm_code.synchronise(code), size.timing)
    return found | {
        "batch": batch,
        "accumulate": rounds,
        "parameters": sum(p.numel() for p in parameters),
        "images_per_second": 1000 * batch / found["ms"],
        "peak_bytes": edm_code.peak(code),
        "finite": all(bool(torch.isfinite(p).all()) for p in parameters[:3]),
    }


def _network(
    code: Any, size: sizes.Size, adm: bool, shape: tuple[int, int, int]
) -> tuple[Any, Any]:
    """(network, augmentation) as train.py of EDM makes them for CIFAR-10 and for ImageNet-64."""
    if adm:
        settings = dict(
            model_type="DhariwalUNet", dropout=0.1, label_dim=size.classes, **size.adm_torch
        )
        return code.networks.EDMPrecond(shape[0], shape[2], **settings), None
    settings = dict(model_type="SongUNet", dropout=0.13, augment_dim=9, **size.torch)
    kinds = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    return code.networks.EDMPrecond(shape[0], shape[2], **settings), code.augment.AugmentPipe(
        p=0.12, **kinds
    )


def product(code: Any, options: Options) -> dict[str, Any]:
    """TFLOP/s of one large matrix product in bfloat16 and in float32 (TF32 allowed)."""
    torch, size = code.torch, sizes.of(options.rehearse)
    n, found = size.product, {"size": size.product}
    for dtype in ("bfloat16", "float32"):
        a, b = (torch.randn(n, n, device=code.device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)

        def work(a=a, b=b, out=out) -> None:
            torch.matmul(a, b, out=out)

        seconds = (
            clock.timed(work, lambda: edm_code.synchronise(code), size.timing / 2)["ms"] / 1000
        )
        found[f"{dtype}_tflop_per_second"] = 2 * n**3 / seconds / 1e12
    return found
