"""Class activation maps: which part of an image speaks for a class."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ActivationMaps(NamedTuple):
    """Maps float32 ``(batch, height, width)`` in [0, 1], of the images' size, and the classes ``(batch,)`` they are of.

    The largest value of a map is 1; a map of zeros says that no part of the image speaks for the class.
    """

    maps: Tensor
    classes: Tensor


def class_activation_maps(network: nn.Module, images: Tensor, classes: Tensor | None = None) -> ActivationMaps | None:
    """Show where in each image a convolutional network sees a class (Grad-CAM).

    Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*, ICCV 2017,
    https://arxiv.org/abs/1610.02391: with ``A_k`` channel k of the last feature map and ``y`` the logit of the class,
    the weight of the channel is the mean of ``dy / dA_k`` over its pixels (equation 1), and the map the positive part
    of the sum of the weighted channels (equation 2), here resized to the images bilinearly and divided by its maximum.

    The feature map is the last result of an operation behind the first layer that has more than one pixel and the
    images' shape, whether it comes from a module or from a function such as ``torch.relu``. The network is not changed,
    and what is frozen in it does not matter.

    Args:
        network: Maps images to logits ``(batch, classes)``; of a single logit class 1 has it, and class 0 its negative.
            Should be in evaluation mode.
        images: ``(batch, channels, height, width)``, float.
        classes: Of each image ``(batch,)``, the class to be shown; the predicted one when left out.

    Returns:
        The maps; None of a network without such a feature map, as a transformer is.
    """
    with torch.enable_grad():
        # A copy that wants gradients: nothing else may, where the network is frozen but for its head.
        given = images.detach().clone().requires_grad_()
        with _Watch(network, given) as watch:
            logits = network(given * 1)
        if logits.shape[1] == 1:
            logits = torch.cat([-logits, logits], 1)
        chosen = logits.argmax(1) if classes is None else classes.to(logits.device)
        score = logits.gather(1, chosen[:, None]).sum()  # images of a batch do not see each other
        features, gradient = _last(watch.maps, score)
    if features is None or gradient is None:
        return None
    weights = gradient.float().mean((2, 3), keepdim=True)
    maps = (weights * features.detach().float()).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    # The smallest normal number divides zeros into zeros.
    largest = maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return ActivationMaps((maps / largest).clamp(0, 1), chosen)


def _last(maps: list[Tensor], score: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The last of the feature maps that the score depends on, with its gradient."""
    for features in reversed(maps):
        (gradient,) = torch.autograd.grad(score, features, retain_graph=True, allow_unused=True)
        if gradient is not None:
            return features, gradient
    return None, None


class _Watch(TorchFunctionMode):
    """Collects the feature maps that a network makes of some images; all are forgotten when tokens follow.

    A feature map has the batch of the images and about their ratio of height to width, or is square as after resizing:
    a map of ``(batch, height, width, channels)`` is none. What modules give that is neither a feature map nor pooled
    has left the image's plane, as the tokens of a transformer have. Images that were only normalised or resized are
    none: before the first weights were used there are no features.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.maps: list[Tensor] = []
        self._network = network
        self._learned = False
        self._batch, _, self._height, self._width = images.shape
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [module.register_forward_hook(self._see_module) for module in self._network.modules()]
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own has no types
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # likewise
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        self._learned |= any(isinstance(each, nn.Parameter) and each.ndim > 1 for each in given)
        self._see(result)
        return result

    def _see_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not self._see(output) and sum(side > 1 for side in output.shape[1:]) > 1:
            self.maps.clear()

    def _see(self, result: Any) -> bool:
        """Keep a result if it is a feature map."""
        if not self._learned or not isinstance(result, Tensor) or result.ndim != 4 or not result.requires_grad:
            return False
        batch, _, height, width = result.shape
        slanted = abs(height * self._width - width * self._height) > 2 * (self._height + self._width)
        if batch != self._batch or height * width == 1 or (slanted and height != width):
            return False
        if not self.maps or self.maps[-1] is not result:
            self.maps.append(result)
        return True
