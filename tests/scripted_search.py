"""A search whose genotypes and eigenvalues are those of a script, for tests of what watches searches."""

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from lightning_automl.data import DigitsDataModule
from lightning_automl.models import Genotype, Supernet
from lightning_automl.tasks import DartsTask


def genotype_of(skips, kind="normal"):
    """A genotype of two nodes; ``skips`` of the four edges of the cell are skip connections."""
    names = ["skip_connect"] * skips + ["sep_conv_3x3"] * (4 - skips)
    cell = (((names[0], 0), (names[1], 1)), ((names[2], 0), (names[3], 1)))
    plain = ((("max_pool_3x3", 0), ("max_pool_3x3", 1)),) * 2
    cells = {"normal": plain, "reduce": plain, kind: cell}
    return Genotype(cells["normal"], (2, 3), cells["reduce"], (2, 3))


class ScriptedSpace(Supernet):
    """Two layers, weighted: a space of somebody's own, with nothing but what it has to have."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(2))
        self.layers = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])

    def forward(self, images):
        weights = self.alpha.softmax(0)
        return sum(weight * layer(images.flatten(1)) for weight, layer in zip(weights, self.layers, strict=True))

    def alphas(self):
        return [self.alpha]

    def genotype(self):
        return genotype_of(0)


class ScriptedTask(DartsTask):
    """Learns as any other, and derives genotypes with as many skip connections as ``skips`` says for each epoch.

    The Hessian of the architecture has the largest eigenvalue of ``eigenvalues``, and another that is larger in
    magnitude.
    """

    def __init__(self, skips=(0,), eigenvalues=(1.0,), kind="normal", model=None, **settings):
        super().__init__(
            model or ScriptedSpace(),
            10,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            arch_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
            **settings,
        )
        self.skips, self.eigenvalues, self.kind = skips, eigenvalues, kind

    def genotype(self):
        return genotype_of(_of(self.skips, self.current_epoch), self.kind)

    def architecture_gradient(self, batch):
        value = _of(self.eigenvalues, self.current_epoch)
        (alpha,) = self.model.alphas()
        return [alpha.detach() * torch.tensor([value, -10.0], device=alpha.device)]


def _of(script, epoch):
    return script[min(epoch, len(script) - 1)]


def search(task, callbacks=(), ckpt_path=None, data=None, **settings):
    """Fit with two batches an epoch."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 8, "limit_train_batches": 2, "limit_val_batches": 0, **settings},
    )
    trainer.fit(
        task, data or DigitsDataModule(batch_size=50, arch_fraction=0.5), ckpt_path=ckpt_path, weights_only=True
    )
    return trainer
