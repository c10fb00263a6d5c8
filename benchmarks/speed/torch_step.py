"""The PyTorch counterpart of a training step: the usual fast settings, the same models.

Channels last, autocast to bfloat16, ``torch.compile``, cuDNN's own search for the
fastest algorithms, and SGD with momentum in one fused kernel where the device has it.
"""

# mypy: disable-error-code="import-not-found", disallow-subclassing-any=False

import functools
import gc
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 1000


def conv_norm(inputs: int, features: int, kernel: int, strides: int = 1) -> nn.Module:
    """Returns a convolution and its batch norm."""
    conv = nn.Conv2d(inputs, features, kernel, strides, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(features))


def norm_conv(inputs: int, features: int, kernel: int) -> nn.Module:
    """Returns a batch norm, ReLU and convolution, in DenseNet's order."""
    conv = nn.Conv2d(inputs, features, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv)


def stem(features: int) -> list[nn.Module]:
    """Returns what all models begin with: a quarter of the resolution."""
    pool = nn.MaxPool2d(3, 2, padding=1)
    return [conv_norm(3, features, 7, 2), nn.ReLU(inplace=True), pool]


class Residual(nn.Module):
    """A block of ResNet: two or three convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, strides: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        relu = nn.ReLU(inplace=True)
        if bottleneck:
            layers = [
                *(conv_norm(inputs, width, 1), relu),
                *(conv_norm(width, width, 3, strides), relu),
                conv_norm(width, outputs, 1),
            ]
        else:
            first = conv_norm(inputs, width, 3, strides)
            layers = [first, relu, conv_norm(width, width, 3)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if strides > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv_norm(inputs, outputs, 1, strides))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's features."""
        return F.relu(self.layers(x) + self.shortcut(x), inplace=True)


class DenseLayer(nn.Module):
    """A layer of DenseNet, which appends its features to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        width = 4 * growth
        self.layers = nn.Sequential(
            norm_conv(inputs, width, 1), norm_conv(width, growth, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input with the new features."""
        return torch.cat([x, self.layers(x)], dim=1)


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """Returns a ResNet."""
    layers, width = stem(64), 64
    for stage, count in enumerate(blocks):
        features = 64 * 2**stage
        for block in range(count):
            strides = 2 if stage > 0 and block == 0 else 1
            layers.append(Residual(width, features, strides, bottleneck))
            width = 4 * features if bottleneck else features
    return nn.Sequential(*layers, *head(width))


def densenet(blocks: tuple[int, ...], growth: int = 32) -> nn.Module:
    """Returns a DenseNet."""
    width = 2 * growth
    layers = stem(width)
    for stage, count in enumerate(blocks):
        for _ in range(count):
            layers.append(DenseLayer(width, growth))
            width += growth
        if stage < len(blocks) - 1:
            layers += [norm_conv(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
    norm = [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *norm, *head(width))


def head(width: int) -> list[nn.Module]:
    """Returns what all models end with."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES)]


MODELS = {
    "resnet18": functools.partial(resnet, (2, 2, 2, 2), bottleneck=False),
    "resnet50": functools.partial(resnet, (3, 4, 6, 3), bottleneck=True),
    "densenet121": functools.partial(densenet, (6, 12, 24, 16)),
}


class TorchStep:
    """A compiled training step with its state; a call starts one step."""

    memory_bytes = None  # not known from compiling

    def __init__(self, model: str, shape: tuple[int, ...], dtype: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        self.dtype = getattr(torch, dtype)
        self.model = MODELS[model]().to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, fused=True
        )
        rows, height, width, channels = shape
        images = torch.randn(rows, channels, height, width, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(NUM_CLASSES, (rows,), device=self.device)
        self.loss = torch.compile(self._loss, dynamic=False)
        self().block_until_ready()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=narrow):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels)

    def start(self) -> int | None:
        """Runs a step; returns the most memory in use, if the device tells."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self().block_until_ready()
        return torch.cuda.max_memory_allocated()

    def __call__(self) -> Self:
        """Starts one step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.images, self.labels).backward()
        self.optimizer.step()
        return self

    def block_until_ready(self) -> None:
        """Waits for what was started: what ``jax.block_until_ready`` calls."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def release() -> None:
    """Gives back the memory of steps that are no longer used."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
