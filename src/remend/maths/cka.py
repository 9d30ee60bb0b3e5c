"""How alike two models' representations of the same tokens are: debiased CKA and the measures shown beside it.

Legend: N rows (the same tokens on both sides), D width of x, E width of y, L layers of x, M layers of y, P pairs of
rows, S subsets of the rows, G groups of rows.

Linear CKA is HSIC(X, Y) / √(HSIC(X, X) · HSIC(Y, Y)) (arXiv 1905.00414). Its plain estimator is high for
unrelated features once the widths near the number of rows (arXiv 2405.01012); here the unbiased HSIC₁ of Song et al.
2012 (JMLR 13) stands in all three places (arXiv 2010.15327), so a value can be slightly below 0. With K̃ and
L̃ the two Grams with zeros on their diagonals, and U-centring U (arXiv 1310.2926) that makes every row sum to 0,

    n(n − 3) · HSIC₁ = tr(K̃L̃) + 1ᵀK̃1 · 1ᵀL̃1 / ((n − 1)(n − 2)) − 2/(n − 2) · 1ᵀK̃L̃1 = Σ U(K̃) ∘ U(L̃)

Inputs have any float dtype; results are computed in float64 on the first one's device (on the CPU for mps). A value is
NaN where a side is constant, or all its rows but one are equal: nothing can be compared. InputError is raised where two
sides are not matrices with the same number of rows, rows are fewer than 4, or a number is not finite.

Two outlier rows or one outlier dimension that both sides share make any two representations alike: which rows to take
is for the caller to settle. They should be independent of one another, say one token a sequence, and none drawn twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from remend.errors import InputError
from remend.maths.intervals import student_t

_NOISE = 1e-13
"""Share of a mean up to which a distance from it is rounding noise of float64."""
_NIL = 1e-12
"""Share of (Σ‖x − shift‖²)² up to which n(n − 3) · HSIC₁(X, X) is rounding noise of sums."""


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def debiased_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Debiased linear CKA (arXiv 2010.15327): 1 is equal up to rotation, scale and translation.

    From Grams when there are fewer rows than columns on the wider side (32 N² bytes of memory), else from sums as in
    StreamingCKA. dtype, NaN and errors: module docstring.
    """
    _check_shapes(4, x=x_ND, y=y_NE)
    if len(x_ND) < max(x_ND.shape[1], y_NE.shape[1]):
        k_NN, l_NN = _grams(x=x_ND, y=y_NE)
        return float(_ratio((k_NN * l_NN).sum(), k_NN.square().sum(), l_NN.square().sum()))
    sums = StreamingCKA()
    sums.update(x_ND, y_NE)
    return sums.value()


class StreamingCKA:
    """Debiased linear CKA in one pass, exact: any chunks and processes give the same number as all rows at once.

    With [x, 1, ‖x‖²] and [y, 1, ‖y‖²] for each row, all that HSIC₁ needs is the sum of their outer products. Rows are
    counted from the first chunk's mean: HSIC₁ doesn't change with a translation, its rounding error does. The ratio is
    taken once. Memory is 8 (D² + E² + DE) bytes, 8 MB for two of width 576, 308 MB for 3,584; half more in `update`.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def update(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Add a chunk of any number of rows. Raises InputError if it doesn't fit those before; module docstring."""
        x_ND, y_NE = _checked(0, x=x_ND, y=y_NE)
        if not len(x_ND):
            return
        if not self._tensors:
            self._tensors = {"shift_x": x_ND.mean(0), "shift_y": y_NE.mean(0)}
        x_D, y_E = self._shifts(x_ND.shape[1], y_NE.shape[1])
        x_ND, y_NE = _extended(_minus(x_ND.to(x_D.device), x_D)), _extended(_minus(y_NE.to(x_D.device), y_E))
        for name, left, right in (("xy", x_ND, y_NE), ("xx", x_ND, x_ND), ("yy", y_NE, y_NE)):
            self._tensors[name] = self._tensors.get(name, 0) + left.T @ right

    def merge(self, other: StreamingCKA) -> None:
        """Add the rows of `other`, its sums moved to this one's shifts. Raises InputError when the widths differ."""
        if not self._tensors or not other._tensors:
            self._tensors = {name: tensor.clone() for name, tensor in (self._tensors or other._tensors).items()}
            return
        x_D, y_E = self._shifts(len(other._tensors["shift_x"]), len(other._tensors["shift_y"]))
        its = {name: tensor.to(x_D.device) for name, tensor in other._tensors.items()}
        x_move, y_move = _move(_minus(x_D, its["shift_x"])), _move(_minus(y_E, its["shift_y"]))
        for name, left, right in (("xy", x_move, y_move), ("xx", x_move, x_move), ("yy", y_move, y_move)):
            self._tensors[name] = self._tensors[name] + left @ its[name] @ right.T

    def value(self) -> float:
        """CKA of all rows so far. Raises InputError with fewer than 4."""
        _check_rows(int(self._tensors["xx"][-2, -2]) if self._tensors else 0, 4)
        own = [_unless_noise(_hsic_of_sums(sums), sums[-1, -2]) for sums in (self._tensors["xx"], self._tensors["yy"])]
        return float(_ratio(_hsic_of_sums(self._tensors["xy"]), *own))

    def _shifts(self, *widths: int) -> tuple[Tensor, Tensor]:
        x_D, y_E = self._tensors["shift_x"], self._tensors["shift_y"]
        if widths != (len(x_D), len(y_E)):
            raise InputError(f"the widths are {widths} and were {len(x_D), len(y_E)}; take one for each pair of layers")
        return x_D, y_E


