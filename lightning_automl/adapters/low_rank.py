"""Low rank: the exact factorisation of a matrix, and the compression of trained layers by truncated SVD.

Letters: a weight as a matrix `W` is `m` x `n`, of rank `r`; its factors are `A`, `m` x `r`, and `B`, `r` x `n`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_automl.rundir import UserError

Form = Literal["channel", "spatial"]

#: Share of the squared singular values that is kept when nothing else is said.
ENERGY = 0.95


def numerical_rank(matrix: Tensor, tol: float | None = None) -> int:
    """The number of singular values above ``tol`` times the largest.

    Args:
        matrix: ``(m, n)``.
        tol: At least 0; by default ``max(m, n)`` times the machine epsilon of its type.

    Raises:
        UserError: If it is no matrix, or not finite.
    """
    values = _checked_matrix(matrix)
    sigma = torch.linalg.svdvals(values)
    if not len(sigma) or sigma[0] == 0:
        return 0
    return int((sigma > _tolerance(matrix, tol) * sigma[0]).sum())


def rank_factorise(matrix: Tensor, tol: float | None = None) -> tuple[Tensor, Tensor, int]:
    """Write a matrix as ``A @ B`` with as many columns in ``A`` as its rank.

    ``A`` consists of columns of the matrix, the pivot columns of its reduced row echelon form: each that is no
    combination of those before it. ``B`` has the coordinates of every column in that basis, on the pivot columns the
    identity. Where rounding hides which columns are pivots, those are taken that stand out the most (QR with column
    pivoting).

    Args:
        matrix: ``(m, n)``; whole numbers are computed with, and returned, as float64.
        tol: See :func:`numerical_rank`; what lies below is lost.

    Returns:
        ``A`` ``(m, r)``, ``B`` ``(r, n)`` and ``r``; 0 for a matrix of zeros.

    Raises:
        UserError: If it is no matrix, or not finite.

    Example:
        >>> A, B, r = rank_factorise(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        >>> A.tolist(), B.tolist(), r
        ([[1.0], [2.0]], [[1.0, 2.0]], 1)
    """
    values = _checked_matrix(matrix)
    rank = numerical_rank(matrix, tol)
    found: list[tuple[Tensor, Tensor]] = []
    threshold = _tolerance(matrix, tol) * float(torch.linalg.matrix_norm(values, 2)) if rank else 0.0
    for columns in (_pivots(values, rank, threshold), _pivots(values, rank, None)):
        if len(columns) == rank:
            basis = values[:, columns]
            found.append((basis, _coordinates(basis, values, columns)))
    errors = [float((basis @ coordinates - values).norm()) for basis, coordinates in found]
    # The first columns, unless they are so nearly dependent that the matrix is lost.
    best = 0 if errors[0] <= 10 * errors[-1] + threshold else len(found) - 1
    kind = matrix.dtype if matrix.is_floating_point() else torch.float64
    basis, coordinates = found[best]
    return basis.to(kind), coordinates.to(kind), rank


def low_rank_saves(m: int, n: int, r: int) -> bool:
    """Whether the factors of an ``m`` x ``n`` matrix of rank ``r`` have fewer numbers: ``r (m + n) < m n``."""
    return r * (m + n) < m * n


def _checked_matrix(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2:
        raise UserError(f"a matrix has 2 dimensions, not the {matrix.ndim} of {tuple(matrix.shape)}; reshape it")
    if not matrix.isfinite().all():
        raise UserError("the matrix holds numbers that are not finite; it has no rank")
    return matrix.detach().double()


def _tolerance(matrix: Tensor, tol: float | None) -> float:
    if tol is not None:
        if not tol >= 0:
            raise UserError(f"tol is {tol}; it is 0 or above")
        return tol
    kind = matrix.dtype if matrix.is_floating_point() else torch.float64
    return max(matrix.shape) * torch.finfo(kind).eps


def _pivots(values: Tensor, rank: int, threshold: float | None) -> list[int]:
    """Columns that are no combination of those chosen: from the left above ``threshold``, or the largest of all."""
    rest = values.clone()
    chosen: list[int] = []
    while len(chosen) < rank:
        sizes = rest.norm(dim=0)
        sizes[chosen] = 0
        column = int(sizes.argmax()) if threshold is None else int((sizes > threshold).int().argmax())
        if sizes[column] <= (threshold or 0.0):
            break
        chosen.append(column)
        direction = rest[:, column] / sizes[column]
        for _ in range(2):  # once leaves rounding
            rest -= direction[:, None] * (direction @ rest)
    return sorted(chosen)


def _coordinates(basis: Tensor, values: Tensor, columns: list[int]) -> Tensor:
    if not columns:
        return values.new_zeros(0, values.shape[1])
    solved: Tensor = torch.linalg.lstsq(basis.cpu(), values.cpu(), driver="gelsd").solution.to(values.device)
    # The coordinates of matrices that people write down are often whole: without rounding the product is exact.
    whole = torch.where((solved - solved.round()).abs() < 1e-9, solved.round() + 0.0, solved)  # no -0
    if (basis @ whole - values).norm() <= (basis @ solved - values).norm():
        solved = whole
    solved[:, columns] = torch.eye(len(columns), dtype=values.dtype, device=values.device)
    return solved


class LowRankLinear(nn.Module):
    """A linear layer as two, ``n -> r -> m``; the bias is the last one's.

    ``weight`` and ``bias`` are what the one layer would have, for code that reads them there.

    Args:
        first: ``n -> r``, without a bias.
        last: ``r -> m``.
    """

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__()
        self.first = first
        self.last = last
        self.in_features = first.in_features
        self.out_features = last.out_features

    @property
    def weight(self) -> Tensor:
        """The product ``(out_features, in_features)`` of the factors."""
        return self.last.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        """That of the last factor."""
        return self.last.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        outputs: Tensor = self.last(self.first(inputs))
        return outputs


class LowRankConv2d(nn.Module):
    """A convolution as two: k x k to r channels and 1 x 1 (channel form), or k x 1 and 1 x k (spatial form).

    ``weight`` and ``bias`` are what the one layer would have, for code that reads them there.

    Args:
        base: The convolution that is replaced; what it says of itself is kept.
        first: To r channels, without a bias.
        last: From r channels.
    """

    def __init__(self, base: nn.Conv2d, first: nn.Conv2d, last: nn.Conv2d) -> None:
        super().__init__()
        self.first = first
        self.last = last
        self.in_channels, self.out_channels, self.groups = base.in_channels, base.out_channels, base.groups
        self.kernel_size, self.stride, self.padding = base.kernel_size, base.stride, base.padding
        self.dilation, self.padding_mode = base.dilation, base.padding_mode

    @property
    def weight(self) -> Tensor:
        """The kernel ``(out_channels, in_channels, height, width)`` that the factors make together."""
        first, last = self.first.weight, self.last.weight
        if last.shape[-1] == 1:
            return torch.einsum("or,rihw->oihw", last[:, :, 0, 0], first)
        return torch.einsum("orw,rih->oihw", last[:, :, 0], first[..., 0])

    @property
    def bias(self) -> Tensor | None:
        """That of the last factor."""
        return self.last.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(batch, in_channels, height, width)`` to what the one convolution mapped it to."""
        outputs: Tensor = self.last(self.first(inputs))
        return outputs


def factorise_linear(layer: nn.Linear, rank: int) -> LowRankLinear:
    """The best approximation of a linear layer by two of ``rank`` units between them.

    Eckart and Young 1936: of all weights of that rank the truncated singular value decomposition ``U S V^T`` is the
    nearest, with the Frobenius error ``sqrt(sum of the squares of the left-out singular values)``. The factors are
    ``U sqrt(S)`` and ``sqrt(S) V^T``.

    Args:
        layer: Maps ``n`` to ``m`` features; it stays as it is.
        rank: In [1, min(m, n)].

    Raises:
        UserError: If the rank is outside of that, or the weight not finite.
    """
    return _factorised(layer, rank, _spectrum(layer, "channel"))  # type: ignore[return-value]


def factorise_conv(layer: nn.Conv2d, rank: int, form: Form = "channel") -> LowRankConv2d:
    """The best approximation of a convolution by two with ``rank`` channels between them.

    Args:
        layer: A convolution without groups; it stays as it is. A subclass that computes more than a convolution with
            its weight will not do, except for a padding of its own in the channel form.
        rank: Of the matrix ``C_out`` x ``C_in k_h k_w`` (channel form: k_h x k_w, then 1 x 1) or ``C_out k_w`` x
            ``C_in k_h`` (spatial form: k_h x 1, then 1 x k_w, each with its part of stride, padding and dilation).
        form: Which.

    Raises:
        UserError: If the rank or the form cannot be, or the weight is not finite.
        NotImplementedError: If the convolution has groups.
    """
    if layer.groups != 1:
        raise NotImplementedError(f"a convolution with {layer.groups} groups is not factorised; leave it out")
    return _factorised(layer, rank, _spectrum(layer, form))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Spectrum:
    """The weight of a layer as a matrix, with what its factors are made from.

    Attributes:
        form: That of the factors.
        matrix: float64 ``(m, n)``.
        left: Orthonormal columns ``(m, min(m, n))``.
        right: ``left^T @ matrix``, whose rows have the lengths ``sigma``, which fall.
        sigma: The singular values.
    """

    form: Form
    matrix: Tensor
    left: Tensor
    right: Tensor
    sigma: Tensor

    def kept(self) -> Tensor:
        """Share of the squared singular values that ranks 1, 2, … keep."""
        energies = self.sigma.square().cumsum(0)
        return energies / energies[-1] if energies[-1] > 0 else torch.ones_like(energies)


def _form_of(layer: nn.Module, form: Form) -> Form:
    """The spatial form splits the padding, so that what pads in its own way has to keep the channel form."""
    return form if type(layer) is nn.Conv2d else "channel"


def _spectrum(layer: nn.Linear | nn.Conv2d, form: Form) -> _Spectrum:
    _check_form(form)
    form = _form_of(layer, form)
    weight = layer.weight.detach().double()
    if not weight.isfinite().all():
        raise UserError("the weight holds numbers that are not finite; it cannot be factorised")
    matrix = weight.permute(0, 3, 1, 2).flatten(0, 1).flatten(1) if form == "spatial" else weight.flatten(1)
    # Of the smaller Gram matrix, which for the large layers of some networks takes seconds instead of minutes. The
    # factors are as exact as those of an SVD, since left @ left^T @ matrix is the matrix however left was found.
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
        right = left.T @ matrix
        sigma = right.norm(dim=1)
    else:
        other = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
        left = matrix @ other
        sigma = left.norm(dim=0)
        left = left / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
        right = sigma[:, None] * other.T
    order = sigma.argsort(descending=True, stable=True)  # rounding may have changed the places of the smallest
    return _Spectrum(form, matrix, left[:, order], right[order], sigma[order])


def _factorised(layer: nn.Linear | nn.Conv2d, rank: int, spectrum: _Spectrum) -> LowRankLinear | LowRankConv2d:
    most = len(spectrum.sigma)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise UserError(f"rank is {rank!r}; for a matrix of {_size(spectrum)} it is a whole number from 1 to {most}")
    root = spectrum.sigma[:rank].sqrt()
    left = spectrum.left[:, :rank] * root
    right = spectrum.right[:rank] / torch.where(root > 0, root, 1.0)[:, None]
    weight, bias = layer.weight, layer.bias

    def parameter(values: Tensor) -> nn.Parameter:
        format = torch.channels_last if _is_channels_last(weight) and values.ndim == 4 else torch.contiguous_format
        return nn.Parameter(values.to(weight).contiguous(memory_format=format), weight.requires_grad)

    first = deepcopy(layer)  # and not a new layer: a subclass may pad in a way of its own
    first.register_parameter("bias", None)
    last: nn.Linear | nn.Conv2d
    if isinstance(first, nn.Linear):
        assert isinstance(layer, nn.Linear)
        first.weight, first.out_features = parameter(right), rank
        last = nn.Linear(rank, layer.out_features, bias is not None, device="meta")
        last.weight = parameter(left)
        _set_bias(last, bias)
        return LowRankLinear(first, last).train(layer.training)
    assert isinstance(layer, nn.Conv2d)
    outputs, inputs, height, width = layer.weight.shape
    if spectrum.form == "channel":
        first.weight, first.out_channels = parameter(right.view(rank, inputs, height, width)), rank
        last = nn.Conv2d(rank, outputs, 1, bias=bias is not None, device="meta")
        last.weight = parameter(left[:, :, None, None])
    else:
        first = _along(layer, inputs, rank, axis=0, bias=False)
        first.weight = parameter(right.view(rank, inputs, height, 1))
        last = _along(layer, rank, outputs, axis=1, bias=bias is not None)
        last.weight = parameter(left.view(outputs, width, rank).transpose(1, 2)[:, :, None])
    _set_bias(last, bias)
    return LowRankConv2d(layer, first, last).train(layer.training)


def _along(layer: nn.Conv2d, inputs: int, outputs: int, axis: int, bias: bool) -> nn.Conv2d:
    """The part of a convolution that goes along one axis: 0 for the height, 1 for the width."""

    def part(sizes: tuple[int, ...], other: int) -> tuple[int, int]:
        return (sizes[0], other) if axis == 0 else (other, sizes[1])

    padding = layer.padding if isinstance(layer.padding, str) else part(layer.padding, 0)
    return nn.Conv2d(
        inputs,
        outputs,
        part(layer.kernel_size, 1),
        part(layer.stride, 1),
        padding,
        part(layer.dilation, 1),
        bias=bias,
        padding_mode=layer.padding_mode,
        device="meta",
    )


def _set_bias(last: nn.Linear | nn.Conv2d, bias: Tensor | None) -> None:
    if bias is not None:
        last.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _size(spectrum: _Spectrum) -> str:
    return " x ".join(map(str, spectrum.matrix.shape))


def _check_form(form: str) -> None:
    if form not in ("channel", "spatial"):
        raise UserError(f"unknown form {form!r}; known: channel, spatial")


@dataclass
class LowRankConfig:
    """How a trained network is compressed: which layers, and to which ranks.

    One of ``energy``, ``flops`` and ``rank`` decides; without any, ``energy`` is 0.95. A layer is left alone where its
    factors would have as many parameters or operations as it has.

    Args:
        energy: In (0, 1]: each layer gets the smallest rank that keeps this share of its squared singular values.
        flops: In (0, 1): the network keeps at most this share of its operations. Ranks are those with the least sum of
            the layers' lost shares of squared singular values, up to what a Lagrange multiplier can reach.
        rank: The same rank for all.
        form: ``channel`` (k x k to r channels, then 1 x 1) or ``spatial`` (k x 1, then 1 x k) for convolutions.
        target_modules: ``auto`` (all but the first and the last layer), ``conv`` or ``linear`` (the same, of one kind),
            a regular expression that matches whole names, or a list of names or of their last parts.
        fold_batchnorm: Whether batch norms behind layers are made a part of them first.
        ranks: Ranks by the names of layers; then nothing is chosen. A report's ``plan`` has them.
        folded: Names of layers by those of the batch norms that are folded into them, likewise.

    Raises:
        UserError: If a value is outside its range, or several decide.
    """

    energy: float | None = None
    flops: float | None = None
    rank: int | None = None
    form: Form = "channel"
    target_modules: str | list[str] = "auto"
    fold_batchnorm: bool = True
    ranks: dict[str, int] | None = None
    folded: dict[str, str] | None = None

    def __post_init__(self) -> None:
        _check_form(self.form)
        given = [name for name in ("energy", "flops", "rank") if getattr(self, name) is not None]
        if len(given) > 1 and self.ranks is None:
            raise UserError(f"{' and '.join(given)} are given, each of which decides about the ranks; give one of them")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy is {self.energy}; it is a share in (0, 1] of the squared singular values")
        if self.flops is not None and not 0 < self.flops < 1:
            raise UserError(f"flops is {self.flops}; it is a share in (0, 1) of the operations")
        for name, rank in [("rank", self.rank), *(self.ranks or {}).items()]:
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise UserError(f"{name} is {rank!r}; a rank is a whole number from 1")


@dataclass(frozen=True)
class LowRankLayer:
    """What became of a layer.

    Attributes:
        name: Its name in the network.
        kind: Its class.
        shape: Of its weight.
        rank: That it got, or None where it was left alone.
        full_rank: The largest possible.
        energy: Share of the squared singular values that is kept.
        error: Frobenius norm of what is lost, as a share of the weight's.
        parameters: Before and after.
        flops: Operations for one image, before and after.
        reason: Why it was left alone, or empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    full_rank: int
    energy: float
    error: float
    parameters: tuple[int, int]
    flops: tuple[int, int]
    reason: str = ""


@dataclass(frozen=True)
class LowRankReport:
    """What became of a network.

    Attributes:
        layers: Those that were looked at, in the order of execution.
        plan: Arguments of a :class:`LowRankConfig` that makes the same layers again from the same network with any
            weights, as before a checkpoint is loaded; numbers, texts and dictionaries only.
        parameters: Of the network, before and after.
        flops: Operations of the network for one image, before and after.
    """

    layers: list[LowRankLayer]
    plan: dict[str, Any]
    parameters: tuple[int, int]
    flops: tuple[int, int]

    def __str__(self) -> str:
        done = [layer for layer in self.layers if layer.rank is not None]
        before, after = self.parameters
        lines = [
            f"low rank: {len(done)} of {len(self.layers)} layers factorised, {len(self.plan['folded'])} batch norms "
            f"folded; parameters {before:,} to {after:,} ({after / max(1, before):.1%}), operations {self.flops[0]:,} "
            f"to {self.flops[1]:,} ({self.flops[1] / max(1, self.flops[0]):.1%})"
        ]
        for layer in self.layers:
            became = f"rank {layer.rank} of {layer.full_rank}, {layer.energy:.1%} of the energy"
            lines.append(f"  {layer.name} {list(layer.shape)}: {became if layer.rank is not None else layer.reason}")
        return "\n".join(lines)


@dataclass
class _Call:
    """One execution of a layer: what came in and went out; keeping it keeps the identities of tensors unique."""

    name: str
    module: nn.Module
    given: Tensor
    result: Tensor


_LAYERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and attention by its modules instead of one fused call; restored after."""
    flags = {module: module.training for module in network.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    network.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in flags.items():
            module.training = flag


def _trace(network: nn.Module, image: Tensor) -> tuple[list[_Call], Tensor]:
    """The calls of linear layers, convolutions and batch norms, in order, and the network's outputs."""
    calls: list[_Call] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                calls.append(_Call(name, module, inputs[0], output))

        return note

    kinds = (*_LAYERS, *_NORMS)
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with _evaluating(network):
            outputs: Tensor = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs


def fold_batchnorm(network: nn.Module, image: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """Make batch norms that follow layers a part of these, as evaluation mode computes them.

    A pair is found where a norm is given the very tensor that a layer has returned. Whether something else uses that
    tensor too, or the layer computes more than its weight says, no pass can tell; each pair is hence folded in float64
    and taken back when the network's outputs change.

    Args:
        network: It stays as it is.
        image: Images ``(batch, channels, height, width)`` that the network takes; values near those of real images.

    Returns:
        A copy with ``nn.Identity`` in the place of the norms (what a norm of timm does behind its norm stays), and the
        names of the layers by those of their norms.
    """
    copied = deepcopy(network)
    types = {name: tensor.dtype for name, tensor in copied.state_dict(keep_vars=True).items()}
    exact = _in_double(copied, image)
    image = image.double() if exact else image
    calls, before = _trace(copied, image)
    names = Counter(call.name for call in calls)
    made = {id(call.result): call for call in calls if isinstance(call.module, _LAYERS)}
    folded: dict[str, str] = {}
    for call in calls:
        source = made.get(id(call.given))
        if not isinstance(call.module, _NORMS) or source is None or names[call.name] > 1 or names[source.name] > 1:
            continue
        kept = source.module.weight, source.module.bias
        if not _fold(copied, source.name, call.name):
            continue
        with _evaluating(copied):
            after: Tensor = copied(image)
        if _agree(before, after, 1e-9 if exact else 1e-4):
            folded[call.name] = source.name
        else:
            source.module.weight, source.module.bias = kept
            _replace(copied, call.name, call.module)
    _restore_types(copied, types, next((kind for kind in types.values() if kind.is_floating_point), torch.float32))
    return copied, folded


def _in_double(network: nn.Module, image: Tensor) -> bool:
    """Make the network float64, unless it computes in a fixed type."""
    kinds = {name: tensor.dtype for name, tensor in network.state_dict(keep_vars=True).items()}
    network.double()
    try:
        with _evaluating(network):
            network(image.double())
    except RuntimeError:
        _restore_types(network, kinds, torch.float32)
        return False
    return True


def _restore_types(network: nn.Module, kinds: dict[str, torch.dtype], default: torch.dtype) -> None:
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(kinds.get(name, default))
    for name, buffer in network.named_buffers():  # those that no state dict has
        if name not in network.state_dict(keep_vars=True) and buffer.dtype == torch.float64:
            buffer.data = buffer.data.to(default)


def _agree(before: Tensor, after: Tensor, tolerance: float) -> bool:
    difference = (before - after).abs().max()
    return bool(difference <= tolerance * before.abs().max().clamp_min(1e-30))


def _fold(network: nn.Module, layer_name: str, norm_name: str) -> bool:
    """Fold a norm into a layer, in place; False where its kind or its state does not allow it."""
    layer, norm = network.get_submodule(layer_name), network.get_submodule(norm_name)
    assert isinstance(layer, _LAYERS)
    assert isinstance(norm, _NORMS)
    if "weight" not in layer._parameters or norm.running_mean is None or norm.running_var is None:
        return False
    behind: list[Any] = [getattr(norm, child, None) for child in ("drop", "act")]  # of timm's BatchNormAct2d
    if type(norm) in _NORMS:
        rest: nn.Module = nn.Identity()
    elif all(isinstance(child, nn.Module) for child in behind):
        rest = nn.Sequential(*behind)
    else:
        return False
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
        shift = shift if layer.bias is None else shift + layer.bias * scale
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(layer.weight.dtype), layer.weight.requires_grad)
    _replace(network, norm_name, rest.train(norm.training))
    return True


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


@dataclass
class _Candidate:
    """A layer that may be factorised, with what each rank would lose and cost."""

    name: str
    layer: nn.Linear | nn.Conv2d
    spectrum: _Spectrum
    parameters: int  # of a rank
    flops: int  # of a rank
    base_flops: int

    @property
    def base_parameters(self) -> int:
        return self.layer.weight.numel()

    @property
    def largest(self) -> int:
        """The largest rank that saves both parameters and operations; 0 where none does."""
        most = (self.base_parameters - 1) // self.parameters
        if self.base_flops:
            most = min(most, (self.base_flops - 1) // self.flops)
        return min(most, len(self.spectrum.sigma))


def low_rank_network(
    network: nn.Module, config: LowRankConfig, image: Tensor | None = None
) -> tuple[nn.Module, LowRankReport]:
    """Compress a trained network by truncated singular value decompositions of its layers.

    Batch norms are folded first, then the ranks are chosen, and each layer that is made smaller by its rank is
    replaced by two. A layer is left alone where its factors would not save, where it is not called (its weight may be
    used otherwise), shares its weight, has groups, or computes more than its weight says (which is tried).

    Args:
        network: It stays as it is.
        config: How.
        image: Images ``(batch, channels, height, width)`` that the network takes; random ones will do. With ``ranks``
            and ``folded`` in the configuration none is needed, and operations are then not counted.

    Returns:
        A compressed copy, in the modes of the original, and what became of it.

    Raises:
        UserError: If no layer can be made smaller, a name or a rank cannot be, the budget cannot be reached, or a
            weight is not finite; each says what would do.

    Example:
        >>> small, report = low_rank_network(network, LowRankConfig(energy=0.9), images)  # doctest: +SKIP
        >>> network.load_state_dict(...)  # doctest: +SKIP
        >>> again, _ = low_rank_network(network, LowRankConfig(**report.plan))  # doctest: +SKIP
    """
    before = sum(parameter.numel() for parameter in network.parameters())
    if config.ranks is not None and (config.folded is not None or not config.fold_batchnorm):
        return _exactly(network, config, before)
    if image is None:
        raise UserError("an image is needed to choose layers and ranks; give images that the network takes")
    image = image.to(next((parameter.device for parameter in network.parameters()), image.device))
    flops = _flops(network, image)
    copied, folded = fold_batchnorm(network, image) if config.fold_batchnorm else (deepcopy(network), {})
    calls, _ = _trace(copied, image)
    names = _targets(copied, config, calls, image)
    candidates, rows = [], []
    for name in names:
        found = _candidate(copied, name, config.form, [call for call in calls if call.name == name])
        if isinstance(found, _Candidate):
            candidates.append(found)
        else:
            rows.append(found)
    ranks = _chosen(candidates, config, flops)
    for each in candidates:
        rank = ranks[each.name]
        rows.append(_row(each, rank, _reason(each, config) if rank is None else ""))
        if rank is not None:
            _replace(copied, each.name, _factorised(each.layer, rank, each.spectrum))
    done = {name: rank for name, rank in ranks.items() if rank is not None}
    if not done:
        raise UserError(_nothing(candidates, rows, config))
    order = {name: place for place, name in enumerate(names)}
    plan = {"form": config.form, "ranks": done, "folded": folded}
    after = sum(parameter.numel() for parameter in copied.parameters())
    rows.sort(key=lambda row: order[row.name])
    return copied, LowRankReport(rows, plan, (before, after), (flops, _flops(copied, image)))


def _exactly(network: nn.Module, config: LowRankConfig, before: int) -> tuple[nn.Module, LowRankReport]:
    """The network of a plan, whatever its weights are."""
    copied = deepcopy(network)
    modules = dict(copied.named_modules())
    folded = config.folded or {}
    ranks = config.ranks or {}
    for name in (*folded, *folded.values(), *ranks):
        wanted = _NORMS if name in folded else _LAYERS
        if not isinstance(modules.get(name), wanted):
            raise UserError(
                f"the network has no {' or '.join(kind.__name__ for kind in wanted)} called {name!r}; ranks are those "
                "of another network"
            )
    for norm, layer in folded.items():
        _fold(copied, layer, norm)
    rows = []
    for name, rank in ranks.items():
        found = _candidate(copied, name, config.form, [])
        if not isinstance(found, _Candidate):
            raise UserError(f"{name} cannot be factorised: {found.reason}; leave it out of ranks")
        if rank > len(found.spectrum.sigma):
            raise UserError(f"ranks has {rank} for {name}, whose largest rank is {len(found.spectrum.sigma)}")
        rows.append(_row(found, rank, ""))
        _replace(copied, name, _factorised(found.layer, rank, found.spectrum))
    after = sum(parameter.numel() for parameter in copied.parameters())
    plan = {"form": config.form, "ranks": dict(ranks), "folded": dict(folded)}
    return copied, LowRankReport(rows, plan, (before, after), (0, 0))


def _flops(network: nn.Module, image: Tensor) -> int:
    with _evaluating(network), FlopCounterMode(display=False) as counter:
        network(image[:1])
    return int(counter.get_total_flops())


def _targets(network: nn.Module, config: LowRankConfig, calls: list[_Call], image: Tensor) -> list[str]:
    called = list(dict.fromkeys(call.name for call in calls if isinstance(call.module, _LAYERS)))
    known = [name for name, module in network.named_modules() if isinstance(module, _LAYERS)]
    if config.ranks is not None:
        wanted = list(config.ranks)
    elif config.target_modules in ("auto", "conv", "linear"):
        kinds = {"auto": _LAYERS, "conv": (nn.Conv2d,), "linear": (nn.Linear,)}[str(config.target_modules)]
        wanted = [name for name in called[1:-1] if isinstance(network.get_submodule(name), kinds)]
    elif isinstance(config.target_modules, str):
        wanted = [name for name in known if re.fullmatch(config.target_modules, name)]
    else:
        ends = tuple(config.target_modules)
        wanted = [name for name in known if any(name == end or name.endswith(f".{end}") for end in ends)]
    missing = set(wanted) - set(known)
    if missing or not wanted:
        raise UserError(
            f"no layer matches {', '.join(sorted(missing)) or config.target_modules!r}; layers that can be factorised: "
            f"{', '.join(known) or 'none'}"
        )
    return sorted(wanted, key=lambda name: called.index(name) if name in called else len(called))


def _candidate(network: nn.Module, name: str, form: Form, calls: list[_Call]) -> _Candidate | LowRankLayer:
    """The layer with its spectrum, or the row that says why it is left alone."""
    layer = network.get_submodule(name)
    assert isinstance(layer, _LAYERS)
    reason = _refusal(network, name, layer)
    if not reason:
        try:
            spectrum = _spectrum(layer, form)
        except UserError:
            raise UserError(
                f"the weight of {name} holds numbers that are not finite; it cannot be factorised"
            ) from None
        if calls and not _is_linear_in_weight(layer, spectrum, calls[0].given):
            reason = "it computes more than its weight says"
        else:
            base_flops = sum(_layer_flops(layer, call.given) for call in calls)
            one = _factorised(layer, 1, spectrum)
            flops = sum(_layer_flops(one, call.given) for call in calls)
            parameters = one.first.weight.numel() + one.last.weight.numel()
            return _Candidate(name, layer, spectrum, parameters, flops, base_flops)
    weight = layer.weight.numel()
    return LowRankLayer(
        name,
        type(layer).__name__,
        tuple(layer.weight.shape),
        None,
        min(layer.weight.shape[0], weight // layer.weight.shape[0]),
        1.0,
        0.0,
        (weight, weight),
        (0, 0),
        reason,
    )


def _refusal(network: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> str:
    parent = network.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "attention uses its weight without calling it"
    if "weight" not in layer._parameters:
        return "its weight is computed from others"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"it has {layer.groups} groups"
    owners = [
        module
        for _, module in network.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is layer.weight
    ]
    return "it shares its weight" if len(owners) > 1 else ""


def _layer_flops(layer: nn.Module, given: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(given[:1])
    return int(counter.get_total_flops())


def _is_linear_in_weight(layer: nn.Linear | nn.Conv2d, spectrum: _Spectrum, given: Tensor) -> bool:
    """Whether the factors give what the layer gives with their product as its weight, at half the largest rank."""
    if type(layer) in _LAYERS:
        return True
    factors = _factorised(layer, max(1, len(spectrum.sigma) // 2), spectrum)
    with torch.no_grad():
        expected = torch.func.functional_call(layer, {"weight": factors.weight}, (given[:1],))
        try:
            outputs = factors(given[:1])
        except RuntimeError:  # a weight of another size does not go with the rest of it
            return False
        return outputs.shape == expected.shape and _agree(expected, outputs, 1e-4)


def _row(each: _Candidate, rank: int | None, reason: str) -> LowRankLayer:
    energies = each.spectrum.sigma.square()
    lost = 0.0 if rank is None else float(energies[rank:].sum() / energies.sum().clamp_min(1e-300))
    return LowRankLayer(
        each.name,
        type(each.layer).__name__,
        tuple(each.layer.weight.shape),
        rank,
        len(each.spectrum.sigma),
        1.0 - lost,
        lost**0.5,
        (each.base_parameters, each.base_parameters if rank is None else rank * each.parameters),
        (each.base_flops, each.base_flops if rank is None else rank * each.flops),
        reason,
    )


def _chosen(candidates: list[_Candidate], config: LowRankConfig, flops: int) -> dict[str, int | None]:
    if config.ranks is not None:
        for each in candidates:
            if config.ranks[each.name] > len(each.spectrum.sigma):
                raise UserError(
                    f"ranks has {config.ranks[each.name]} for {each.name}, whose largest rank is "
                    f"{len(each.spectrum.sigma)}"
                )
        return {each.name: config.ranks[each.name] for each in candidates}
    if config.flops is not None:
        return _by_budget(candidates, config.flops, flops)
    ranks: dict[str, int | None] = {}
    for each in candidates:
        rank = _wanted(each, config)
        ranks[each.name] = rank if rank <= each.largest else None
    return ranks


def _wanted(each: _Candidate, config: LowRankConfig) -> int:
    if config.rank is not None:
        return config.rank
    enough = each.spectrum.kept() >= (ENERGY if config.energy is None else config.energy) - 1e-12
    return int(enough.int().argmax()) + 1


def _by_budget(candidates: list[_Candidate], share: float, flops: int) -> dict[str, int | None]:
    """Minimise the sum of lost energies + price x operations, layer by layer, at the lowest price within the budget."""
    tables = []
    for each in candidates:
        ranks = torch.arange(1, each.largest + 1)
        lost = torch.cat([torch.zeros(1), (1 - each.spectrum.kept()[: each.largest]).cpu().float()]).double()
        costs = torch.cat([torch.tensor([each.base_flops]), ranks * each.flops]).double()
        tables.append((lost, costs))
    others = flops - sum(each.base_flops for each in candidates)

    def at(price: float) -> tuple[list[int], float]:
        picked = [int((lost + price * costs).argmin()) for lost, costs in tables]
        return picked, others + sum(float(costs[pick]) for pick, (_, costs) in zip(picked, tables, strict=True))

    low, high = 0.0, 2.0  # a price at which a single operation is worth more than any energy
    picked, least = at(high)
    if least > share * flops:
        raise UserError(
            f"flops is {share:g}, but with rank 1 everywhere {least / flops:.3f} of the operations are left; give more "
            "than that, or more target_modules"
        )
    for _ in range(100):
        price = (low * high) ** 0.5 if low else high / 16
        tried, total = at(price)
        if total <= share * flops:
            picked, high = tried, price
        else:
            low = price
        if not low and price < 1e-30:
            break
    return {each.name: pick or None for each, pick in zip(candidates, picked, strict=True)}


def _reason(each: _Candidate, config: LowRankConfig) -> str:
    if config.flops is not None:
        return "the budget is met without it"
    return f"rank {_wanted(each, config)} would not save (at most {each.largest} does)"


def _nothing(candidates: list[_Candidate], rows: list[LowRankLayer], config: LowRankConfig) -> str:
    able = [each for each in candidates if each.largest]
    if not able:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows[:5])
        return f"no layer can be made smaller ({reasons or 'none was found'}); give other target_modules"
    if config.rank is not None:
        most = max(each.largest for each in able)
        return f"rank {config.rank} makes no layer smaller; give {most} or less"
    best = max(float(each.spectrum.kept()[each.largest - 1]) for each in able)
    energy = ENERGY if config.energy is None else config.energy
    return f"with an energy of {energy:g} no layer gets smaller; give {int(best * 1000) / 1000:g} or less"
