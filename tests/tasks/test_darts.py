import copy
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from lightning_automl.callbacks import RunWriter
from lightning_automl.models import ArchitectureCost, architecture_cost
from lightning_automl.models.genotype import Genotype
from lightning_automl.models.relaxations import GumbelSoftmax, SoftmaxRelaxation
from lightning_automl.models.supernet import DartsSpace, Supernet
from lightning_automl.rundir import UserError
from lightning_automl.tasks import DartsTask, WarmupCosineLR
from lightning_automl.tasks.bilevel import unrolled_gradient, untouched_buffers, virtual_step

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
CLASSES = 3


class Tiny(Supernet):
    """One edge of two operations on images of 4 x 4."""

    def __init__(self, norm="batch", smooth=False):
        super().__init__()
        norms = {"batch": lambda: nn.BatchNorm2d(4), "group": lambda: nn.GroupNorm(2, 4), "none": nn.Identity}
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norms[norm]())
        self.other = nn.Sequential(nn.Conv2d(4, 4, 1), norms[norm]())
        self.head = nn.Linear(4, CLASSES)
        self.alpha = nn.Parameter(torch.tensor([[0.1, -0.2]]))
        self.activation = torch.tanh if smooth else torch.relu

    def forward(self, images):
        x = self.activation(self.stem(images))
        weights = self.alpha.softmax(-1)[0]
        return self.head(self.activation(weights[0] * self.one(x) + weights[1] * self.other(x)).mean((2, 3)))

    def alphas(self):
        return [self.alpha]

    def genotype(self):
        name = ("sep_conv_3x3", "skip_connect")[int(self.alpha.argmax())]
        return Genotype((((name, 0),),), (1,), inputs=1)


def draw_batch(images=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(images, 1, 4, 4, generator=generator, dtype=dtype),
        torch.randint(CLASSES, (images,), generator=generator),
    )


class Streams(LightningDataModule):
    """Batches of both streams that are drawn before."""

    def __init__(self, batches=4, images=8, dtype=torch.float32, val=True):
        super().__init__()
        self.batches = [
            {"train": draw_batch(images, dtype, 2 * index), "arch": draw_batch(images, dtype, 2 * index + 1)}
            for index in range(batches)
        ]
        self.dtype, self.val = dtype, val

    def joined(self, number):
        """The same images, so many batches put together."""
        other = copy.copy(self)
        parts = [self.batches[first : first + number] for first in range(0, len(self.batches), number)]
        other.batches = [
            {
                stream: tuple(torch.cat([batch[stream][place] for batch in part]) for place in range(2))
                for stream in ("train", "arch")
            }
            for part in parts
        ]
        return other

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader([draw_batch(6, self.dtype, 99)] if self.val else [], batch_size=None)


class Probe(Callback):
    """What the alphas and the weights were after each batch, and learning rates of the weights."""

    def __init__(self):
        self.alphas, self.weights, self.rates, self.steps = [], [], [], []

    def on_train_batch_start(self, trainer, task, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, task, *_):
        self.alphas.append(task.model.alphas()[0].detach().clone())
        self.weights.append(torch.cat([weight.detach().flatten() for weight in task.model.weights()]))
        self.steps.append(trainer.global_step)


def make_trainer(*callbacks, **options):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": None} | options
    return Trainer(enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options)


def make_task(model=None, cls=DartsTask, **options):
    torch.manual_seed(0)
    options = {"optimizer": SGD, "arch_optimizer": partial(torch.optim.Adam, lr=0.1)} | options
    return cls(Tiny() if model is None else model, CLASSES, **options)


def fit(task, data=None, *callbacks, **options):
    """Train and say what was seen after each batch."""
    seed_everything(0, verbose=False)
    probe = Probe()
    options = {"enable_checkpointing": False} | options
    if options.get("precision") != "64-true" and next(task.parameters()).dtype == torch.float64:
        options["precision"] = "64-true"
    make_trainer(probe, *callbacks, **options).fit(task, Streams() if data is None else data)
    return probe


# The mathematics ------------------------------------------------------------------------------------------------------


def gradient_of(loss):
    return lambda parameters, *, exact=False: torch.autograd.grad(call(loss), parameters, allow_unused=True)


def call(loss):
    with torch.enable_grad():
        return loss()


