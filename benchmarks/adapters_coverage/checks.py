"""What is to hold for every network and every method, each check on a network of random weights."""

import copy
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.adapters_coverage.families import CLASSES, build
from lightning_automl import adapters, rundir

RANK = 4
BATCH = 2
#: Largest difference of logits that is taken for rounding, as a share of the largest logit.
TOLERANCE = 1e-4
#: The same in double precision, where float32 leaves it open whether a difference is rounding.
EXACT = 1e-9
#: Least difference that an adapter is to make, so that the comparisons compare something.
EFFECT = 1e-2

METHODS = ("lora", "conv_adapter", "plain_peft")


def check(family: str) -> dict[str, dict[str, Any]]:
    """Put adapters into a network, train a step, save, load and merge; return what was seen.

    Args:
        family: One of ``FAMILIES``.

    Returns:
        ``network`` with its size, and for each method of ``METHODS`` the ``verdict`` (``passed``, ``not applicable: …``
        or what failed) and numbers.
    """
    warnings.simplefilter("ignore")  # peft warns that it cannot merge groups, which the verdict says too
    base, size = warmed(family)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    answer: dict[str, dict[str, Any]] = {"network": {"pixels": size, "parameters": parameters}}
    for method in METHODS:
        seen = answer[method] = {"verdict": "passed"}
        begin = time.perf_counter()
        try:
            _check(base, size, method, seen)
        except _Inapplicable as reason:
            seen["verdict"] = f"not applicable: {reason}"
        except _Fault as fault:
            seen["verdict"] = f"{fault}"
        except Exception as error:
            seen["verdict"] = f"{seen['at']}: {_short(error)}"
        seen.pop("at", None)
        seen["seconds"] = round(time.perf_counter() - begin, 1)
    return answer


class _Inapplicable(Exception):
    """The method is not for such a network."""


class _Fault(Exception):
    """A check failed."""


def _check(fresh: nn.Module, size: int, method: str, seen: dict[str, Any]) -> None:
    seen["at"] = "copy"
    base = copy.deepcopy(fresh)
    images = torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))
    before = _logits(base, images)
    if not before.isfinite().all():
        raise _Fault("build: the network itself gives no finite logits")
    seen["at"] = "inject"
    model = inject(base, method, images[:1], seen)
    seen["adapters"] = len({name.rpartition(".")[0] for name in _own(model)})
    counts = adapters.adapter_parameters(model)
    seen |= {"adapted_layers": len(counts["layers"]), "share": counts["share"]}
    if not torch.equal(_logits(model, images), before):
        difference = _difference(_logits(model, images), before)
        if difference > TOLERANCE:
            raise _Fault(f"start: logits differ by {difference:.0e}")

    seen["at"] = "step"
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _step(model, images)
    named = model.named_parameters(remove_duplicate=False)  # some modules are used under two names
    trained = {name for name, parameter in named if parameter.requires_grad}
    now = model.state_dict()
    moved = {name for name, tensor in now.items() if not torch.equal(tensor, kept[name])}
    if moved - trained:
        raise _Fault(f"step: {_plain(moved - trained)} moved, which is not of the adapter")
    if not moved:
        raise _Fault("step: nothing moved")
    _step(model, images)  # the first factor has a gradient only when the second is no longer zero
    idle = {
        name
        for name, parameter in model.named_parameters()
        if name in _own(model) and (parameter.grad is None or not parameter.grad.any())
    }
    if idle:
        seen["idle"] = sorted(idle)
        raise _Fault(f"gradients: none reaches {_plain(idle)} ({len(idle)} of {len(_own(model))})")

    _shake(model)
    after = _logits(model, images)
    if not after.isfinite().all() or _difference(after, before) < EFFECT:
        raise _Fault("effect: random adapters do not change the logits, so that nothing can be compared")
    with tempfile.TemporaryDirectory() as folder:
        seen["at"] = "save"
        save(model, folder, method)
        seen["file_kb"] = round(sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1000, 1)
        seen["at"] = "load"
        loaded = load(copy.deepcopy(fresh), folder, method)
    seen["reload_difference"] = _difference(_logits(loaded, images), after)
    if seen["reload_difference"] > TOLERANCE:
        raise _Fault(f"load: logits of the loaded adapter differ by {seen['reload_difference']:.0e}")
    if method != "conv_adapter":
        seen["at"] = "merge"
        plain = merge(model, method)
        if _types(plain) != _types(fresh):
            raise _Fault("merge: the merged network has other modules than the base network")
        difference = seen["merge_difference"] = _difference(_logits(plain, images), after)
        if difference > TOLERANCE:  # by rounding, which deep random networks blow up, or by a fault?
            exact, images = loaded.double(), images.double()
            after = _logits(exact, images)
            difference = _difference(_logits(merge(exact, method), images), after)
            seen["merge_difference_in_float64"] = difference
            if difference > EXACT:
                raise _Fault(f"merge: logits differ by {difference:.0e} in float64")