def _extended(x_ND: Tensor) -> Tensor:
    """[x, 1, ‖x‖²] for each row."""
    return torch.cat([x_ND, torch.ones_like(x_ND[:, :1]), x_ND.square().sum(1, keepdim=True)], dim=1)


def _move(c_D: Tensor) -> Tensor:
    """The matrix that takes [x, 1, ‖x‖²] to [x − c, 1, ‖x − c‖²], ‖x − c‖² being ‖x‖² − 2c·x + ‖c‖²."""
    move = torch.eye(len(c_D) + 2, dtype=c_D.dtype, device=c_D.device)
    move[:-2, -2], move[-1, :-2], move[-1, -2] = -c_D, -2 * c_D, c_D @ c_D
    return move


def _hsic_of_sums(sums: Tensor) -> Tensor:
    """n(n − 3) · HSIC₁ from the sum of outer products: tr(K̃L̃) = ‖XᵀY‖² − Σ‖x‖²‖y‖², and so on for the other terms."""
    xy_DE, x_D, bx_D = sums[:-2, :-2], sums[:-2, -2], sums[:-2, -1]
    (y_E, n, b), (ay_E, a, ab) = ((row[:-2], row[-2], row[-1]) for row in (sums[-2], sums[-1]))
    ones = (x_D @ x_D - a) * (y_E @ y_E - b) / ((n - 1) * (n - 2))
    mixed = x_D @ xy_DE @ y_E - y_E @ ay_E - x_D @ bx_D + ab
    total: Tensor = xy_DE.square().sum() - ab + ones - 2 / (n - 2) * mixed
    return total


def cka_grid(x_LND: Sequence[Tensor], y_MNE: Sequence[Tensor]) -> Tensor:
    """Debiased CKA of every layer of one model with every layer of another, from flattened Grams.

    x_LND, y_MNE: a matrix [N, width] for each layer; widths may differ. Returns float64 [L, M]. Memory: 4 N² bytes for
    each layer of x (below the diagonal) and one of y: 0.25 GB for 30 layers at N = 1,024. InputError: also no layers.
    """
    _check_layers(x_LND, y_MNE)
    i_P, j_P = torch.tril_indices(len(x_LND[0]), len(x_LND[0]), offset=-1)
    xs = [2 * gram[i_P, j_P] for gram in _unit_grams("x", x_LND)]
    ys = (gram[i_P, j_P].to(xs[0].device) for gram in _unit_grams("y", y_MNE))
    return torch.stack([torch.stack([x_P.dot(y_P) for x_P in xs]) for y_P in ys], dim=1)


