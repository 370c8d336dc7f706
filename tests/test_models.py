"""§2: networks and losses, block by block, against the paper's numbers and hand-worked values."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize

import data
import models
from models import (
    Discriminator,
    Generator,
    SelfAttention,
    SmallResNet,
    crop_border,
    discriminator_loss,
    down2,
    four_way_loss,
    generator_loss,
    gradient_norm,
    gradient_penalty,
    real_logit,
    up2,
)
from support import runs
from support.runs import weights_hash
from train import ClassifierConfig, classifier_scores, first_weights


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def inputs_and_outputs(network: nn.Module, layers, *args, **kwargs) -> list[tuple]:
    """(input shape, output shape) without the batch, of each layer during one forward pass."""
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, x, y: seen.__setitem__(m, (tuple(x[0].shape[1:]), tuple(y.shape[1:])))
        )
        for layer in layers
    ]
    with torch.no_grad():
        network(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return [seen.get(layer) for layer in layers]


@pytest.fixture(scope="module")
def paper_D() -> Discriminator:
    return Discriminator()  # 0.65 GiB of weights: made once


@pytest.fixture
def small() -> tuple[Generator, Discriminator]:
    torch.manual_seed(0)
    return Generator(64, 4, 64), Discriminator(64, 8, 128)


def patches(n: int = 2, side: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- Generator ---


def convolved(x: torch.Tensor, layer: nn.Conv2d, stride: int = 1, padding: int = 0):
    return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=padding)


def leaky(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def averaged(x: torch.Tensor) -> torch.Tensor:
    return x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_G2_to_G13_T4_the_generator_written_out_sentence_by_sentence(alpha):
    torch.manual_seed(0)
    G = Generator(64, 4, 64, sn=False)
    for attention in (G.encoder_attention, G.decoder_attention):
        nn.init.constant_(attention.gamma, 0.7)
    with torch.no_grad():
        G.to_lesion.weight *= 30  # so that clipping acts
    x, z = patches(), torch.rand(2, 8) * 2 - 1
    scalars = iter(z[:, :, None, None, None].unbind(1))
    with torch.no_grad():
        h, skips = x, []
        for layer in G.encoder.values():  # G4: scalar, stride 2, LeakyReLU
            h = torch.cat([h, next(scalars).expand(-1, -1, *h.shape[2:])], dim=1)
            h = leaky(convolved(h, layer, stride=2, padding=1))
            h = G.encoder_attention(h) if h.shape[-1] == 8 else h  # G7, and with it in the skip
            skips.append(h)
        h = convolved(leaky(convolved(h, G.widen)), G.compress)  # G8; Q5: linear
        h = h.expand(-1, -1, 4, 4)
        for (
            first,
            second,
        ) in G.decoder.values():  # G2, G9: skip and scalar, up-sampling, two convolutions
            half = h
            h = torch.cat([h, skips.pop()], dim=1)
            h = torch.cat([h, next(scalars).expand(-1, -1, *h.shape[2:])], dim=1)
            h = convolved(doubled(h), first, padding=1).relu()
            h = convolved(h, second, padding=1).relu()
            h = G.decoder_attention(h) if h.shape[-1] == 8 else h
        y = convolved(h, G.to_lesion)  # G10
        y = (1 - alpha) * doubled(convolved(half, G.to_lesion_half)) + alpha * y  # T4
        y[:, :, :2] = y[:, :, -2:] = 0  # G11
        y[:, :, :, :2] = y[:, :, :, -2:] = 0
        lesion = y.clamp(-1, 1)
        found = G(x, z, alpha=alpha)
        assert 0.01 < (y.abs() > 1).float().mean() < 0.99
        torch.testing.assert_close(found[:, :1], lesion, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[:, 1:2], x)
        expected = (x + found[:, :1]).clamp(-1, 1)  # G12; Q9
        assert torch.equal(found[:, 2:], expected)


def test_G3_G8_parameters_of_both_readings():
    assert count(Generator()) == 5_544_103 + 17
    assert count(Generator(center=None)) == 4_395_175 + 17


def test_G1_G3_G4_G8_encoder_shapes_at_paper_size():
    G = Generator()
    shapes = inputs_and_outputs(
        G, [*G.encoder.values(), G.widen, G.compress], torch.zeros(1, 1, 256, 256)
    )
    assert shapes == [
        ((2, 256, 256), (16, 128, 128)),
        ((17, 128, 128), (32, 64, 64)),
        ((33, 64, 64), (64, 32, 32)),
        ((65, 32, 32), (128, 16, 16)),
        ((129, 16, 16), (256, 8, 8)),
        ((257, 8, 8), (512, 4, 4)),
        ((512, 4, 4), (2048, 4, 4)),
        ((2048, 4, 4), (4, 1, 1)),
    ]
    assert all(m.stride == (2, 2) and m.kernel_size == (3, 3) for m in G.encoder.values())


def test_G9_G10_decoder_shapes_at_paper_size():
    G = Generator()
    layers = [layer for block in G.decoder.values() for layer in block]
    shapes = inputs_and_outputs(G, [*layers, G.to_lesion], torch.zeros(1, 1, 256, 256))
    # The skip joins before the up-sampling, so the first convolution sees the doubled side.
    expected = [(517, 256, 8), (513, 128, 16), (257, 64, 32), (129, 32, 64), (65, 16, 128)]
    expected += [(33, 16, 256)]
    assert shapes[:-1:2] == [((i, s, s), (o, s, s)) for i, o, s in expected]
    assert shapes[1:-1:2] == [((o, s, s), (o, s, s)) for _, o, s in expected]
    assert shapes[-1] == ((16, 256, 256), (1, 256, 256))
    assert G.to_lesion.kernel_size == (1, 1)


def test_G5_noise_is_one_scalar_per_block_and_sample_constant_over_space(small):
    G, _ = small
    seen = []
    for layer in [*G.encoder.values(), *(block[0] for block in G.decoder.values())]:
        layer.register_forward_pre_hook(lambda m, x: seen.append(x[0][:, -1]))
    z = torch.rand(3, 8) * 2 - 1
    with torch.no_grad():
        G(patches(3), z)
    assert len(seen) == z.shape[1] == 8
    for i, channel in enumerate(seen):
        assert torch.equal(channel, z[:, i, None, None].expand_as(channel))


def test_G5_noise_that_is_not_given_is_uniform_in_minus_one_to_one(small):
    G, _ = small
    seen = []
    for layer in (G.encoder["32"], G.encoder["16"]):
        layer.register_forward_pre_hook(lambda m, x: seen.append(x[0][:, -1, 0, 0]))
    with torch.no_grad():
        for _ in range(8):
            G(patches(64))
    assert not torch.equal(seen[0], seen[1])  # Q2: each block has its own
    z = torch.cat(seen)
    assert -1 <= z.min() < -0.95 and 0.95 < z.max() <= 1
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1 / math.sqrt(3)) < 0.05


def test_G6_noise_varies_the_output_and_fixes_it():
    G = Generator(64, 4, 64).eval()
    x, z = patches(), torch.rand(2, 8)
    with torch.no_grad():
        assert torch.equal(G(x, z), G(x, z))
        assert not torch.equal(G(x, z), G(x, -z))


@pytest.mark.parametrize("cells", [0, 4, 16, 64])
def test_Q2_noise_has_a_value_a_cell_on_coarse_maps_and_a_scalar_elsewhere(cells):
    G = Generator(64, 4, 64, noise_cells=cells).eval()
    seen = []
    for layer in [*G.encoder.values(), *(block[0] for block in G.decoder.values())]:
        layer.register_forward_pre_hook(lambda m, x: seen.append(x[0][:, -1]))
    z = G.sample_noise(3, torch.Generator().manual_seed(5))
    again = G.sample_noise(3, torch.Generator().manual_seed(5))
    assert torch.equal(z, again) and z.abs().max() <= 1
    with torch.no_grad():
        G(patches(3), z)
    maps = [64, 32, 16, 8, 4, 8, 16, 32]  # the decoder's are seen after up-sampling
    values = iter(z.split([side**2 if side <= cells else 1 for side in maps], dim=1))
    for i, (side, channel) in enumerate(zip(maps, seen, strict=True)):
        value = next(values).view(3, *(2 * [side] if side <= cells else (1, 1)))
        up = 2 if i >= 4 and side <= cells else 1
        expected = value.repeat_interleave(up, dim=1).repeat_interleave(up, dim=2)
        assert torch.equal(channel, expected.expand_as(channel))


def test_noise_has_twelve_scalars_at_paper_size():
    G = Generator().eval()
    with torch.no_grad():
        assert G(torch.zeros(1, 1, 256, 256), torch.zeros(1, 12)).shape == (1, 3, 256, 256)
        with pytest.raises((StopIteration, RuntimeError)):
            G(torch.zeros(1, 1, 256, 256), torch.zeros(1, 11))


def test_G7_attention_sits_at_32_by_32_in_both_halves():
    G = Generator()
    shapes = inputs_and_outputs(
        G, [G.encoder_attention, G.decoder_attention], torch.zeros(1, 1, 256, 256)
    )
    assert shapes == [((64, 32, 32), (64, 32, 32))] * 2


def test_G7_attention_is_the_identity_at_the_start_and_has_the_papers_size():
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(SelfAttention(64)(x), x)
    assert count(SelfAttention(64)) == 5_201
    assert count(SelfAttention(512)) == 328_321


def test_G7_attention_against_a_direct_implementation():
    torch.manual_seed(0)
    layer = SelfAttention(16, sn=False)
    nn.init.constant_(layer.gamma, 0.7)
    x = torch.randn(1, 16, 3, 3)
    flat = x[0].flatten(1)  # (C, positions)
    f, g, h = (m.weight[:, :, 0, 0] @ flat + m.bias[:, None] for m in (layer.f, layer.g, layer.h))
    expected = torch.empty_like(flat)
    for j in range(9):  # o_j = sum_i softmax_i(f_i . g_j) h_i
        beta = torch.softmax(torch.stack([f[:, i] @ g[:, j] for i in range(9)]), dim=0)
        expected[:, j] = 0.7 * sum(beta[i] * h[:, i] for i in range(9)) + flat[:, j]
    torch.testing.assert_close(layer(x)[0].flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "border"), [(256, 10), (128, 5), (64, 2), (32, 1)])
def test_G11_Q8_frame_is_zero_and_the_inside_untouched(side, border):
    inside = crop_border(torch.ones(1, 1, side, side))[0, 0]
    assert inside[border:-border, border:-border].all()
    assert inside.sum() == (side - 2 * border) ** 2


def test_G11_G12_G13_order_frame_and_range_of_the_output(small):
    G, _ = small
    nn.init.constant_(G.to_lesion.bias, 3.0)  # far out of range: clipping must act
    x = patches()
    with torch.no_grad():
        lesion, before, combined = G(x)[:, :1], G(x)[:, 1:2], G(x)[:, 2:]
    assert torch.equal(before, x)
    assert lesion.max() == 1 and lesion.min() >= -1
    assert torch.equal(lesion, crop_border(lesion))
    assert torch.equal(combined, (x + lesion).clamp(-1, 1))
    assert combined.max() == 1


def test_G14_no_class_goes_into_the_generator():
    assert Generator(64, 4, 64).encoder["32"].in_channels == 2  # patch and noise, nothing else


def test_G16_Q12_every_convolution_is_spectrally_normalised():
    torch.manual_seed(0)
    for network in (Generator(64, 4, 64), Discriminator(64, 8, 128)):
        x = patches()
        with torch.no_grad():
            for _ in range(30):  # one power iteration each
                network(x)
        for layer in convolutions(network):
            assert parametrize.is_parametrized(layer, "weight")
            largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
            assert largest.item() == pytest.approx(1, abs=0.05), layer


def test_G16_normalisation_can_be_left_out_for_the_small_presets():
    for network in (Generator(64, 4, 64, sn=False), Discriminator(64, 8, 128, sn=False)):
        assert not any(parametrize.is_parametrized(m) for m in convolutions(network))


def test_Q4_first_weights():
    G = Generator(64, 16, 2048)
    weight = G.widen.parametrizations.weight.original
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(not m.bias.any() for m in convolutions(G))


@pytest.mark.parametrize("side", [0, 4, 32, 48, 100, 250])
def test_sides_that_no_chain_of_blocks_reaches_are_refused(side):
    with pytest.raises(ValueError, match=f"patch size: found {side}; expected 64, 128"):
        Generator(side)


# --- Discriminator ---


def test_D1_parameters_of_both_readings(paper_D):
    assert count(paper_D) == 169_076_357 + 256
    with torch.device("meta"):
        narrow = Discriminator(center=None)
    assert count(narrow) == 101_164_677 + 256
    blocks = [1_280, 295_168, 1_180_160, 4_719_616, 18_876_416, 75_501_568]
    assert [count(m) for m in narrow.encoder.values()] == blocks
    assert (count(narrow.attention), count(narrow.head)) == (328_321, 262_148)
    assert count(narrow.from_image_half) == 256
    assert count(paper_D.widen) == 67_125_248
    assert count(paper_D.head) - count(narrow.head) == 786_432


def test_D1_D2_D3_shapes_at_paper_size(paper_D):
    D = paper_D
    layers = [*D.encoder.values(), D.attention, D.widen, D.head]
    x = torch.zeros(1, 1, 256, 256)
    shapes = inputs_and_outputs(D, layers, x)
    assert D.eval()(x).shape == (1, 4)
    widths = [1, 128, 256, 512, 1024, 2048, 4096]
    sides = [256, 128, 64, 32, 16, 8]
    assert shapes[:6] == [
        ((widths[i], s, s), (widths[i + 1], s, s)) for i, s in enumerate(sides)
    ]  # stride 1: the pooling halves
    assert shapes[6] == ((512, 32, 32), (512, 32, 32))
    assert shapes[7:] == [((4096, 4, 4), (16384, 4, 4)), ((16384, 4, 4), (4, 1, 1))]


@pytest.mark.parametrize(("size", "alpha"), [(64, 1.0), (64, 0.25), (32, 1.0)])
def test_D1_D2_D3_T6_the_discriminator_written_out(size, alpha):
    torch.manual_seed(0)
    D = Discriminator(64, 8, 128, sn=False)
    nn.init.constant_(D.attention.gamma, 0.7)
    x = patches(3, size)
    with torch.no_grad():
        half = leaky(convolved(x if size == 32 else averaged(x), D.from_image_half))
        h = x
        for i, layer in enumerate(D.encoder.values()):  # convolution, LeakyReLU, max pooling
            if i or size == 64:
                h = leaky(convolved(h, layer, padding=1)).unfold(2, 2, 2).unfold(3, 2, 2)
                h = h.amax(dim=(4, 5))
            if i == 0:
                h = half if size == 32 else (1 - alpha) * half + alpha * h
            h = D.attention(h) if h.shape[-1] == 8 else h
        logits = convolved(leaky(convolved(h, D.widen)), D.head)[:, :, 0, 0]
        torch.testing.assert_close(D(x, size, alpha), logits, rtol=1e-4, atol=1e-5)


def test_D1_eight_times_the_filters_of_the_generators_encoder(paper_D):
    for g, d in zip(Generator().encoder.values(), paper_D.encoder.values(), strict=True):
        assert d.out_channels == 8 * g.out_channels


def test_Q3_the_discriminator_is_not_random(small):
    _, D = small
    D.eval()
    with torch.no_grad():
        assert torch.equal(D(patches()), D(patches()))


def test_Q10_one_channel_and_one_sub_batch_at_a_time_or_all_at_once(small):
    """No layer mixes samples: one pass over all four sub-batches is exact."""
    _, D = small
    D.eval()
    a, b = patches(2, seed=1), patches(2, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(D(torch.cat([a, b])), torch.cat([D(a), D(b)]))
    with pytest.raises(AssertionError):
        D(torch.zeros(1, 3, 64, 64))


# --- Losses ---


def test_L1_L3_L5_values_at_zero_logits():
    zero = torch.zeros(5, 4)
    assert four_way_loss(zero, 2).item() == pytest.approx(1.386294, abs=1e-6)
    assert discriminator_loss(zero, zero, zero, zero).item() == pytest.approx(3.327107, abs=1e-6)
    assert generator_loss(zero).item() == pytest.approx(1.386294, abs=1e-6)


def test_L3_benign_and_normal_count_a_fifth_and_each_class_has_its_own_target():
    torch.manual_seed(0)
    logits = [torch.randn(n, 4) for n in (3, 5, 2, 4)]
    log_p = [x - x.exp().sum(1, keepdim=True).log() for x in logits]
    means = [-lp[:, i].mean() for i, lp in enumerate(log_p)]
    expected = means[0] + means[1] + 0.2 * means[2] + 0.2 * means[3]
    torch.testing.assert_close(discriminator_loss(*logits), expected)


def test_G15_L5_the_generators_loss_is_minus_log_p_real_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p_real = math.exp(2) / sum(map(math.exp, (2, 1, 0, -1)))
    assert generator_loss(logits).item() == pytest.approx(-math.log(p_real), abs=1e-6)


class LinearD(nn.Module):
    """Logits [c * sum of pixels, 0, 0, 0]."""

    def __init__(self, c: float):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, x):
        total = self.c * x.sum(dim=(1, 2, 3))
        return torch.stack([total, *(torch.zeros_like(total),) * 3], dim=1)


@pytest.mark.parametrize(("c", "penalty"), [(2 / 256, 10.0), (1 / 256, 0.0), (0.0, 10.0)])
def test_L4_penalty_of_a_linear_discriminator(c, penalty):
    D = LinearD(c)
    found = gradient_penalty(D, torch.zeros(3, 1, 256, 256))
    assert found.item() == pytest.approx(penalty, abs=1e-4)
    found.backward()
    assert torch.isfinite(D.c.grad)  # also where the gradient is exactly zero


def test_L4_lambda_and_k():
    D, x = LinearD(2 / 256), torch.zeros(3, 1, 256, 256)
    assert gradient_penalty(D, x, lam=3.0, k=4.0).item() == pytest.approx(12.0, abs=1e-4)


def test_L4_the_square_is_inside_the_mean():
    """Norms 1 + a and 1 - a: the mean norm is k, the mean of squares is not 0 (Q16)."""

    def D(x):
        scale = torch.tensor([1.5, 0.5])[: len(x)] / 8
        total = scale * x.sum(dim=(1, 2, 3))
        return torch.stack([total, *(torch.zeros_like(total),) * 3], dim=1)

    assert gradient_penalty(D, torch.zeros(2, 1, 8, 8)).item() == pytest.approx(2.5, abs=1e-5)


def test_L4_delta_is_uniform_in_zero_to_one_per_pixel():
    seen = []

    def D(x):
        seen.append(x.detach().clone())
        return LinearD(1.0)(x)

    x = patches(4, 64)
    gradient_penalty(D, x)
    delta = seen[0] - x
    assert delta.min() >= -1e-6 and delta.max() <= 1 + 1e-6
    assert delta.mean().item() == pytest.approx(0.5, abs=0.02)
    assert delta[0, 0].std().item() == pytest.approx(
        1 / math.sqrt(12), abs=0.02
    )  # not one per patch


def test_L2_L4_Q17_losses_are_blind_to_a_common_shift_of_the_logits(small):
    _, D = small
    D.eval()
    logits = [torch.randn(3, 4) for _ in range(4)]
    shifted = [x + 7 for x in logits]
    torch.testing.assert_close(discriminator_loss(*shifted), discriminator_loss(*logits))
    torch.testing.assert_close(generator_loss(shifted[1]), generator_loss(logits[1]))
    torch.testing.assert_close(real_logit(shifted[0]), real_logit(logits[0]))
    x, delta = patches(), torch.zeros(2, 1, 64, 64)

    def shifted_D(x):
        return D(x) + 50 * x.mean(dim=(1, 2, 3))[:, None]

    torch.testing.assert_close(gradient_norm(shifted_D, x, delta), gradient_norm(D, x, delta))


def test_Q17_the_penalised_output_is_the_logit_of_p_real():
    logits = torch.tensor([[1.0, 0.3, -0.4, 2.0]])
    p = logits.softmax(1)[0, 0]
    assert real_logit(logits).item() == pytest.approx(math.log(p / (1 - p)), abs=1e-6)


def test_L4_the_penalty_reaches_the_weights_of_the_discriminator(small):
    _, D = small
    gradient_penalty(D, patches()).backward()
    for layer in (*D.encoder.values(), D.widen, D.head):
        assert layer.parametrizations.weight.original.grad.abs().max() > 0


# --- Growth ---


def test_T4_nearest_doubling_and_averaging():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    doubled = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert torch.equal(up2(x)[0, 0], doubled.float())
    assert torch.equal(down2(up2(x)), x)


@pytest.mark.parametrize("base", [4, 16])
def test_T4_T6_the_fade_starts_continuous(base):
    torch.manual_seed(0)
    side = 256 if base == 16 else 64
    G, D = Generator(side, base, 128 * base).eval(), Discriminator(64, 8, 128).eval()
    x, z = patches(1, side), torch.rand(1, G.noise_size)
    with torch.no_grad():
        half, full = G(x, z, size=side // 2), G(x, z, alpha=0.0)
        assert half.shape == (1, 3, side // 2, side // 2)
        torch.testing.assert_close(full[:, :1], up2(half[:, :1]), rtol=0, atol=1e-6)
        assert torch.equal(half[:, 1:2], down2(x))
        small = patches(3, 32)
        torch.testing.assert_close(D(up2(small), alpha=0.0), D(small, size=32))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_T5_old_heads_get_no_gradient_when_the_fade_is_over(small, alpha):
    G, D = small
    D(G(patches(), alpha=alpha)[:, 2:], alpha=alpha).sum().backward()
    for old in (G.to_lesion_half, D.from_image_half):
        gradient = old.parametrizations.weight.original.grad
        moved = gradient is not None and bool(gradient.abs().max() > 0)
        assert moved == (alpha < 1)
    new = G.to_lesion.parametrizations.weight.original.grad
    assert bool(new.abs().max() > 0) == (alpha > 0)


def test_Q11_the_half_stage_uses_eleven_of_twelve_scalars_and_not_the_last_block():
    G = Generator(64, 4, 64).eval()
    x, z = patches(1), torch.rand(1, 8)
    other = z.clone()
    other[:, -1] = -1
    with torch.no_grad():
        assert torch.equal(G(x, z, size=32), G(x, other, size=32))
    shapes = inputs_and_outputs(G, [G.to_lesion_half, G.decoder["64"][0]], x, z, size=32)
    assert shapes == [((4, 32, 32), (1, 32, 32)), None]


# --- Classifier ---


def test_C1_parameters_of_the_two_way_resnet50():
    model = first_weights(ClassifierConfig(weights="none"))
    assert count(model) == 23_512_130
    assert count(model) - count(model.fc) == 23_508_032


def test_C1_weights_of_a_file_fill_all_but_the_head(tmp_path):
    torch.manual_seed(3)
    source = torchvision.models.resnet50(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = first_weights(ClassifierConfig(weights=str(tmp_path / "weights.pt")))
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    x = torch.rand(2, 1, 64, 64) * 2 - 1
    source.fc = model.fc
    mean, std = (torch.tensor(v)[:, None, None] for v in models.IMAGENET)
    with torch.no_grad():  # Q31: replicated, (x + 1) / 2, ImageNet's mean and deviation
        expected = source.eval()((((x + 1) / 2).expand(-1, 3, -1, -1) - mean) / std)
        torch.testing.assert_close(model.eval()(x), expected)


def test_C1_weights_that_do_not_fit_or_cannot_be_had_are_refused(tmp_path, monkeypatch):
    torch.save(SmallResNet(16).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(
        ValueError, match=r"narrow\.pt: damaged .*; give the weights of a torchvision ResNet"
    ):
        first_weights(ClassifierConfig(weights=str(tmp_path / "narrow.pt")))
    with pytest.raises(ValueError, match="no such file"):
        first_weights(ClassifierConfig(weights=str(tmp_path / "nothing.pt")))
    with pytest.raises(ValueError, match="fit ResNet-50"):
        first_weights(ClassifierConfig(network="small", weights="imagenet"))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"no network.*--weights FILE.*--weights none"):
        first_weights(ClassifierConfig(weights="imagenet"))


def test_the_small_classifier_ends_in_four_by_four_at_64_px():
    model, seen = SmallResNet(16), []
    model.stages.register_forward_hook(lambda m, x, out: seen.append(out.shape))
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 2)
    assert seen == [(2, 512, 4, 4)]


def test_classifier_scores_do_not_depend_on_the_batch_and_give_pooled_features():
    torch.manual_seed(0)
    model = SmallResNet(16)
    stored = np.random.default_rng(0).integers(0, 65536, (5, 64, 64)).astype(np.uint16)
    cpu = torch.device("cpu")
    scores, features = classifier_scores(model, stored, cpu, batch=2, features=True)
    assert features.shape == (5, 512)
    x = torch.from_numpy(data.to_float(stored))[:, None]
    with torch.no_grad():
        expected = model.eval()(x).softmax(1)[:, 1].numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    np.testing.assert_allclose(classifier_scores(model, stored, cpu), scores, rtol=1e-5)


# --- Checkpoints ---


def test_weights_hash_names_values_not_objects():
    torch.manual_seed(0)
    a, b = Generator(64, 4, 64), Generator(64, 4, 64)
    assert weights_hash(a) != weights_hash(b)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b.to(memory_format=torch.channels_last))


def test_damaged_checkpoints_are_refused(tmp_path):
    def step() -> int:
        with runs.checkpoint(tmp_path) as state:
            return state["step"]

    with pytest.raises(ValueError, match=r"checkpoint\.pt: no such file"):
        step()
    torch.save(
        {"format": runs.CHECKPOINT_FORMAT, "step": 41, "w": torch.arange(9_999.0)},
        tmp_path / "checkpoint.pt",
    )
    assert step() == 41
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "checkpoint.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged .*; delete the run"):
            step()
    torch.save({"step": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of format"):
        step()


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"format": runs.CHECKPOINT_FORMAT, "x": Harm()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged"), runs.checkpoint(tmp_path):
        pass
    assert "harm" not in capsys.readouterr().out


def test_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.choose_device("auto") == runs.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: found no usable GPU"):
        runs.choose_device("cuda")
