"""The VAE: eq. 1-4 against closed forms, and what may not leak."""
import dataclasses
import math

import pytest
import torch

import vae

TINY = vae.VAEConfig(size=32, width=8, layers=1, depth=1)


def tiny():
    """A small VAE whose zero-initialised layers have been moved, so that every path is alive."""
    torch.manual_seed(0)
    model = vae.VAE(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.02 * torch.randn_like(p))
    return model


def test_kl_is_that_of_torch_distributions():
    """L_kl of eq. 4 is KL(N(mean, var) || N(0, 1)), averaged over elements."""
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0., 1.)).mean()
    torch.testing.assert_close(vae.kl(mean, logvar), wanted)


def test_reparameterised_draws_have_the_posterior_moments():
    """z = mean + e^(logvar/2) noise has the mean and the variance that the encoder says."""
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    z = vae.reparameterise(torch.tensor(1.5), torch.tensor(math.log(.25)), noise)
    assert abs(z.mean() - 1.5) < .01 and abs(z.var() - .25) < .01


def test_eq3_at_one_half():
    """Where f_dis cannot tell (D = 1/2, logit 0), eq. 3 is 2 log(1/2), and each generator's term too."""
    zero = torch.zeros(2, 1, 4, 4)
    torch.testing.assert_close(vae.adversarial_value(zero, zero), torch.tensor(-2 * math.log(2)))
    torch.testing.assert_close(vae.discriminator_loss(zero, zero), torch.tensor(2 * math.log(2)))
    torch.testing.assert_close(vae.generator_loss(zero, "literal"), torch.tensor(-math.log(2)))
    torch.testing.assert_close(vae.generator_loss(zero), torch.tensor(math.log(2)))
    assert vae.discriminator_loss(zero, zero, "hinge") == 2


@pytest.mark.parametrize("kind", ["literal", "nonsaturating", "hinge"])
def test_players_pull_apart(kind):
    """The discriminator gains from real up and fake down; the generator from fake up."""
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    vae.discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake = torch.zeros(4, requires_grad=True)
    vae.generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()


def test_adaptive_weight_by_hand():
    """On a linear layer y = w x the weight is |d rec / d w| / |d adv / d w|, here 6 / 2 = 3."""
    w = torch.tensor([[2.0]], requires_grad=True)
    y = w * 1.0
    assert vae.adaptive_weight((6 * y).sum(), (-2 * y).sum(), w).item() == pytest.approx(3, rel=1e-3)


def test_regions_count_by_their_share():
    """A box with share 0.5 gets half as much weight as the whole picture, whatever its size."""
    boxes = torch.tensor([[[4., 4., 7., 7.]], [[0., 0., 15., 15.]]])      # 4x4 and 16x16 pixels
    weight = vae.weight_map(boxes, torch.tensor([.5]), 32)
    torch.testing.assert_close((weight - 1).mean((1, 2, 3)), torch.tensor([.5, .5]))
    assert weight[0, 0, 5, 5] > 1 and weight[0, 0, 20, 20] == 1


def test_reconstruction_terms_by_hand():
    """L1 of a constant shift is the shift, L2 its square; its gradient term is 0; a slope's is the
    slope."""
    x, one = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(vae.l1(x + .3, x, one), torch.tensor(.3))
    torch.testing.assert_close(vae.l2(x + .3, x, one), torch.tensor(.09))
    torch.testing.assert_close(vae.gradient_l1(x + .3, x, one), torch.tensor(0.))
    slope = .1 * torch.arange(8.).expand(1, 3, 8, 8)
    torch.testing.assert_close(vae.gradient_l1(slope, x, one), torch.tensor(.1))


@pytest.mark.parametrize("loss", [vae.l1, vae.l2, vae.gradient_l1])
def test_a_batch_may_be_cut_anywhere(loss):
    """The mean of two halves is the whole, whatever the weights of the pictures in them."""
    x, y = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double() + \
        torch.arange(4.).view(4, 1, 1, 1)
    halves = [loss(*part) for part in zip(x.split(2), y.split(2), weight.split(2))]
    torch.testing.assert_close(sum(halves) / 2, loss(x, y, weight), rtol=1e-12, atol=0)


def test_a_posterior_mean_starts_from_the_shrunken_picture():
    """With its head at zero an encoder's mean is the picture, averaged over factor x factor."""
    model = vae.VAE(TINY)
    torch.nn.init.zeros_(model.appearance_encoder.head.weight)
    torch.nn.init.zeros_(model.appearance_encoder.head.bias)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_appearance(x)[0],
                               torch.nn.functional.avg_pool2d(x, 4))


def test_attention_is_the_textbook_and_starts_as_nothing():
    """softmax(q k^T / sqrt(d)) v over all positions and heads, worked out by loops."""
    torch.manual_seed(0)
    layer, x = vae.Attention(8, 3, heads=2), torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(layer(x), x)
    torch.nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x) + layer.position).flatten(2)[0].chunk(3)      # (8, 9) each
    y = torch.cat([v[h] @ (q[h].T @ k[h] / 2).softmax(-1).T for h in (slice(0, 4), slice(4, 8))])
    wanted = x + (layer.out.weight[:, :, 0, 0] @ y).view(1, 8, 3, 3)
    torch.testing.assert_close(layer(x), wanted)


