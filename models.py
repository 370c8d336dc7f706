"""§2 Proposed Contextual GAN Architecture: generator, discriminator, losses; §3 the classifier.

Images are (N, 1, H, W) in [-1, 1]. A patch of side S passes through log2(S / 4) blocks, six for the
paper's 256 px; smaller presets drop blocks and keep everything else. Where a sentence stands:

    "a random scalar value ... resized to match"       Generator.sample_noise, with_noise in forward
    "doubles the number of filters and halves"         Generator.__init__, the encoder
    "4x4x2048 ... compressed into a 1x1x4 embedding"   Generator.widen, .compress; the embedding
    "concatenating the skip connection"                Generator.forward, the decoder
    "self-attention module"                            SelfAttention
    "10px border cropping and clipping"                crop_border
    "lesion, input, and combined images"               the end of Generator.forward; COMBINED
    "8x the number of filters ... max pooling"         Discriminator
    "a four-way output", "a factor of 0.2"             four_way_loss, discriminator_loss
    "a gradient penalty was added"                     gradient_penalty
    "a new layer is appended", "linearly blending"     the new layer in both forwards; train.growth
    "ResNet-50", "the last feature layer"              ResNet50, .features
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.resnet import Bottleneck, ResNet

LEAK = 0.2  # the paper names no slope; Q4
INIT_STD = 0.02  # the paper names no initialisation; Q4
LAMBDA, K = 10.0, 1.0  # §2 "where lambda = 10, and k = 1", L4
BORDER_PX = 10  # at 256 px: §2 "Border cropping", G11
COMBINED = slice(2, 3)  # of the three channels that G gives, G13
REAL, FAKE, BENIGN, NORMAL = range(4)  # §2 "Semi-supervised training loss", D2
CLASS_WEIGHTS = (1.0, 1.0, 0.2, 0.2)  # §2 "scaled by a factor of 0.2", L3


# --- §2 Layers shared by the generator and the discriminator ---


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, pad: int = 0, sn: bool = True):
    """Convolution with N(0, 0.02) weights, zero bias and spectral normalisation (G16, Q12).

    Without the normalisation nothing corrects the scale of the first weights: then He et al.'s.
    """
    layer = nn.Conv2d(
        in_channels=c_in, out_channels=c_out, kernel_size=kernel, stride=stride, padding=pad
    )
    nn.init.zeros_(layer.bias)
    if sn:
        nn.init.normal_(layer.weight, std=INIT_STD)
        return spectral_norm(layer)
    nn.init.kaiming_normal_(layer.weight, a=LEAK)
    return layer


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, negative_slope=LEAK)


def up2(x: Tensor) -> Tensor:
    """Double the resolution by nearest neighbour (G9, T4)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def down2(x: Tensor) -> Tensor:
    """Halve the resolution by averaging 2 x 2 pixels (T6, Q11)."""
    return F.avg_pool2d(x, kernel_size=2)


class SelfAttention(nn.Module):
    """gamma * attention(x) + x over all positions; the identity at the start (G7, Q7).

    Source: §2 "Self-attention module"; form of Zhang et al. 2018, arXiv version 1.
    """

    def __init__(self, channels: int, sn: bool = True):
        super().__init__()
        inner = max(1, channels // 8)
        self.f = conv(channels, inner, kernel=1, sn=sn)
        self.g = conv(channels, inner, kernel=1, sn=sn)
        self.h = conv(channels, channels, kernel=1, sn=sn)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), as it comes out
        f, g, h = (layer(x).flatten(2) for layer in (self.f, self.g, self.h))  # (N, c, H*W)
        attention = torch.softmax(f.transpose(1, 2) @ g, dim=1)  # over source positions
        return self.gamma * (h @ attention).view_as(x) + x


