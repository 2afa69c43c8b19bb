"""The magnitude-preserving Diffusion Transformer, the plain adaLN one it is measured against, and
the EDM denoiser around both.

Both families have the same three parts, input, block and output, written one under the other so
that they can be compared line by line. The keys that configure them stand behind the networks, and
where this differs from the papers' public code stands at the end of the file.

Sources: [MaP-DiT] Bill et al. 2025, arXiv 2505.19122; [DiT] Peebles & Xie 2023, arXiv 2212.09748;
[EDM] Karras et al. 2022, arXiv 2206.00364; [EDM2] Karras et al. 2024, arXiv 2312.02696.
Read layers.py before, train.py after.

Legend: B batch, C channels, S side of the image, P side of a patch, T tokens, D width, H heads.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import (MPMLP, Modulation, MPAttention, MPEmbedding, MPFourier, MPLinear, attention,
                    mp_silu, mp_sum, normalize)
from plumbing.keys import Configuration, key


def position_embedding(width, grid):
    """Fixed 2-D sine-cosine embedding [DiT]: (grid², width), half of the channels for each axis.
    Raises ValueError unless 4 divides the width."""
    if width % 4:
        raise ValueError(f"width: {width} is not divisible by 4, as the position embedding needs")
    freqs = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * freqs
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, D/2)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis.expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (grid², D)


class MPInput(nn.Module):
    """Patches (B, T, C·P²), c_noise (B,), labels (B,) -> tokens (B, T, D), conditioning (B, D)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.patch = MPLinear(config.channels * config.patch**2 + 1, D)
        self.fourier = MPFourier(D)
        self.noise = MPLinear(D, D)
        self.label = MPEmbedding(config.num_classes + 1, D)
        position = position_embedding(D, config.image_size // config.patch)
        position = position - position.mean(dim=0)  # most of it is the same for all tokens
        position = normalize(position)  # a single token has none: 0
        self.register_buffer("position", position)

    def forward(self, patches, c_noise, labels):
        ones = torch.ones_like(patches[..., :1])  # act as a bias
        x = self.patch(torch.cat([patches, ones], dim=-1))
        x = mp_sum(x, self.position, t=0.5)
        cond = mp_silu(mp_sum(self.noise(self.fourier(c_noise)), self.label(labels), t=0.5))
        return x, cond


class MPBlock(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> tokens (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        kinds = set(config.modulation) - {"gate"}
        gate = {"scale"} if "gate" in config.modulation else set()
        self.t = config.residual_t
        self.modulation1 = Modulation(D, kinds)
        self.attention = MPAttention(D, config.heads)
        self.gate1 = Modulation(D, gate)
        self.modulation2 = Modulation(D, kinds)
        self.mlp = MPMLP(D, 4 * D)
        self.gate2 = Modulation(D, gate)

    def forward(self, x, cond):
        x = mp_sum(x, self.gate1(self.attention(self.modulation1(x, cond)), cond), t=self.t)
        x = mp_sum(x, self.gate2(self.mlp(self.modulation2(x, cond)), cond), t=self.t)
        return x


class MPOutput(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> patches (B, T, C·P²), zero at initialisation."""

    def __init__(self, config):
        super().__init__()
        self.modulation = Modulation(config.width, set(config.modulation) - {"gate"})
        self.linear = MPLinear(config.width, config.channels * config.patch**2)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x, cond):
        x = self.modulation(normalize(x), cond)
        return self.gain * self.linear(x)


def init_linears(module):
    """Xavier-uniform weights and zero biases for all plain linears in a module, as DiT has them."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def scale_and_shift(x, scale, shift):
    """x·(1 + scale) + shift, the modulation of adaLN [DiT]: (B, T, D), (B, 1, D), (B, 1, D)."""
    return x * (1 + scale) + shift


class PlainInput(nn.Module):
    """Patches (B, T, C·P²), c_noise (B,), labels (B,) -> tokens (B, T, D), conditioning (B, D).
    Why not DiT's timestep sinusoids: they assume integer times; c_noise = ln(sigma)/4 is
    continuous, and enters as in MPInput."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.patch = nn.Linear(config.channels * config.patch**2, D)
        self.fourier = MPFourier(D)
        self.noise = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(config.num_classes + 1, D)
        position = position_embedding(D, config.image_size // config.patch)
        self.register_buffer("position", position)
        init_linears(self)
        for layer in (self.noise[0], self.noise[2], self.label):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, patches, c_noise, labels):
        x = self.patch(patches)
        x = x + self.position
        cond = F.silu(self.noise(self.fourier(c_noise)) + self.label(labels))
        return x, cond


class PlainAttention(nn.Module):
    """Multi-head attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        x = attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class PlainBlock(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> tokens (B, T, D), the identity at initialisation."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(D, 6 * D)
        self.attention = PlainAttention(D, config.heads)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * D, D))
        init_linears(self)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x, cond):
        values = self.modulation(cond).float()[:, None]  # 1 + scale needs more than bfloat16
        values = values.chunk(6, dim=-1)  # (B, 1, D) each
        scale1, shift1, gate1, scale2, shift2, gate2 = values
        x = x + gate1 * self.attention(scale_and_shift(self.norm(x), scale1, shift1))
        x = x + gate2 * self.mlp(scale_and_shift(self.norm(x), scale2, shift2))
        return x


class PlainOutput(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> patches (B, T, C·P²), zero at initialisation."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.channels * config.patch**2)
        init_linears(self)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x, cond):
        scale, shift = self.modulation(cond).float()[:, None].chunk(2, dim=-1)
        return self.linear(scale_and_shift(self.norm(x), scale, shift))


def matrices_of(blocks):
    """{matrix: numbers of rows of its parts} for all matrices of some blocks, of either family.
    Why parts: some matrices are several, stacked so that one product computes what all give."""
    parts = {p: [len(p)] for p in blocks.parameters() if p.ndim == 2}
    for module in blocks.modules():
        if isinstance(module, (MPAttention, PlainAttention)):
            parts[module.qkv.weight] = 3 * [module.out.weight.shape[1]]
        elif isinstance(module, Modulation) and module.sizes:
            parts[module.linear.weight] = list(module.sizes.values())
        elif isinstance(module, PlainBlock):
            parts[module.modulation.weight] = 6 * [module.modulation.in_features]
    return parts


class DiT(nn.Module):
    """The raw network F: images (B, C, S, S), c_noise (B,), labels (B,) int64 -> (B, C, S, S);
    label num_classes is the null label.

    parts: the classes of input, block and output, where a variant has its own; each is called with
    the configuration, and sets its initial values. Raises ValueError for a configuration that does
    not say yet what the images are."""

    FAMILIES = {"mp": (MPInput, MPBlock, MPOutput), "plain": (PlainInput, PlainBlock, PlainOutput)}

    def __init__(self, config, parts=None):
        super().__init__()
        if config.image_size < 1 or config.channels < 1 or config.num_classes < 0:
            raise ValueError("DiT needs image_size, channels and num_classes")
        self.config = config
        make_input, make_block, make_output = parts or self.FAMILIES[config.block]
        self.input = make_input(config)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.depth))
        self.output = make_output(config)

    @property
    def lr_scale(self):
        """{parameter: factor on its learning rate}, where it may differ from 1; a variant adds its
        own. Why gains: nothing but their gradient holds them, and Adam's steps do not shrink with
        it; at high rates some angles of wide or deep networks drift by radians."""
        modulations = [part for part in self.modules() if isinstance(part, Modulation)]
        return {part.gain: self.config.gain_rate for part in modulations if part.sizes}

    @property
    def matrices(self):
        """{matrix: numbers of rows of its parts}, for what variants/muon.py updates."""
        return matrices_of(self.blocks)

    def run_blocks(self, x, cond):
        """Tokens (B, T, D), conditioning (B, D) -> tokens (B, T, D). A variant overrides this."""
        for block in self.blocks:
            x = block(x, cond)
        return x

    def extra_loss(self, teacher, images, generator):
        """What a variant adds to the loss (a mean over images) after each forward pass of training.
        teacher: an average of the denoiser; images: clean ones (B, C, S, S); generator: for any
        random numbers."""
        return 0.0

    def forward(self, x, c_noise, labels):
        P = self.config.patch
        grid = x.shape[-1] // P
        x = x.unflatten(3, (grid, P)).unflatten(2, (grid, P))  # (B, C, grid, P, grid, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C·P²)
        x, cond = self.input(x, c_noise, labels)  # (B, T, D), (B, D)
        x = self.run_blocks(x, cond)  # (B, T, D)
        x = self.output(x, cond)  # (B, T, C·P²)
        x = x.unflatten(2, (-1, P, P)).unflatten(1, (grid, grid))  # (B, grid, grid, C, P, P)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, C, S, S)