def inject(network: nn.Module, method: str, image: Tensor, seen: dict[str, Any]) -> PeftModel:
    if method == "lora":
        return adapters.add_adapter(network, adapters.LoraConfig(r=RANK))
    if method == "plain_peft":
        found = adapters.anatomy(network, image)
        targets = adapters.resolve_targets(network, "auto", RANK, found)
        config = peft.LoraConfig(r=RANK, target_modules=targets, modules_to_save=list(found.head))
        training = network.training
        model = peft.get_peft_model(network, config)
        model.train(training)
        assert isinstance(model, PeftModel)
        return model
    reasons = []
    for scheme in ("residual_parallel", "conv_parallel"):
        seen["scheme"] = scheme
        # a rectified bottleneck of one or two channels may be dead from the start
        config = adapters.ConvAdapterConfig(scheme=scheme, activation="gelu")
        try:
            return adapters.add_adapter(network, config)
        except rundir.UserError as error:
            reasons.append(_short(error))
    seen.pop("scheme")
    raise _Inapplicable("no block and no inner convolution that maps images to images") from None


def save(model: PeftModel, folder: str, method: str) -> None:
    if method == "plain_peft":
        model.save_pretrained(folder)
    else:
        adapters.save_adapter(model, folder)


def load(network: nn.Module, folder: str, method: str) -> nn.Module:
    if method == "plain_peft":
        return PeftModel.from_pretrained(network, folder).eval()
    return adapters.load_adapter(network, folder)


def merge(model: PeftModel, method: str) -> nn.Module:
    if method == "plain_peft":
        tuner: Any = model
        plain: nn.Module = tuner.merge_and_unload()
        return plain
    return adapters.merged_network(model)


def warmed(family: str) -> tuple[nn.Module, int]:
    """A network that no path is switched off in, with statistics of its own, in evaluation mode; the same every time.

    Some networks start with gains or last layers of zero, so that no gradient would reach what is before them, and all
    with statistics that do not fit their activations.
    """
    network, size = build(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-3:
                if parameter.ndim > 1 and parameter.numel() > max(parameter.shape):
                    parameter.normal_(0, 0.02)
                else:
                    parameter.uniform_(0.1, 0.3)
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        if norms:
            network.eval()
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            network(torch.rand(4, 3, size, size))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return network.eval(), size


def _step(model: nn.Module, images: Tensor) -> None:
    """One step of gradient descent in training mode, with norms that keep their statistics and nothing dropped."""
    model.train()
    for module in model.modules():
        is_drop = any(word in type(module).__name__.lower() for word in ("drop", "stochastic"))
        if isinstance(module, _BatchNorm) or is_drop:
            module.eval()
    torch.manual_seed(2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    optimizer.zero_grad()
    output = model(images)
    outputs = [output] if isinstance(output, Tensor) else list(output)  # several heads in training
    logits = sum(one.flatten(1) for one in outputs) / len(outputs)
    F.cross_entropy(logits, torch.arange(len(images)) % CLASSES).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)  # logits of random networks are large
    optimizer.step()
    model.eval()


def _shake(model: nn.Module) -> None:
    """Give adapters weights that change the network by a part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in _own(model):
                spread = 0.02 if parameter.numel() > 1 else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)


def _own(model: nn.Module) -> set[str]:
    """Names of the parameters of adapters, without those of heads."""
    marks = ("lora_", "conv_adapter_")
    return {name for name, _ in model.named_parameters() if any(mark in name for mark in marks)}


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _types(network: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__name__) for name, module in network.named_modules()]


def _plain(names: set[str]) -> str:
    first = min(names)
    return first.removeprefix("base_model.model.")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}…"