def jackknife(x_ND: Tensor, y_NE: Tensor, *, groups: int = 20, seed: int = 0, level: float = 0.95) -> Estimate:
    """Debiased CKA with a delete-group jackknife interval (Kott 2001, Journal of Official Statistics 17).

    Rows are dealt into G groups by chance (`seed`); each is left out once. With θ_g the CKA of the rest, variance is
    (G − 1)/G · Σ (θ_g − mean θ)² and the interval CKA ± t · √variance, with Student's t of G − 1 degrees of freedom for
    a coverage of `level`. A bootstrap would not do: it draws rows twice, and equal rows count as likeness.

    The interval is not clipped at 1; bounds are NaN where CKA is without one of the groups. It takes 32 N² bytes.
    InputError: groups is not 2 to N or leaves fewer than 4 rows, level is not between 0 and 1; module docstring.
    """
    k_NN, l_NN = _grams(x=x_ND, y=y_NE)
    return _interval(_cka_of_subsets(k_NN, l_NN, _leave_out(k_NN, groups, seed)), level)


def jackknife_difference(
    x_ND: Tensor, a_ND: Tensor, b_ND: Tensor, *, groups: int = 20, seed: int = 0, level: float = 0.95
) -> Estimate:
    """CKA(x, b) − CKA(x, a) with its delete-group jackknife interval, both on the same rows and the same groups.

    With x a reference, a the degraded and b the recovered model: how much nearer to the reference recovery came. Widths
    may differ. `groups`, `seed`, `level`, NaN and errors are those of `jackknife`; 40 N² bytes of memory.
    """
    k_NN, a_NN, b_NN = _grams(x=x_ND, a=a_ND, b=b_ND)
    keep_NS = _leave_out(k_NN, groups, seed)
    return _interval(_cka_of_subsets(k_NN, b_NN, keep_NS) - _cka_of_subsets(k_NN, a_NN, keep_NS), level)


def permutation_null(
    x_LND: Sequence[Tensor], y_LND: Sequence[Tensor], *, permutations: int = 200, seed: int = 0
) -> Tensor:
    """The largest debiased CKA over layers with y's rows shuffled, the same in all layers: how unrelated models look.

    A layer above their 95% quantile is related at 5% for all layers together (the maximum statistic of Westfall and
    Young 1993). Layer l of x goes with layer l of y. Shuffled Grams are float32, results within 1e-6; it takes about
    2 ns · L · permutations · N² on one core, 13 s for 30 layers at N = 1,024.

    Returns float64 [permutations] on the CPU; layers that are NaN don't count, NaN where all are. InputError: not as
    many layers on both sides, or none, permutations below 1; module docstring.
    """
    _check_layers(x_LND, y_LND)
    if len(x_LND) != len(y_LND) or permutations < 1:
        counts = f"{len(x_LND)} and {len(y_LND)} layers and {permutations} permutations"
        raise InputError(f"got {counts}; allowed is as many layers on both sides, and 1 permutation or more")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x_LND[0]), generator=generator) for _ in range(permutations)]
    largest = torch.full((permutations,), math.nan, dtype=torch.float64)
    for k_NN, l_NN in zip(_unit_grams("x", x_LND), _unit_grams("y", y_LND), strict=True):
        k_flat, l_NN = k_NN.float().flatten(), l_NN.float().to(k_NN.device)
        shuffled = (l_NN.index_select(0, o).index_select(1, o).flatten() for o in (o.to(l_NN.device) for o in orders))
        largest = torch.fmax(largest, torch.stack([torch.dot(k_flat, flat) for flat in shuffled]).double().cpu())
    return largest


def relative_l2(x_ND: Tensor, y_ND: Tensor) -> float:
    """‖Y − X‖ / ‖X‖ (Frobenius): 0 is equal. NaN where the widths differ or x is all zeros; 1 row is enough."""
    x_ND, y_ND = _checked(1, x=x_ND, y=y_ND)
    if x_ND.shape != y_ND.shape or not x_ND.any():
        return math.nan
    return float(torch.linalg.vector_norm(y_ND - x_ND) / torch.linalg.vector_norm(x_ND))


def procrustes(x_ND: Tensor, y_NE: Tensor) -> float:
    """Orthogonal Procrustes distance 1 − ‖XᵀY‖_* of centred sides of unit norm: half that of arXiv 2108.01661.

    0 is equal up to rotation, scale and translation, 1 is unrelated; it is biased to 0 once the widths near N. A side
    wider than N is first rotated into N columns, which changes nothing. NaN where one is constant; 2 rows are enough.
    """
    sides = []
    for side in _checked(2, x=x_ND, y=y_NE):
        centred = _minus(side, side.mean(0))
        if not centred.any():
            return math.nan
        centred /= torch.linalg.vector_norm(centred)
        sides.append(centred if side.shape[1] <= len(side) else torch.linalg.qr(centred.T, mode="r").R.T)
    return min(max(1.0 - float(torch.linalg.svdvals(sides[0].T @ sides[1]).sum()), 0.0), 1.0)


