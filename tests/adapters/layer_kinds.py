"""Small networks around one layer of each kind, for tests of what adapts layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame
from torch import nn

WIDTH = 8


class Around(nn.Module):
    """A stem, batch normalisation, the layer and a head."""

    image_size = 9

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.layer = layer
        self.head = nn.Linear(12, 5)

    def inner(self, x):
        return self.layer(x).flatten(2).mean(2)

    def forward(self, images):
        return self.head(self.inner(torch.tanh(self.norm(self.stem(images)))))


class AroundLinear(Around):
    def inner(self, x):
        return torch.tanh(self.layer(x.flatten(2).transpose(1, 2))).mean(1)


class AroundFunctional(Around):
    """Uses the weight without calling the layer, as torchvision's Swin does."""

    def inner(self, x):
        return torch.tanh(F.linear(x.flatten(2).transpose(1, 2), self.layer.weight, self.layer.bias)).mean(1)


class AroundAttention(Around):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)

    def inner(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.layer(tokens, tokens, tokens, need_weights=False)[0].mean(1)


#: Kind, and whether plain peft computes LoRA on it rightly. On attention it adds one of two updates twice.
KINDS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "conv": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, padding=1)), True),
    "stride": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, stride=2, padding=2, bias=False)), True),
    "pointwise": (lambda: Around(nn.Conv2d(WIDTH, 12, 1)), True),
    "oblong": (lambda: Around(nn.Conv2d(WIDTH, 12, (3, 5), stride=(2, 1), padding=(0, 2))), True),
    "same": (lambda: Around(nn.Conv2d(WIDTH, 12, 4, padding="same")), True),
    "dilation": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, padding=2, dilation=2)), False),
    "same_dilation": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, padding="same", dilation=(1, 2))), False),
    "reflect": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, padding=1, padding_mode="reflect")), False),
    "circular": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, stride=2, padding=1, padding_mode="circular")), False),
    "groups": (lambda: Around(nn.Conv2d(WIDTH, 12, 3, padding=1, groups=4)), False),
    "groups_all": (
        lambda: Around(nn.Conv2d(WIDTH, 12, 3, 2, padding=2, dilation=2, groups=2, padding_mode="replicate")),
        False,
    ),
    "depthwise": (lambda: Around(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1))), False),
    "conv_same": (lambda: Around(Conv2dSame(WIDTH, 12, 3, stride=2)), False),
    "static_same": (lambda: Around(Conv2dStaticSamePadding(WIDTH, 12, 3, image_size=9, stride=2)), False),
    "standardised": (lambda: Around(ScaledStdConv2d(WIDTH, 12, 3, padding=1)), False),
    "standardised_same": (lambda: Around(ScaledStdConv2dSame(WIDTH, 12, 3, stride=2)), False),
    "linear": (lambda: AroundLinear(nn.Linear(WIDTH, 12)), True),
    "functional": (lambda: AroundFunctional(nn.Linear(WIDTH, 12)), False),
    "attention": (lambda: AroundAttention(nn.MultiheadAttention(12, 3, batch_first=True)), False),
}


def network(kind: str, seed: int = 0) -> nn.Module:
    """A network of this kind in evaluation mode, with batch statistics as a trained one has."""
    torch.manual_seed(seed)
    net = KINDS[kind][0]()
    with torch.no_grad():
        net.norm.running_mean.normal_(std=0.2)
        net.norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def target(kind: str) -> str:
    return "layer.0" if kind == "depthwise" else "layer"


def images(count: int = 3, size: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