def test_scalar_toy():
    w, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.0, 2.0))
    seen = []

    def arch():
        seen.append(w.item())
        return (w - 1) ** 2 / 2 + 0 * a

    step = virtual_step(torch.optim.SGD([w], lr=0.1))
    (found,) = unrolled_gradient([a], [w], step, gradient_of(lambda: (w - a) ** 2 / 2), gradient_of(arch))
    assert seen == [pytest.approx(0.2, abs=1e-15)]
    assert float(found) == pytest.approx(-0.08, abs=1e-15)
    assert gradient_of(arch)([a])[0] == 0  # first order
    assert w.item() == 0


STEPS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "fused": True},
]


class Problem:
    """A smooth network in float64 with two parameter groups of different rates."""

    def __init__(self, options, steps_before):
        torch.manual_seed(0)
        self.model = Tiny("none", smooth=True).double()
        self.train, self.arch = (draw_batch(16, torch.float64, seed) for seed in (5, 6))
        self.alphas = self.model.alphas()
        first, second = self.model.weights()[:3], self.model.weights()[3:]
        self.weights = [*first, *second]
        groups = [{"params": first, "lr": options["lr"] / 3}, {"params": second, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, **options)
        for _ in range(steps_before):
            self.step()

    def loss(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def step(self):
        for weight, gradient in zip(
            self.weights, torch.autograd.grad(self.loss(self.train), self.weights), strict=True
        ):
            weight.grad = gradient
        self.optimizer.step()

    def hypergradient(self):
        (found,) = unrolled_gradient(
            self.alphas,
            self.weights,
            virtual_step(self.optimizer),
            gradient_of(lambda: self.loss(self.train)),
            gradient_of(lambda: self.loss(self.arch)),
        )
        return found


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_the_virtual_step_is_that_of_sgd(options, steps_before):
    problem = Problem(options, steps_before)
    start = [weight.detach().clone() for weight in problem.weights]
    step = virtual_step(problem.optimizer)
    gradients = torch.autograd.grad(problem.loss(problem.train), problem.weights)
    problem.step()
    expected = [weight.detach().clone() for weight in problem.weights]
    assert not torch.equal(expected[0], start[0])
    step(start, gradients)
    torch.testing.assert_close(start, expected, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_the_hypergradient_is_that_of_full_finite_differences(options, steps_before):
    """d L_arch(w'(alpha), alpha) / d alpha, where w' is a real step of the optimizer."""

    def value(alpha):
        copied = copy.deepcopy(problem)
        with torch.no_grad():
            copied.alphas[0].copy_(alpha)
        copied.step()
        return copied.loss(copied.arch).item()

    problem = Problem(options, steps_before)
    alpha, h = problem.alphas[0].detach().clone(), 1e-5
    expected = torch.zeros_like(alpha)
    for place in range(alpha.numel()):
        shift = torch.zeros_like(alpha)
        shift.view(-1)[place] = h
        expected.view(-1)[place] = (value(alpha + shift) - value(alpha - shift)) / (2 * h)
    before = [weight.detach().clone() for weight in problem.weights]
    found = problem.hypergradient()
    (first_order,) = torch.autograd.grad(problem.loss(problem.arch), problem.alphas)
    assert (found - expected).norm() < 1e-3 * (found - first_order).norm()
    assert all(torch.equal(*pair) for pair in zip(problem.weights, before, strict=True))  # bit for bit


def test_the_finite_difference_is_the_product_of_second_derivatives():
    """The term by itself, against double backward."""
    problem = Problem({"lr": 0.1}, 0)
    ahead = copy.deepcopy(problem)
    ahead.step()
    own, *towards = torch.autograd.grad(ahead.loss(ahead.arch), [*ahead.alphas, *ahead.weights])
    gradients = torch.autograd.grad(problem.loss(problem.train), problem.weights, create_graph=True)
    rates = [0.1 / 3] * 3 + [0.1] * (len(towards) - 3)
    along = sum(rate * (one * other).sum() for rate, one, other in zip(rates, gradients, towards, strict=True))
    (expected,) = torch.autograd.grad(along, problem.alphas)
    found = own - problem.hypergradient()
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_without_a_rate_second_order_is_first_order():
    problem = Problem({"lr": 0.0}, 0)
    (first_order,) = torch.autograd.grad(problem.loss(problem.arch), problem.alphas)
    assert torch.equal(problem.hypergradient(), first_order)
    problem = Problem({"lr": 1e-12}, 0)
    torch.testing.assert_close(problem.hypergradient(), first_order, atol=1e-7, rtol=0)


def test_where_the_loss_is_flat_in_the_weights_the_product_is_zero():
    problem = Problem({"lr": 0.1}, 0)
    (found,) = unrolled_gradient(
        problem.alphas,
        problem.weights,
        virtual_step(problem.optimizer),
        gradient_of(lambda: problem.loss(problem.train)),
        gradient_of(lambda: problem.alphas[0].square().sum() + 0 * sum(w.sum() for w in problem.weights)),
    )
    assert torch.equal(found, 2 * problem.alphas[0])


def test_weights_are_put_back_when_a_loss_fails():
    problem = Problem({"lr": 0.1}, 0)
    before = [weight.detach().clone() for weight in problem.weights]

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        unrolled_gradient(
            problem.alphas,
            problem.weights,
            virtual_step(problem.optimizer),
            gradient_of(lambda: problem.loss(problem.train)),
            gradient_of(broken),
        )
    assert all(torch.equal(*pair) for pair in zip(problem.weights, before, strict=True))


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, partial(torch.optim.SGD, maximize=True)], ids=["AdamW", "maximize"]
)
def test_unrolled_says_which_optimizer_it_takes(make):
    task = make_task(optimizer=partial(make, lr=0.1), unrolled=True)
    with pytest.raises(UserError, match=r"known for torch.optim.SGD .* but not for (AdamW|SGD\(maximize=True\))"):
        fit(task)


def test_no_pass_changes_a_buffer_and_its_values_are_the_same():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(1))

        def forward(self, x):
            self.passes += 1
            return x

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), Counter()
    )
    images = draw_batch()[0]
    for training in (True, False):
        network.train(training)
        before = copy.deepcopy(network.state_dict())
        with untouched_buffers(network):
            inside = network(images)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert torch.equal(network(images), inside)
    assert network[1].num_batches_tracked == 1
    assert network[3].passes == 2