class Denoiser(nn.Module):
    """EDM preconditioning around the network [EDM, Table 1], and the learned uncertainty of its
    loss [EDM2, Eq. 14-16]. Why: the network always sees and predicts unit variance, whatever the
    noise level.

    forward(x, sigma, labels=None): noisy images (B, C, S, S) whose clean part has standard
    deviation sigma_data, noise levels () or (B,), labels (B,) int64, None or num_classes for
    unconditional -> denoised images (B, C, S, S), float32.

    in_bfloat16: whether the network's matrix products use bfloat16; weights, residual stream,
    modulation and all around the network stay in float32. Raises ValueError for other weights."""

    sigma_data = 0.5  # of the data, see to_network() in data.py
    in_bfloat16 = False

    def __init__(self, config):
        super().__init__()
        self.net = config.network()
        self.u_fourier = MPFourier(128)
        self.u_linear = MPLinear(128, 1)

    def forward(self, x, sigma, labels=None):
        if self.u_linear.weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("the denoiser's weights must stay in float32; "
                             "for bfloat16 inside the network set its in_bfloat16")
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        sigma = sigma.flatten().expand(len(x))
        if labels is None:
            labels = torch.full((len(x),), self.net.config.num_classes, device=x.device)
        s = sigma.view(-1, 1, 1, 1)
        norm = (s**2 + self.sigma_data**2).sqrt()
        c_skip = (self.sigma_data / norm) ** 2
        c_out = s * self.sigma_data / norm
        c_in = 1 / norm
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            out = self.net(c_in * x, sigma.log() / 4, labels)
        return c_skip * x + c_out * out.float()

    def uncertainty(self, sigma):
        """u(sigma), the learned log-variance of the loss at each noise level: (B,) -> (B,).
        Why: exp(u) divides the loss, so that no noise level dominates the gradient. Sampling does
        not use it."""
        return self.u_linear(self.u_fourier(sigma.log() / 4))[:, 0]


