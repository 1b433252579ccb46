"""Reference results of a codec's losses, for tests/test_parity_losses.py; made by make.py.

LPIPS is the `lpips` package's, over torchvision's VGG16 written out here: torchvision has no build for every torch. The
other terms are written here in torch, with its autograd, from their definitions in
VQGAN (Esser et al. 2020, arXiv:2012.09841, equations 6 and 7), in the sums and means of Open-Sora 2.0.
"""

import sys
import types
from unittest import mock

import torch
import torch.nn.functional as F
from random_weights import draw_input
from reference import fill, names_and_shapes, save


def vgg16(pretrained: bool) -> types.SimpleNamespace:
    """torchvision.models.vgg16, as far as lpips uses it."""
    assert not pretrained
    layers, channels = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            channels = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


def lpips() -> None:
    stand_ins = {"torchvision": types.ModuleType("torchvision"), "lpips.trainer": types.ModuleType("trainer")}
    stand_ins["torchvision"].models = types.SimpleNamespace(vgg16=vgg16)
    with mock.patch.dict(sys.modules, stand_ins):  # the trainer needs scipy
        from lpips import LPIPS

    make = lambda: LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    model, results = fill(make()), {}
    model.scaling_layer = type(model.scaling_layer)()  # constants, which are no weights
    for head in model.lins:
        head.model[1].weight.data.abs_()  # as LPIPS's are
    for H, W in ((16, 16), (33, 48)):
        a, b = (torch.from_numpy(draw_input(f"{x} {H}x{W}", (2, 3, H, W))).clamp(-1, 1) for x in "ab")
        b.requires_grad_()
        distance = model(a, b)
        results[f"distance {H}x{W}"] = distance.detach().flatten().numpy()
        results[f"gradient {H}x{W}"] = torch.autograd.grad(distance.sum(), b)[0].numpy()
    save("lpips", results, published=names_and_shapes(make))


def codec_losses() -> None:
    """The terms of a step on fixed tensors, and the adaptive weight at a last convolution of fixed weights."""
    video, hidden = (torch.from_numpy(draw_input(n, (2, c, 5, 8, 12))) for n, c in (("video", 3), ("hidden", 4)))
    video = video.clamp(-1, 1)
    kernel = torch.from_numpy(draw_input("last kernel", (3, 4, 3, 3, 3)) / 8).requires_grad_()
    critic = torch.from_numpy(draw_input("critic", (1, 3, 3, 4, 4)) / 8)
    mean, logvar = (torch.from_numpy(draw_input(n, (2, 4, 2, 2, 3))) for n in ("mean", "logvar"))
    logits = lambda x: F.conv3d(x, critic, stride=2)
    fake = F.conv3d(F.pad(hidden, (1, 1, 1, 1, 2, 0)), kernel)
    # Sums over a frame's numbers and means over frames, of pixels and of latents.
    frames = video.shape[0] * video.shape[2]
    l1 = (video - fake).abs().sum() / frames
    generator = -logits(fake).mean()
    g_nll, g_gen = (torch.autograd.grad(loss, kernel, retain_graph=True)[0] for loss in (l1, generator))
    weight = (g_nll.norm() / (g_gen.norm() + 1e-4)).clamp(0, 1e4) * 0.5
    real, made = logits(video), logits(fake.detach())
    results = {
        "l1": l1,
        "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / (len(mean) * mean.shape[2]),
        "generator": generator,
        "adaptive_weight": weight,
        "weighted generator": weight * generator,
        "discriminator": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean()),
    }
    save("codec_losses", {k: v.detach().reshape(1).numpy() for k, v in results.items()})
