"""Matrices and layers as products of two: the exact factorisation by rank, and the truncated SVD of layers.

Letters: a weight as a matrix `W` is `m` x `n`, of rank `r`; its factors are `A`, `m` x `r`, and `B`, `r` x `n`.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_automl.rundir import UnsupportedError, UserError

Form = Literal["channel", "spatial"]


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
    return factorised(layer, rank, spectrum_of(layer, "channel"))  # type: ignore[return-value]


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
        UnsupportedError: If the convolution has groups.
    """
    if layer.groups != 1:
        raise UnsupportedError(f"a convolution with {layer.groups} groups is not factorised; leave it out")
    return factorised(layer, rank, spectrum_of(layer, form))  # type: ignore[return-value]


@dataclass(frozen=True)
class Spectrum:
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


def spectrum_of(layer: nn.Linear | nn.Conv2d, form: Form) -> Spectrum:
    """The singular values of a layer's weight, and what factors of any rank are made from.

    Raises:
        UserError: If the form is unknown or the weight not finite.
    """
    check_form(form)
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
    return Spectrum(form, matrix, left[:, order], right[order], sigma[order])


def factorised(layer: nn.Linear | nn.Conv2d, rank: int, spectrum: Spectrum) -> LowRankLinear | LowRankConv2d:
    """The two layers of a rank that stand for a layer.

    Raises:
        UserError: If the rank is not in [1, min(m, n)].
    """
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


def _size(spectrum: Spectrum) -> str:
    return " x ".join(map(str, spectrum.matrix.shape))


def check_form(form: str) -> None:
    """Raise a UserError if there is no such form."""
    if form not in ("channel", "spatial"):
        raise UserError(f"unknown form {form!r}; known: channel, spatial")