def weighted_error(model, images, labels, sigma, noise):
    """lambda(sigma)·(D - y)², the mean over channels and pixels: (B,) [EDM, Eq. 2 and Table 1].

    model(x, sigma, labels): the denoiser D, perhaps wrapped. images: y, clean, (B, C, S, S); labels
    (B,); sigma (B,); noise: unit normal, as images.
    Why lambda: the network then starts with an error of about 1 at every noise level."""
    sigma_data = Denoiser.sigma_data
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    error = model(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels) - images
    return weight * error.square().mean(dim=(1, 2, 3))


def edm2_loss(model, u, images, labels, sigma, noise):
    """lambda(sigma) / exp(u(sigma))·(D - y)² + u(sigma), mean over all [EDM2, Eq. 14-16, 21].
    u: the denoiser's uncertainty(sigma), (B,); the others as in weighted_error()."""
    return (weighted_error(model, images, labels, sigma, noise) / u.exp() + u).mean()


MODULATION = ("rotate", "scale", "shift", "gate")

# Depth, width and heads by name: one for the digits, then those of MaP-DiT and DiT
SIZES = {"digits": (4, 96, 3), "XS": (6, 256, 4), "S": (12, 384, 6), "B": (12, 768, 12),
         "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass
class NetworkConfig(Configuration):
    """The keys that every network has, a transformer or not.
    Why apart: images and labels are the same for all."""

    label_dropout: float = key(0.1, "share of training images shown with the null label", 0, 1)
    image_size: int = key(0, "side of the square images (0: as the dataset says)", 0, 8192)
    channels: int = key(0, "channels of the images (0: as the dataset says)", 0, 1024)
    num_classes: int = key(
        -1, "number of classes (-1: as the dataset says, 0: unconditional)", -1, 10**6)

    def for_data(self, image_size, channels, num_classes):
        """The same configuration for images of this kind. Raises ValueError where it already says
        otherwise."""
        if self.num_classes == 0:  # unconditional, whatever the dataset has
            num_classes = 0
        facts = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
        for name, fact in facts.items():
            if getattr(self, name) not in (fact, 0, -1):
                raise ValueError(f"{name}: {getattr(self, name)}, but the dataset has {fact}")
        return replace(self, **facts)


@dataclass
class DiTConfig(NetworkConfig):
    """Everything needed to build the network. Raises ValueError, in one line, for values that
    cannot work together."""

    block: str = key(
        "mp", "family: mp (magnitude-preserving) or plain (adaLN-Zero)", choices=("mp", "plain"))
    size: str = key(
        "digits", "depth, width and heads by name: digits, XS, S, B, L or XL", choices=tuple(SIZES))
    depth: int = key(0, "number of blocks (0: as size says)", 0, 1000)
    width: int = key(0, "channels of a token (0: as size says)", 0, 16384)
    heads: int = key(0, "attention heads (0: as size says)", 0, 1024)
    residual_t: float = key(
        0.0, "share t of a branch in mp residual sums (0: 0.6/sqrt(depth), at most 0.5)", 0, 0.99)
    patch: int = key(2, "side in pixels of the square patches, one token each", 1, 1024)
    modulation: tuple[str, ...] = key(
        ("rotate", "scale", "gate"), "how the conditioning acts in an mp block: any of rotate, "
        "scale, shift, gate (a plain block is always adaLN-Zero)", choices=MODULATION)
    gain_rate: float = key(
        1.0, "factor on the learning rate of the gains of mp modulations", 1e-9, 100)

    def __post_init__(self):
        super().__post_init__()
        depth, width, heads = SIZES[self.size]
        self.depth = self.depth or depth
        self.width = self.width or width
        self.heads = self.heads or heads
        self.residual_t = self.residual_t or min(0.6 / math.sqrt(self.depth), 0.5)
        self.modulation = tuple(kind for kind in MODULATION if kind in self.modulation)
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not divisible by heads = {self.heads}")
        if self.width % 4:
            raise ValueError(
                f"width: {self.width} is not divisible by 4, as the position embedding needs")
        if self.image_size % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide side {self.image_size}")
        if self.tokens > 2**16:
            raise ValueError(f"patch: {self.patch} makes {self.tokens:,} tokens, more than 65,536")

    @property
    def tokens(self):
        return (self.image_size // self.patch) ** 2

    def network(self):
        """The network that this configures; the configuration of a variant returns its own."""
        return DiT(self)


# Where this differs from the papers' public code. MaP-DiT's is that of the branch old-mod_opts.
#
# | there                                             | here, and why                              |
# |---------------------------------------------------|--------------------------------------------|
# | MaP-DiT: q and k normalised                       | q, k and v, as in EDM2: no token's value   |
# |                                                   | may dominate                               |
# | MaP-DiT: t = 0.3 in residual sums, at any depth   | 0.6/sqrt(depth): the input keeps its share |
# | MaP-DiT: positions as in DiT, at RMS 1            | centred over tokens first: with 4x4 tokens |
# |                                                   | 83 to 94% of their power is common to all  |
# | MaP-DiT: tokens enter the output as they are      | scaled to RMS 1 first, for a lower loss    |
# | MaP-DiT: noise level by 256 features, two linears | `width` features, one linear, as in EDM2   |
# | MaP-DiT: neighbouring channels make a plane       | channels i and i + D/2                     |
# | MaP-DiT: EMA lerps by beta                        | by 1 - beta; theirs stays close to the raw |
# |                                                   | weights                                    |
# | MaP-DiT, DiT: DDPM, learned variance, other       | EDM2's recipe for both families: only      |
# | optimizers                                        | networks differ                            |
# | EDM2: 1e-4 is added to an RMS before dividing     | it is the least RMS that is divided by, so |
# |                                                   | that an RMS of 1 is exact                  |
# | EDM2: weights are forced back in the forward pass | after the step: the same update, and       |
# |                                                   | forward stays pure                         |
# | EDM2: labels always shown, another network guides | 10% null labels, so that a network can     |
# |                                                   | guide itself                               |
# | EDM2: pixels are x/127.5 - 1, of any deviation    | deviation 0.5, as sigma_data says          |
# | EDM2: the first step of the warm-up has rate 0    | 1/(warmup_steps + 1) of the rate, so that  |
# |                                                   | it trains too                              |