def sides_down(patch_size: int) -> list[int]:
    """Sides of the maps that the encoder's blocks give: 128, 64, 32, 16, 8, 4 at 256 px (Q1)."""
    sides = [patch_size // 2**i for i in range(1, patch_size.bit_length() - 2)]
    if patch_size < 64 or 4 * 2 ** len(sides) != patch_size:
        raise ValueError(f"patch size: found {patch_size}; expected 64, 128, 256 or 512")
    return sides


# --- §2 Generator ---


class Generator(nn.Module):
    """U-net that writes a lesion into a patch, or removes one (G1-G13).

    patch_size: side S of the input patch
    base: filters of the first block, doubled per block
    center: channels of the 4 x 4 centre, reached by a 1 x 1 convolution that the text does not
        name but its "4x4x2048" needs; None leaves that layer out. Deviation: Q1.
    sn: spectral normalisation of every convolution (G16)
    noise_cells: one value a cell for each block whose noise is concatenated to a map of this side
        or less, in place of "a random scalar value"; 0 = the paper's scalars. Deviation: Q2.

    Blocks are keyed by the side of the map that they give.
    """

    def __init__(
        self,
        patch_size: int = 256,
        base: int = 16,
        center: int | None = 2048,
        sn: bool = True,
        noise_cells: int = 0,
    ):
        super().__init__()
        self.patch_size, self.sides = patch_size, sides_down(patch_size)
        width = {side: base * 2**i for i, side in enumerate(self.sides)}  # 16 at 128 ... 512 at 4
        self.encoder, channels = nn.ModuleDict(), 1
        for side in self.sides:
            self.encoder[str(side)] = conv(
                channels + 1, width[side], kernel=3, stride=2, pad=1, sn=sn
            )
            channels = width[side]
        self.encoder_attention = SelfAttention(width[patch_size // 8], sn)
        self.widen = conv(channels, center, kernel=1, sn=sn) if center else None
        self.compress = conv(center or channels, 4, kernel=4, sn=sn)
        self.decoder, channels = nn.ModuleDict(), 4
        for side in self.sides[::-1]:  # the encoder's widths mirrored: 256 ... 16, then 16; Q6
            c_in, c_out = channels + width[side] + 1, width.get(2 * side, base)
            self.decoder[str(2 * side)] = nn.ModuleList(
                [
                    conv(c_in, c_out, kernel=3, pad=1, sn=sn),
                    conv(c_out, c_out, kernel=3, pad=1, sn=sn),
                ]
            )
            channels = c_out
        self.decoder_attention = SelfAttention(width[patch_size // 8], sn)
        self.to_lesion_half = conv(width[patch_size // 2], 1, kernel=1, sn=sn)  # T3
        self.to_lesion = conv(base, 1, kernel=1, sn=sn)
        maps = [patch_size, *self.sides[:-1], *self.sides[::-1]]  # that noise is concatenated to
        self.noise_sides = [side if side <= noise_cells else 1 for side in maps]  # 1: a scalar
        self.noise_size = sum(side**2 for side in self.noise_sides)  # 12 at 256 px (Q2)

    def sample_noise(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, noise_size) "drawn uniformly from [-1,1]" (G5), on the device of `rng`."""
        return torch.empty(n, self.noise_size, device=rng.device).uniform_(-1, 1, generator=rng)

    def forward(
        self, x: Tensor, z: Tensor | None = None, size: int | None = None, alpha: float = 1.0
    ) -> Tensor:
        """(N, 1, S, S), noise (N, noise_size) -> (N, 3, s, s) lesion, input, combined.

        z: see `sample_noise`; drawn when None
        size: current side s of the output, S or S / 2 (None = S)
        alpha: weight of the new S layer while it fades in (T4)
        """
        size = size or self.patch_size
        assert x.shape[1:] == (1, self.patch_size, self.patch_size), x.shape
        assert size in (self.patch_size, self.patch_size // 2), size
        if z is None:
            z = torch.empty(len(x), self.noise_size, device=x.device).uniform_(-1, 1)
        noise = iter(z.split([side**2 for side in self.noise_sides], dim=1))  # of each block
        sides = iter(self.noise_sides)

        def with_noise(*maps: Tensor) -> Tensor:
            """The maps and "a random scalar value ... resized to match" them (G4, G5)."""
            side = next(sides)
            values = next(noise).to(maps[0]).view(-1, 1, side, side)  # (N, 1, 1, 1) for a scalar
            plane = values.expand(-1, -1, *maps[0].shape[2:])  # which is constant over the map
            plane = plane.contiguous(memory_format=torch.channels_last)  # as the maps: no copy
            return torch.cat([*maps, plane], dim=1)

        h, skips, attention_side = x, {}, self.patch_size // 8
        for side in self.sides:
            h = leaky_relu(self.encoder[str(side)](with_noise(h)))  # (N, base * 2**i, side, side)
            if side == attention_side:
                h = self.encoder_attention(h)
            skips[side] = h
        if self.widen is not None:
            h = leaky_relu(self.widen(h))  # (N, center, 4, 4)
        h = self.compress(h)  # (N, 4, 1, 1): "a 1x1x4 embedding" (G8)
        # Back to (N, 4, 4, 4) for the decoder as the 1x1 noise is resized: no layer is named (Q5).
        h = F.interpolate(h, size=skips[4].shape[2:], mode="nearest")
        half = None
        for side in self.sides[::-1]:
            # "A new layer is appended" for side S (T3): it is there from the start and left out
            # until then, so that here the S / 2 stage ends.
            if 2 * side == self.patch_size:
                if alpha < 1 or size < self.patch_size:
                    half = self.to_lesion_half(h)  # (N, 1, S / 2, S / 2)
                if size < self.patch_size:
                    break
            first, second = self.decoder[str(2 * side)]
            h = up2(with_noise(h, skips[side]))
            h = F.relu(second(F.relu(first(h))))
            if 2 * side == attention_side:
                h = self.decoder_attention(h)
        if size < self.patch_size:
            y, x = half, down2(x)
        else:
            y = self.to_lesion(h)  # (N, 1, S, S)
            if half is not None:
                y = torch.lerp(up2(half).float(), y.float(), alpha)  # T4
        lesion = crop_border(y.float()).clamp(-1, 1)  # G11; blend -> crop -> clamp, Q8
        combined = (x + lesion).clamp(-1, 1)  # G12; Q9
        return torch.cat([lesion, x, combined], dim=1)  # G13


def crop_border(y: Tensor) -> Tensor:
    """(N, 1, s, s) with a frame of zeros: 10 px at 256 px, floor(10 s / 256) at s (G11, Q8)."""
    b = BORDER_PX * y.shape[-1] // 256
    return F.pad(y[..., b : y.shape[-2] - b, b : y.shape[-1] - b], (b, b, b, b))


# --- §2 Discriminator ---


class Discriminator(nn.Module):
    """The encoder with 8 x the filters and max pooling; logits of [real, fake, benign, normal].

    It sees one channel, a real or a combined patch (Q10), and no noise (Q3). D1-D3.
    """

    def __init__(
        self, patch_size: int = 256, base: int = 128, center: int | None = 16384, sn: bool = True
    ):
        super().__init__()
        self.patch_size, self.sides = patch_size, sides_down(patch_size)
        self.encoder, channels = nn.ModuleDict(), 1
        for i, side in enumerate(self.sides):  # 128 filters at 128 px ... 4096 at 4 px
            self.encoder[str(side)] = conv(channels, base * 2**i, kernel=3, pad=1, sn=sn)
            channels = base * 2**i
        self.attention = SelfAttention(base * 2 ** self.sides.index(patch_size // 8), sn)
        self.widen = conv(channels, center, kernel=1, sn=sn) if center else None
        self.head = conv(center or channels, 4, kernel=4, sn=sn)
        self.from_image_half = conv(1, base, kernel=1, sn=sn)  # §2 "Progressive growing"

    def forward(self, x: Tensor, size: int | None = None, alpha: float = 1.0) -> Tensor:
        """(N, 1, s, s) -> (N, 4) logits, float32; size and alpha as in the generator (T6)."""
        size = size or self.patch_size
        assert x.shape[1:] == (1, size, size), (x.shape, size)
        assert size in (self.patch_size, self.patch_size // 2), size
        h = x
        for side in self.sides:
            new = 2 * side == self.patch_size  # the new layer, "identical but reversed" (T6)
            if new and size < self.patch_size:
                h = leaky_relu(self.from_image_half(x))  # (N, base, S / 2, S / 2)
                continue
            # Pooling before LeakyReLU equals after it, and keeps less for the backward pass (Q4).
            h = leaky_relu(F.max_pool2d(self.encoder[str(side)](h), kernel_size=2))
            if new and alpha < 1:
                half = leaky_relu(self.from_image_half(down2(x)))
                h = torch.lerp(half, h.to(half.dtype), alpha)
            if side == self.patch_size // 8:
                h = self.attention(h)
        if self.widen is not None:
            h = leaky_relu(self.widen(h))  # (N, center, 4, 4)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.head(h.float()).flatten(1)  # (N, 4)


# --- §2 Semi-supervised training loss ---


def four_way_loss(logits: Tensor, target: int) -> Tensor:
    """Cross entropy of one sub-batch against one of [real, fake, benign, normal] (scalar).

    logits: (N, 4), unbounded. Source: §2 "Semi-supervised training loss" (L1). Open point: Q13.
    """
    return F.cross_entropy(logits, logits.new_full((len(logits),), target, dtype=torch.long))


def discriminator_loss(real: Tensor, fake: Tensor, benign: Tensor, normal: Tensor) -> Tensor:
    """Four sub-batches of logits (n, 4), benign and normal weighted 0.2; no penalty here (L3)."""
    return sum(
        weight * four_way_loss(logits, target)
        for target, (weight, logits) in enumerate(
            zip(CLASS_WEIGHTS, (real, fake, benign, normal), strict=True)
        )
    )


def generator_loss(fake: Tensor) -> Tensor:
    """-log p_real of D's logits (N, 4) of the generated patches, their mean (L5, Q14)."""
    return four_way_loss(fake, REAL)


def real_logit(logits: Tensor) -> Tensor:
    """(N, 4) -> logit(p_real) (N,): unlike the raw logit blind to a shift of all four (Q17)."""
    return logits[:, REAL] - logits[:, FAKE:].logsumexp(dim=1)


def gradient_penalty(
    D: Callable[[Tensor], Tensor],
    x_real: Tensor,
    lam: float = LAMBDA,
    k: float = K,
    delta: Tensor | None = None,
) -> Tensor:
    """lambda * E[(||grad_x D(x + delta)|| - k)^2], delta ~ U(0, 1) per pixel (L4, Q15-Q17).

    delta: (N, 1, H, W) noise to use instead of a fresh draw
    """
    return lam * (gradient_norm(D, x_real, delta) - k).square().mean()


def gradient_norm(
    D: Callable[[Tensor], Tensor], x_real: Tensor, delta: Tensor | None = None
) -> Tensor:
    """||grad_x logit(p_real)|| at x + delta of each sample, differentiable, in float32 (N,)."""
    x = (x_real + (torch.rand_like(x_real) if delta is None else delta)).detach()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(real_logit(D(x)).sum(), x, create_graph=True)
    # Under the root: a plain norm has no gradient where the gradient is exactly zero (Q17).
    return (gradient.float().square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * network; buffers are taken over (ours; Q11)."""
    with torch.no_grad():
        for mean, p in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)
        for mean, b in zip(average.buffers(), network.buffers(), strict=True):
            mean.copy_(b)


# --- §3 Patch Classifier Training ---

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std; Q31


class ResNet50(ResNet):
    """ResNet-50 (He et al.) on one-channel patches with a two-way head [no cancer, cancer] (C1)."""

    def __init__(self):
        super().__init__(Bottleneck, [3, 4, 6, 3])
        self.fc = nn.Linear(self.fc.in_features, 2)
        mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def features(self, x: Tensor) -> Tensor:
        """(N, 1, S, S) in [-1, 1] -> (N, 2048) after global average pooling (F4)."""
        x = ((x + 1) / 2 - self.mean) / self.std  # (N, 3, S, S): replicated, normalised; Q31
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, S, S) in [-1, 1] -> (N, 2) logits."""
        return self.fc(self.features(x))


class SmallResNet(nn.Module):
    """One bottleneck a stage and no max pooling, for small patches on a CPU (ours; A2)."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers = [nn.Conv2d(1, width, kernel_size=7, stride=2, padding=3, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        c_in = width
        for planes, stride in ((width, 2), (2 * width, 2), (4 * width, 2), (8 * width, 1)):
            c_out = planes * Bottleneck.expansion
            shortcut = nn.Conv2d(c_in, c_out, kernel_size=1, stride=stride, bias=False)
            shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(c_out))
            layers, c_in = [*layers, Bottleneck(c_in, planes, stride, shortcut)], c_out
        self.stages, self.fc = nn.Sequential(*layers), nn.Linear(c_in, 2)

    def features(self, x: Tensor) -> Tensor:
        """(N, 1, S, S) in [-1, 1] -> (N, 32 * width), the mean over the last S / 16 map."""
        return self.stages(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, S, S) in [-1, 1] -> (N, 2) logits."""
        return self.fc(self.features(x))


Classifier = ResNet50 | SmallResNet


# --- The networks of a configuration: another network costs its class and a line here ---


def generator(config: dict) -> Generator:
    """G by the fields of train.GanConfig, as a run's config.json holds them."""
    names = ("patch_size", "g_base", "g_center", "sn_g", "noise_cells")
    return Generator(*(config[name] for name in names))


def discriminator(config: dict) -> Discriminator:
    return Discriminator(config["patch_size"], config["d_base"], config["d_center"], config["sn_d"])


def classifier(config: dict) -> Classifier:
    """By the fields of train.ClassifierConfig."""
    return ResNet50() if config["network"] == "resnet50" else SmallResNet(config["width"])