def mutual_knn(x_ND: Tensor, y_NE: Tensor, *, k: int = 10) -> float:
    """Mean share of a row's k nearest neighbours that it has on both sides (arXiv 2405.07987).

    As there, near is a large inner product of rows of unit length (cosine; nothing is centred). A row is not its own
    neighbour, ties go either way, unrelated sides share k / (N − 1) on average. InputError: k is not 1 to N − 1; module
    docstring, but 2 rows are enough.
    """
    x_ND, y_NE = _checked(2, x=x_ND, y=y_NE)
    rows = len(x_ND)
    if not 1 <= k < rows:
        raise InputError(f"k is {k} for {rows} rows; allowed is 1 to {rows - 1}: a row is not its own neighbour")
    near = torch.zeros(rows, rows, dtype=torch.uint8, device=x_ND.device)
    for side in (x_ND, y_NE):
        unit = functional.normalize(side, dim=1, eps=torch.finfo(side.dtype).tiny)
        places = (unit @ unit.T).fill_diagonal_(-math.inf).topk(k, dim=1).indices
        near.scatter_add_(1, places, torch.ones_like(places, dtype=torch.uint8))
    return int((near == 2).sum()) / (rows * k)


def cka_alignment(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """Debiased linear CKA of a minibatch as a training signal (arXiv 2606.05682), differentiable; 1 is aligned.

    x_ND: the student's features; computed in float32, or float64 if given so, also under autocast. y_NE: the teacher's
    of the same tokens, on the same device; no gradient flows to them. Returns a scalar with a gradient at x, 0 and no
    gradient where a side is constant but for rounding. Numbers that are not finite are not looked for (a GPU would have
    to wait). InputError: shapes don't fit, or fewer than 4 rows.
    """
    _check_shapes(4, x=x_ND, y=y_NE)
    dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
    grams, varies = [], []
    with torch.autocast(x_ND.device.type, enabled=False):
        for side in (x_ND.to(dtype), y_NE.detach().to(dtype)):
            centred = side - side.mean(0)
            noise = 16 * torch.finfo(dtype).eps * torch.linalg.vector_norm(side.detach()) + torch.finfo(dtype).tiny
            norm = torch.linalg.vector_norm(centred)
            varies.append(norm > noise)
            grams.append(_u_centred_gram(centred / torch.maximum(norm, noise)))
        own = [gram.square().sum().clamp(min=_NIL).sqrt() for gram in grams]
        value = (grams[0] * grams[1]).sum() / (own[0] * own[1])
        return torch.where(varies[0] & varies[1], value, 0.0)


def _check_shapes(least: int, **sides: Tensor) -> None:
    first, shape = next((name, side.shape) for name, side in sides.items())
    for name, side in sides.items():
        if side.ndim != 2 or side.shape[:1] != shape[:1]:
            got = f"{name} is {tuple(side.shape)} and {first} is {tuple(shape)}"
            raise InputError(f"{got}; allowed is [rows, width] for both, the same tokens in the same order")
    _check_rows(shape[0], least)


def _check_rows(rows: int, least: int) -> None:
    if rows < least:
        raise InputError(f"got {rows} rows; allowed is {least} or more: take more sequences")


def _checked(least: int, **sides: Tensor) -> list[Tensor]:
    """The sides in float64 on the first one's device."""
    _check_shapes(least, **sides)
    for name, side in sides.items():
        if not bool(side.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity; look for overflow in the model, or leave those rows out")
    device = next(iter(sides.values())).device
    device = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    return [side.detach().to(device).double() for side in sides.values()]


def _check_layers(x_LND: Sequence[Tensor], y_MNE: Sequence[Tensor]) -> None:
    if not len(x_LND) or not len(y_MNE):
        raise InputError(f"got {len(x_LND)} layers of x and {len(y_MNE)} of y; allowed is 1 or more of each")
    named = (("x", x_LND), ("y", y_MNE))
    _check_shapes(4, **{f"layer {i} of {name}": side for name, sides in named for i, side in enumerate(sides)})


def _grams(**sides: Tensor) -> list[Tensor]:
    """The U-centred Gram of each side, float64 [N, N] on one device; all zeros where `debiased_cka` is NaN.

    Two of them, multiplied entry by entry, sum to n(n − 3) · HSIC₁.
    """
    grams = []
    for x_ND in _checked(4, **sides):
        x_ND = _minus(x_ND, x_ND.mean(0))
        k_NN = _u_centred_gram(x_ND)
        sound = _unless_noise(k_NN.square().sum(), x_ND.square().sum()) > 0
        grams.append(k_NN if sound else torch.zeros_like(k_NN))
    return grams


def _minus(x_ND: Tensor, mean_D: Tensor) -> Tensor:
    """x − mean, with exact zeros where only rounding noise is left."""
    return torch.where((x_ND - mean_D).abs() > _NOISE * mean_D.abs(), x_ND - mean_D, 0.0)


def _unit_grams(name: str, sides: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each layer's centred Gram with a Frobenius norm of 1, NaN where that is 0; their products are CKAs."""
    for number, side in enumerate(sides):
        (gram,) = _grams(**{f"layer {number} of {name}": side})
        yield gram / torch.linalg.vector_norm(gram)


def _u_centred_gram(x_ND: Tensor) -> Tensor:
    """U-centred X Xᵀ. Any translation of x gives the same; a mean of 0 is the most accurate. Differentiable."""
    k_NN = (x_ND @ x_ND.T).fill_diagonal_(0)
    mean_N = k_NN.sum(1) / (len(k_NN) - 2)
    return (k_NN - mean_N[:, None] - mean_N + mean_N.sum() / (len(k_NN) - 1)).fill_diagonal_(0)


def _unless_noise(own: Tensor, spread: Tensor) -> Tensor:
    """`own` = n(n − 3) · HSIC₁(X, X), or 0 where it is rounding noise beside `spread` = Σ‖x − shift‖²."""
    return torch.where(own > _NIL * spread.square(), own, 0.0)


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    ratio = cross / own_x * (own_x / own_y).sqrt()  # exactly 1 for equal sides, and no product that could overflow
    return torch.where((own_x > 0) & (own_y > 0), ratio, math.nan)


def _leave_out(like_NN: Tensor, groups: int, seed: int) -> Tensor:
    """[N, 1 + groups], 1 for a row that stays: all of them, then all but one group each."""
    rows = len(like_NN)
    if not 2 <= groups <= rows or rows - math.ceil(rows / groups) < 4:
        raise InputError(f"groups is {groups} for {rows} rows; allowed is 2 to {rows} that leave 4 rows or more")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    keep_NS = torch.ones(rows, 1 + groups, dtype=torch.float64)
    keep_NS[order, 1 + torch.arange(rows) % groups] = 0
    return keep_NS.to(like_NN.device)


def _cka_of_subsets(k_NN: Tensor, l_NN: Tensor, keep_NS: Tensor) -> Tensor:
    """CKA [S] of subsets of the rows, the first being all, from U-centred Grams of all rows."""
    n_S = keep_NS.sum(0)  # HSIC₁ of a subset doesn't see what U-centring added: u_i + u_j off the diagonal

    def hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
        k_NS, l_NS = (k_NN @ keep_NS) * keep_NS, (l_NN @ keep_NS) * keep_NS
        ones_S = k_NS.sum(0) * l_NS.sum(0) / ((n_S - 1) * (n_S - 2))
        return (keep_NS * ((k_NN * l_NN) @ keep_NS)).sum(0) + ones_S - 2 / (n_S - 2) * (k_NS * l_NS).sum(0)

    own = (hsic(gram, gram) for gram in (k_NN, l_NN))
    return _ratio(hsic(k_NN, l_NN), *(torch.where(own_S > _NIL * own_S[0], own_S, 0.0) for own_S in own))


def _interval(estimate_S: Tensor, level: float) -> Estimate:
    """From the estimate of all rows, followed by those with a group left out."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; allowed is above 0 and below 1, e.g. 0.95")
    value, left_G = float(estimate_S[0]), estimate_S[1:]
    deviation = math.sqrt((len(left_G) - 1) / len(left_G) * float((left_G - left_G.mean()).square().sum()))
    half = student_t(level, len(left_G) - 1) * deviation
    return Estimate(value, value - half, value + half)