def test_latents_have_the_shapes_of_the_config():
    """z^a (B, 3, H/4, W/4) and z^m (B, 3, H/8, W/8) for `toy`; D returns the picture's size."""
    model, x = tiny(), torch.zeros(2, 3, 32, 32)
    assert model.encode_appearance(x)[0].shape == (2, 3, 8, 8)
    assert model.encode_motion(x)[0].shape == (2, 3, 4, 4)
    assert model(x, x)[0].shape == (2, 3, 32, 32)


def test_appearance_and_motion_come_by_separate_doors():
    """E_A sees the portrait alone, E_M the landmark picture alone, D both latents (eq. 1, 2)."""
    model, seen = tiny(), {}
    for name in ("appearance_encoder", "motion_encoder", "decoder"):
        getattr(model, name).register_forward_pre_hook(
            lambda module, given, name=name: seen.update({name: given}))
    x_a, x_m = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x_a.requires_grad_(), x_m.requires_grad_()
    x_hat, _ = model(x_a, x_m)
    assert seen["appearance_encoder"][0] is x_a and seen["motion_encoder"][0] is x_m
    z_a, z_m = seen["decoder"]
    assert torch.equal(z_a, model.encode_appearance(x_a)[0])
    assert torch.equal(z_m, model.encode_motion(x_m)[0])
    by_a, by_m = torch.autograd.grad(x_hat.abs().sum(), (x_a, x_m))
    assert by_a.abs().sum() > 0 and by_m.abs().sum() > 0


def test_noise_moves_the_latents_that_are_decoded():
    """With noise the decoder gets mean + noise e^(logvar/2), not the mean."""
    model, seen = tiny(), []
    model.decoder.register_forward_pre_hook(lambda module, given: seen.append(given))
    x = torch.zeros(1, 3, 32, 32)
    noise_a, noise_m = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)
    model(x, x, noise_a, noise_m)
    for got, given, noise in zip(seen[0], (model.encode_appearance(x), model.encode_motion(x)),
                                 (noise_a, noise_m)):
        torch.testing.assert_close(got, given[0] + noise * (given[1] / 2).exp())


def test_a_fresh_block_is_the_identity():
    """Residual blocks start at x -> x: their last convolution is zero."""
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(vae.ResidualBlock(8)(x), x)


def test_it_learns_one_batch():
    """Forty steps on two pictures halve the reconstruction error."""
    torch.manual_seed(0)
    model = vae.VAE(dataclasses.replace(TINY, width=16))
    x, one = torch.rand(2, 3, 32, 32) * 2 - 1, torch.ones(2, 1, 32, 32)
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    optimiser, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(40):
        optimiser.zero_grad()
        loss = vae.l1(model(x, x)[0], x, one)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_presets_are_built_and_counted():
    """Each preset is built without memory; the README's table shows these counts."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in vae.VAE(c).parameters())
                  for name, c in vae.PRESETS.items()}
    assert counts == {"toy": 2_226_840, "small": 60_318_232, "base": 433_837_080,
                      "large": 3_281_250_328}


def test_lpips_is_zero_for_equal_pictures_and_reads_the_public_layout(tmp_path):
    """LPIPS loads torchvision's VGG16 and the LPIPS layers from files; d(x, x) = 0 < d(x, y)."""
    torch.manual_seed(0)
    model, vgg, k = vae.LPIPS(), {}, 0
    for stage in vae.LPIPS.STAGES:
        for width in stage:
            before = 3 if k == 0 else last
            vgg[f"features.{k}.weight"] = torch.randn(width, before, 3, 3) * (2 / 9 / before) ** .5
            vgg[f"features.{k}.bias"] = torch.zeros(width)
            last, k = width, k + 2
        k += 1                                                  # the pooling layer's place
    linear = {f"lin{j}.model.1.weight": torch.rand(1, s[-1], 1, 1)
              for j, s in enumerate(vae.LPIPS.STAGES)}
    torch.save(vgg, tmp_path / vae.LPIPS.FILES[0])
    assert vae.find_lpips(tmp_path) is None
    torch.save(linear, tmp_path / vae.LPIPS.FILES[1])
    model = vae.find_lpips(tmp_path)
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert model(x, x).item() == 0 and model(x, y).item() > 0
    torch.testing.assert_close(model.stages[2][1].weight.data, vgg["features.10.weight"])


def test_discriminator_judges_patches():
    """One logit for each patch of an eighth of the side."""
    assert vae.Discriminator(8)(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 4, 4)


def test_psnr():
    """10 log10(4 / MSE): a constant error of 0.2 is 20 dB."""
    assert vae.psnr(torch.full((3, 4, 4), .2), torch.zeros(3, 4, 4)) == pytest.approx(20, abs=1e-4)
