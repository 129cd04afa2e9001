"""The group of settings that says what the denoiser's network is."""

import dataclasses

from ogdm_jax.config.fields import Group, decided, free, setting

_UNETS = "kind=song|dhariwal|openai"


@dataclasses.dataclass(frozen=True)
class Network(Group):
    """The denoiser's network."""

    kind: str = setting(
        "song",
        "song (DDPM++, NCSN++), dhariwal (EDM's ADM), openai (ADM as OpenAI has it), dit, or sd "
        "(Stable Diffusion's U-Net, of a text)",
        choices=("song", "dhariwal", "openai", "dit", "sd"),
    )
    model_channels: int = setting(
        128,
        "width of the first level; dit: of a token",
        least=4,
        most=2**16,
        expected="an even number of channels, at least 4",
    )
    channel_mult: tuple[float, ...] = setting(
        (2, 2, 2),
        "width of each level over the first's",
        above=0,
        most=64,
        expected="1 to 14 positive numbers",
        only=_UNETS + "|sd",
    )
    num_blocks: int = setting(
        4, "residual blocks per level; dit: blocks of the whole network", least=1, most=1000
    )
    attn_resolutions: tuple[int, ...] = setting(
        (16,), "sides at which blocks attend", least=1, only=_UNETS
    )
    dropout: float = decided(
        0.13,
        "share of dropped units",
        least=0,
        below=1,
        expected="a probability below 1",
        only=_UNETS,
    )
    patch: int = setting(2, "dit: side of a patch", least=1, most=64, only="kind=dit")
    embedding_type: str = setting(
        "positional",
        "song: positional, or fourier (NCSN++)",
        choices=("positional", "fourier"),
        only="kind=song",
    )
    encoder_type: str = setting(
        "standard",
        "song: standard, or residual (NCSN++)",
        choices=("standard", "residual"),
        only="kind=song",
    )
    resample_filter: tuple[int, ...] = setting(
        (1, 1), "song: (1, 1), or (1, 3, 3, 1) (NCSN++)", only="kind=song"
    )
    num_heads: int = setting(1, "attention heads", least=1, only="kind=openai|dit|sd")
    head_channels: int = setting(
        0,
        "openai, sd: width of a head, in place of their number where above 0",
        least=0,
        only="kind=openai|sd",
    )
    context: int = setting(768, "sd: width of the text's tokens", least=1, only="kind=sd")
    text_layers: int = setting(12, "sd: layers of the text encoder", least=1, only="kind=sd")
    text_heads: int = setting(12, "sd: its attention heads", least=1, only="kind=sd")
    text_hidden: int = setting(3072, "sd: width inside its MLPs", least=1, only="kind=sd")
    text_vocabulary: int = setting(49408, "sd: tokens that it knows", least=3, only="kind=sd")
    text_quick: bool = setting(True, "sd: it has the quick GELU (1.x)", only="kind=sd")
    groups: int = setting(32, "sd: groups of the norms", least=1, only="kind=sd")
    scale_shift: bool = setting(
        True, "openai: the embedding scales and shifts (use_scale_shift_norm)", only="kind=openai"
    )
    resblock_updown: bool = setting(False, "openai: residual blocks resample", only="kind=openai")
    dtype: str = decided(
        "float32", "compute type; parameters stay float32", choices=("float32", "bfloat16")
    )
    remat: bool = free(False, "recompute activations in the backward pass")

    def _check_together(self) -> None:
        even = "an even number of channels, at least 4"
        self._require(self.model_channels % 2 == 0, "model_channels", even)
        levels = "1 to 14 positive numbers"
        self._require(1 <= len(self.channel_mult) <= 14, "channel_mult", levels)
        filters = "an even number of taps with a positive sum, such as (1, 1) or (1, 3, 3, 1)"
        taps = self.resample_filter
        self._require(len(taps) % 2 == 0 and sum(taps) > 0, "resample_filter", filters)
        fits, parts = self.context % self.text_heads == 0, f"a divisor of the width {self.context}"
        self._require(self.kind != "sd" or fits, "text_heads", parts)