# Steps of the task ----------------------------------------------------------------------------------------------------


class Watched(DartsTask):
    """Compares the whole state before and after each half-step."""

    moved: dict

    def architecture_step(self, train, arch):
        self.compare("arch", super().architecture_step, train, arch)

    def weight_step(self, train):
        self.compare("train", super().weight_step, train)

    def compare(self, half, step, *arguments):
        before = copy.deepcopy(self.model.state_dict())
        step(*arguments)
        after = self.model.state_dict()
        self.moved[half] |= {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("unrolled", [False, True])
def test_each_step_moves_only_its_own(unrolled):
    task = make_task(cls=Watched, unrolled=unrolled)
    task.moved = {"arch": set(), "train": set()}
    fit(task)
    assert task.moved["arch"] == {"alpha"}
    biases = {"one.0.bias", "other.0.bias"}  # which a batch norm takes out
    assert task.moved["train"] >= {name for name in task.model.state_dict()} - {"alpha"} - biases
    assert "alpha" not in task.moved["train"]
    assert task.model.one[1].num_batches_tracked == 4  # batches of the weights, not passes


def test_gradients_are_freed_before_the_next_step():
    kept = []

    class Gradients(Callback):
        def on_train_batch_end(self, trainer, task, *_):
            kept.extend(parameter.grad for parameter in task.parameters())

    fit(make_task(), None, Gradients())
    assert kept
    assert all(gradient is None for gradient in kept)


def test_gradients_that_are_compared_are_of_one_dropout():
    """Virtual step, both ends of the difference and the step itself drop the same; the alphas' batch another way."""
    dropped = []
    model = Tiny("group")
    model.stem = nn.Sequential(model.stem, nn.Dropout(0.5))
    model.stem[1].register_forward_hook(lambda module, _, output: dropped.append((output == 0).detach()))
    fit(make_task(model, unrolled=True), limit_train_batches=2, limit_val_batches=0)
    assert len(dropped) == 10
    for first in (0, 5):
        virtual, arch, plus, minus, step = dropped[first : first + 5]
        assert all(torch.equal(virtual, each) for each in (plus, minus, step))
        assert not torch.equal(virtual, arch)
    assert not torch.equal(dropped[0], dropped[5])


def test_two_runs_of_one_seed_have_the_same_alphas():
    for unrolled in (False, True):
        one, other = (fit(make_task(unrolled=unrolled)).alphas for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    first_order = fit(make_task()).alphas
    assert not torch.equal(one[-1], first_order[-1])


def test_a_run_is_what_a_loop_by_hand_gives():
    """Both steps, in this order, with momentum, decay and clipping."""
    for unrolled in (False, True):
        task = make_task(Tiny("group").double(), unrolled=unrolled, gradient_clip=0.05)
        model = copy.deepcopy(task.model)
        data = Streams(dtype=torch.float64)
        found = fit(task, data)
        weights, alphas = SGD(model.weights()), torch.optim.Adam(model.alphas(), lr=0.1)

        def loss(batch, model=model):
            return F.cross_entropy(model(batch[0]), batch[1])

        for number, batch in enumerate(data.batches):
            if unrolled:
                (gradient,) = unrolled_gradient(
                    model.alphas(),
                    model.weights(),
                    virtual_step(weights),
                    gradient_of(partial(loss, batch["train"])),
                    gradient_of(partial(loss, batch["arch"])),
                )
            else:
                (gradient,) = torch.autograd.grad(loss(batch["arch"]), model.alphas())
            model.alpha.grad = gradient
            alphas.step()
            for weight, gradient in zip(
                model.weights(), torch.autograd.grad(loss(batch["train"]), model.weights()), strict=True
            ):
                weight.grad = gradient
            norm = nn.utils.clip_grad_norm_(model.weights(), 0.05)
            assert norm > 0.05
            weights.step()
            torch.testing.assert_close(found.alphas[number], model.alpha.detach(), atol=1e-12, rtol=1e-12)
            flat = torch.cat([weight.detach().flatten() for weight in model.weights()])
            torch.testing.assert_close(found.weights[number], flat, atol=1e-12, rtol=1e-12)


def test_gradients_of_weights_are_clipped_and_those_of_alphas_are_not():
    plain = partial(torch.optim.SGD, lr=1.0)
    runs = {}
    for clip in (None, 1e-3):
        task = make_task(optimizer=plain, arch_optimizer=plain, gradient_clip=clip)
        before = torch.cat([weight.detach().flatten() for weight in task.model.weights()])
        found = fit(task, limit_train_batches=1)
        runs[clip] = (found.weights[0] - before).norm(), found.alphas[0]
    assert runs[None][0] > 0.01
    assert runs[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(runs[None][1], runs[1e-3][1])


def test_schedules_follow_epochs_or_steps():
    task = make_task(scheduler=lambda optimizer: CosineAnnealingLR(optimizer, T_max=4, eta_min=0.01))
    found = fit(task, max_epochs=4)
    expected = [0.01 + 0.09 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert found.rates == pytest.approx([rate for rate in expected for _ in range(4)])
    for accumulate, stepping in ((1, 8), (2, 4), (3, 4)):
        found = fit(make_task(scheduler=partial(WarmupCosineLR, warmup=0), accumulate=accumulate), max_epochs=2)
        rates = list(dict.fromkeys(found.rates))
        assert rates == pytest.approx(
            [0.1 * (1 + math.cos(math.pi * step / (stepping - 1))) / 2 for step in range(stepping)]
        )
        assert found.steps[-1] == stepping


def test_alphas_stay_in_the_warmup():
    found = fit(make_task(warmup_epochs=2), max_epochs=3)
    start = Tiny().alpha.detach()
    assert all(torch.equal(alpha, start) for alpha in found.alphas[:8])
    assert all(not torch.equal(alpha, start) for alpha in found.alphas[8:])
    assert not torch.equal(found.weights[0], found.weights[7])


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_one_batch(unrolled, accumulate):
    """Four batches: with three at a time, the last step of an epoch is of one."""
    data = Streams(dtype=torch.float64)
    data.batches[1] = {stream: (images[:5], labels[:5]) for stream, (images, labels) in data.batches[1].items()}
    models = [Tiny("group").double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"unrolled": unrolled}
    several = fit(make_task(models[0], accumulate=accumulate, **options), data, max_epochs=2)
    joint = fit(make_task(models[1], **options), data.joined(accumulate), max_epochs=2)
    assert several.steps[-1] == joint.steps[-1] == 4
    torch.testing.assert_close(several.alphas[-1], joint.alphas[-1], atol=1e-10, rtol=0)
    torch.testing.assert_close(several.weights[-1], joint.weights[-1], atol=1e-10, rtol=0)
    assert torch.equal(several.alphas[0], torch.tensor([[0.1, -0.2]]).double())  # nothing is done before the last
    assert (several.alphas[-1] - several.alphas[0]).abs().max() > 0.01


def test_a_rule_of_your_own_is_one_hook():
    """One level instead of two, as in SNAS: the alphas learn from what the weights learn from."""

    class SingleLevel(DartsTask):
        def streams(self, batch):
            return batch["train"], batch["train"]

    class Decisive(DartsTask):
        def architecture_loss(self, batch):
            alpha = self.model.alpha.softmax(-1)
            return super().architecture_loss(batch) - 100 * (alpha * alpha.log()).sum()

    class Signs(DartsTask):
        def hypergradient(self, train, arch):
            return [gradient.sign() for gradient in super().hypergradient(train, arch)]

    plain = fit(make_task()).alphas
    single = fit(make_task(cls=SingleLevel)).alphas
    assert not torch.equal(single[-1], plain[-1])
    decisive = fit(make_task(cls=Decisive)).alphas
    assert decisive[-1].softmax(-1).max() > plain[-1].softmax(-1).max()
    rate = partial(torch.optim.SGD, lr=1.0)
    signs = fit(make_task(cls=Signs, arch_optimizer=rate)).alphas
    assert (signs[0] - Tiny().alpha).abs().tolist() == [[pytest.approx(1)] * 2]


# The run --------------------------------------------------------------------------------------------------------------


def test_global_step_counts_steps_on_weights_and_ends_the_run():
    assert fit(make_task(), max_epochs=2).steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert fit(make_task(), max_steps=6, max_epochs=-1).steps == [1, 2, 3, 4, 5, 6]
    assert fit(make_task(), max_epochs=2, limit_train_batches=3).steps == [1, 2, 3, 4, 5, 6]
    assert fit(make_task(accumulate=2), max_epochs=2).steps == [0, 1, 1, 2, 2, 3, 3, 4]
    assert fit(make_task(accumulate=2), max_steps=3, max_epochs=-1).steps == [0, 1, 1, 2, 2, 3]


def test_model_checkpoint_sees_the_steps(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(make_task(), None, keeper, max_epochs=2, enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {"step=3.ckpt", "step=6.ckpt"}
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert len(state["optimizer_states"]) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_writer_writes_both_streams_and_within_an_epoch(tmp_path, accumulate):
    written = []

    class Steps(Callback):
        def on_save_checkpoint(self, trainer, task, checkpoint):
            written.append(checkpoint["global_step"])

    writer = RunWriter(tmp_path, every_n_steps=1)
    seed_everything(0, verbose=False)
    trainer = make_trainer(writer, Steps(), max_epochs=2)
    trainer.fit(make_task(accumulate=accumulate), Streams())
    assert written == ([1, 2, 3, 4, 5, 6, 7, 8] if accumulate == 1 else [1, 2, 3, 4])
    assert {"train_loss", "arch_loss", "arch_accuracy", "val_accuracy", "lr", "lr_1"} <= writer.rows[-1].keys()
    assert [row["lr_1"] for row in writer.rows] == [0.1, 0.1]


@pytest.mark.parametrize("unrolled", [False, True])
def test_metrics_are_of_each_image_once(unrolled):
    class Counts(Callback):
        def on_train_epoch_end(self, trainer, task):
            counts.append({stage: sum(map(len, task.outputs(stage).labels)) for stage in ("train", "arch")})

    counts = []
    fit(make_task(unrolled=unrolled, warmup_epochs=1), None, Counts(), max_epochs=2)
    assert counts == [{"train": 32, "arch": 0}, {"train": 32, "arch": 32}]


@pytest.mark.parametrize("unrolled", [False, True])
def test_bf16_autocast_trains(unrolled):
    """Alphas stay float32, and the difference of gradients is not taken in bf16."""
    task = make_task(unrolled=unrolled)
    kinds = []
    task.model.other[0].register_forward_hook(lambda module, _, output: kinds.append(output.dtype))
    found = fit(task, max_epochs=3, precision="bf16-mixed", limit_val_batches=0)
    exact = fit(make_task(unrolled=unrolled), max_epochs=3)
    assert found.alphas[-1].dtype == torch.float32
    torch.testing.assert_close(found.alphas[-1], exact.alphas[-1], atol=0.1, rtol=0)
    assert (found.alphas[-1] - found.alphas[0]).abs().max() > 0.05
    bf16, fp32 = torch.bfloat16, torch.float32
    assert kinds == ([bf16, bf16, fp32, fp32, bf16] if unrolled else [bf16, bf16]) * 12


class NoAutocast(MixedPrecision):
    """fp16's scaler alone, so that scaled and unscaled gradients can be compared."""

    def __init__(self, scale):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unrolled", [False, True])
def test_scaled_steps_are_those_without_a_scaler(unrolled, fused):
    options = {"unrolled": unrolled, "gradient_clip": 0.05, "optimizer": partial(SGD, fused=fused)}
    options["arch_optimizer"] = partial(torch.optim.Adam, lr=0.1, fused=fused)
    scaled = fit(make_task(**options), plugins=[NoAutocast(2.0**10)])
    plain = fit(make_task(**options))
    for name in ("alphas", "weights"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), atol=1e-6, rtol=1e-5)
    assert scaled.steps == plain.steps


def test_fp16_with_its_scaler_trains_on_a_cpu():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    found = fit(make_task(unrolled=True), max_epochs=3, plugins=[precision])
    exact = fit(make_task(unrolled=True), max_epochs=3)
    torch.testing.assert_close(found.alphas[-1], exact.alphas[-1], atol=0.1, rtol=0)


def test_fused_momentum_begins_as_that_of_other_sgd():
    fused, plain = (fit(make_task(optimizer=partial(SGD, fused=each))).weights for each in (True, False))
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="fused SGD with dampening"):
        fit(make_task(optimizer=partial(SGD, fused=True, dampening=0.1)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unrolled", [False, True])
def test_gradients_that_overflow_skip_the_step(unrolled, fused):
    plugin = NoAutocast(2.0**127)  # the first gradients are infinite
    loud = {"unrolled": unrolled, "loss": lambda logits, labels: 1000 * F.cross_entropy(logits, labels)}
    loud["optimizer"] = partial(SGD, fused=fused)
    task = make_task(**loud)
    before = copy.deepcopy(task.model.state_dict())
    found = fit(task, Streams(batches=1), plugins=[plugin])
    assert all(torch.equal(value, before[name]) for name, value in task.model.named_parameters())
    assert plugin.scaler.get_scale() == 2.0**125  # halved at either step
    assert found.steps == [1]
    found = fit(make_task(**loud), Streams(batches=30), plugins=[NoAutocast(2.0**127)])
    assert found.weights[-1].abs().max() < 10
    assert not torch.equal(found.alphas[-1], before["alpha"])


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(("stream", "what"), [("train", "train_loss"), ("arch", "arch_loss")])
def test_a_loss_that_is_not_finite_ends_the_run(stream, what, unrolled):
    data = Streams()
    data.batches[2][stream][0][0] = float("nan")
    # one step ahead on NaN, everything is NaN
    what = "arch_loss" if unrolled else what
    with pytest.raises(RuntimeError, match=f"{what} is not finite at step 2"):
        fit(make_task(unrolled=unrolled), data)


def test_alphas_that_are_not_finite_end_the_run():
    class Broken(DartsTask):
        def hypergradient(self, train, arch):
            return [torch.full_like(alpha, float("inf")) for alpha in self.model.alphas()]

    with pytest.raises(RuntimeError, match="alphas are not finite at step 0"):
        fit(make_task(cls=Broken, arch_optimizer=partial(torch.optim.SGD, lr=1.0)))


def test_on_a_device_of_its_own_finiteness_is_asked_at_the_end_of_an_epoch(monkeypatch):
    data = Streams()
    data.batches[2]["train"][0][0] = float("nan")
    monkeypatch.setattr("lightning_automl.tasks.darts._waits", lambda device: True)
    with pytest.raises(RuntimeError, match="train_loss is not finite at step 2"):
        fit(make_task(), data)


def test_stop_search_ends_the_run_after_the_epoch_for_good(tmp_path):
    class Guard(Callback):
        def on_train_epoch_end(self, trainer, task):
            if trainer.current_epoch == 2:
                task.stop_search("two skips in the normal cell", epoch=1)

    task = make_task()
    found = fit(task, None, Guard(), RunWriter(tmp_path), max_epochs=9, enable_checkpointing=None)
    assert len(found.steps) == 12
    assert task.chosen == (1, "two skips in the normal cell")
    again, probe = make_task(), Probe()
    make_trainer(probe, RunWriter(tmp_path), max_epochs=9).fit(
        again, Streams(), ckpt_path=tmp_path / "checkpoints/last.ckpt", weights_only=True
    )
    assert again.chosen == (1, "two skips in the normal cell")
    assert probe.steps == []
    assert len(fit(again).steps) == 4  # not continued, but searched again
    assert again.chosen is None


def test_the_gradient_for_guards_is_that_of_the_loss_and_leaves_no_trace():
    gradients = []

    class Guard(Callback):
        def on_train_epoch_end(self, trainer, task):
            before = copy.deepcopy(task.model.state_dict())
            counts = sum(map(len, task.outputs("arch").labels))
            gradients.append(task.architecture_gradient(task.newest_arch_batch))
            images, labels = task.newest_arch_batch
            gradients.append([reference(task.model, images, labels)])
            assert sum(map(len, task.outputs("arch").labels)) == counts
            assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())

    def reference(model, images, labels):
        copied = copy.deepcopy(model)
        return torch.autograd.grad(F.cross_entropy(copied(images), labels), copied.alphas())[0]

    fit(make_task(), None, Guard())
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-6)
    assert gradients[0][0].abs().max() > 1e-3


class Price(nn.Module):
    limit = None

    def prepare(self, model, shape, device=None):
        self.shape = shape

    def penalty(self, model):
        return 1000 * model.alpha.softmax(-1)[0, 0]

    def within_limit(self, model):
        return Genotype(((("skip_connect", 0),),), (1,), inputs=1)


def test_the_penalty_of_cost_and_of_the_network_moves_alphas():
    data = Streams()
    data.channels, data.image_size = 1, (4, 4)
    price = Price()
    found = fit(make_task(cost=price), data, max_epochs=3)
    plain = fit(make_task(), data, max_epochs=3)
    assert price.shape == (1, 4, 4)
    assert found.alphas[-1][0, 0] < plain.alphas[-1][0, 0] - 0.5
    task = make_task(cost=price)
    assert task.genotype().normal[0][0][0] == "sep_conv_3x3"
    price.limit = 3.0
    assert task.genotype().normal[0][0][0] == "skip_connect"

    class Fair(Tiny):
        def penalty(self):
            return 1000 * self.alpha.softmax(-1)[0, 0]

    torch.testing.assert_close(fit(make_task(Fair()), data, max_epochs=3).alphas, found.alphas)


def test_a_search_that_goes_on_keeps_the_latencies_of_its_beginning(tmp_path, monkeypatch):
    def make():
        space = DartsSpace(CLASSES, 1, channels=2, cells=3, nodes=1, operations=["none", "skip_connect"])
        return make_task(space, cost=ArchitectureCost("latency", weight=1.0))

    data = Streams()
    data.channels, data.image_size = 1, (4, 4)
    path = tmp_path / "a.ckpt"
    task = make()
    trainer = make_trainer(enable_checkpointing=False)
    trainer.fit(task, data)
    trainer.save_checkpoint(path, weights_only=False)
    monkeypatch.setattr(architecture_cost, "measure_latencies", None)  # another time there are others
    later = make()
    make_trainer(max_epochs=2, enable_checkpointing=False).fit(later, data, ckpt_path=path, weights_only=True)
    assert later.cost.state_dict().keys() == task.cost.state_dict().keys()
    for alpha, kept in zip(later.model.alphas(), task.model.alphas(), strict=True):
        alpha.data.copy_(kept.data)
    assert later.cost.penalty(later.model) == task.cost.penalty(task.model)
    make_trainer(enable_checkpointing=False).validate(make(), data, ckpt_path=path, weights_only=True)


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.schedule, self.seeds = [], []

    def at(self, epoch, epochs):
        self.schedule.append((epoch, epochs))

    def draw(self, seed):
        self.seeds.append(seed)


def test_the_relaxation_is_told_epoch_and_seed(tmp_path):
    model = Tiny()
    model.relaxation = Recorder()
    fit(make_task(model, unrolled=True), None, RunWriter(tmp_path), max_epochs=2, enable_checkpointing=None)
    assert list(dict.fromkeys(model.relaxation.schedule)) == [(0, 2), (1, 2)]
    seeds = model.relaxation.seeds
    assert len(set(seeds)) == 2 * 8  # one a half-step
    assert seeds[:5] == [seeds[0], seeds[1], seeds[0], seeds[0], seeds[0]]  # virtual step, arch, difference, weights
    several = Tiny()
    several.relaxation = Recorder()
    fit(make_task(several, accumulate=2), max_epochs=4)
    first_order = several.relaxation.seeds  # arch and train, two batches each
    assert list(dict.fromkeys(first_order)) == [
        seed for step in range(8) for seed in (seeds[5 * step + 1], seeds[5 * step])
    ]
    assert len(first_order) == 4 * 8
    loaded = make_task(copy.deepcopy(model))
    loaded.model.relaxation.schedule.clear()
    loaded.on_load_checkpoint(torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True))
    assert loaded.model.relaxation.schedule == [(1, 2)]


@pytest.mark.parametrize("fused", [False, True])
def test_operations_that_were_not_sampled_stay(fused):
    """GDAS: one operation an edge runs, and no momentum or decay moves the others."""
    torch.manual_seed(0)
    options = {"relaxation": GumbelSoftmax(), "operations": ("sep_conv_3x3", "dil_conv_3x3")}
    space = DartsSpace(CLASSES, in_channels=1, channels=4, cells=3, nodes=1, **options)
    moved = []

    class Sampled(DartsTask):
        def weight_step(self, train):
            before = [weight.detach().clone() for weight in self.model.weights()]
            super().weight_step(train)
            moved.append([not torch.equal(*pair) for pair in zip(before, self.model.weights(), strict=True)])

    fit(make_task(space, cls=Sampled, optimizer=partial(SGD, fused=fused)), limit_val_batches=0)
    names = [name for name, weight in space.named_parameters() if weight.requires_grad and "architecture" not in name]
    for step in moved:
        inside = [moves for name, moves in zip(names, step, strict=True) if "_conv_3x3" in name]
        assert any(inside)
        assert not all(inside)
    assert moved[0] != moved[1] or moved[1] != moved[2]


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": nn.Linear(2, 3)}, "model is a Linear, in which there is nothing to search; give a Supernet"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"accumulate": 0}, "accumulate is 0"),
    ],
)
def test_arguments_that_cannot_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_task(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gradient_clip_val": 1.0}, "set the task's gradient_clip"),
        ({"accumulate_grad_batches": 2}, "set the task's accumulate"),
        ({"precision": "bf16-true"}, "use bf16-mixed or 32-true"),
    ],
)
def test_settings_of_the_trainer_that_do_not_fit(options, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(make_task(), **options)


def test_a_schedule_of_the_relaxation_needs_a_length():
    model = Tiny()
    model.relaxation = Recorder()
    with pytest.raises(UserError, match=r"follows the length of the search; set trainer.max_epochs or max_steps"):
        fit(make_task(model), max_epochs=-1, max_time="00:00:00:05")
    model.relaxation = SoftmaxRelaxation()  # has no schedule
    fit(make_task(model), max_epochs=-1, max_time="00:00:00:00")


def test_a_validation_in_the_middle_of_a_step_is_refused():
    with pytest.raises(UserError, match=r"val_check_interval amounts to 1 batches, but a step takes 2"):
        fit(make_task(accumulate=2), val_check_interval=1)
    fit(make_task(accumulate=2), val_check_interval=2)


def test_schedules_that_wait_for_a_metric_are_refused():
    with pytest.raises(UserError, match="ReduceLROnPlateau waits for a metric"):
        fit(make_task(scheduler=partial(ReduceLROnPlateau, monitor="val_loss")))


@pytest.mark.parametrize("given", ["a tuple", "a field that is None"])
def test_data_without_a_second_stream(given):
    class Single(Streams):
        def train_dataloader(self):
            return DataLoader([batch["train"] for batch in self.batches], batch_size=None)

    data = Single()
    if given != "a tuple":
        data.arch_fraction = None
    with pytest.raises(UserError, match=r"no second stream of batches.*set the data module's arch_fraction"):
        fit(make_task(), data)
