"""AutoML for image classification with PyTorch Lightning.

Importing the package itself imports neither torch nor lightning; its parts do: ``lightning_automl.tasks``,
``lightning_automl.data``, ``lightning_automl.models`` and so on.
"""

__version__ = "0.1.0"
