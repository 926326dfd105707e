"""What one does with a run or a study: report, export, classify. Importing it imports neither torch nor lightning."""

from lightning_automl.results.classify import classify
from lightning_automl.results.export import export
from lightning_automl.results.policy_pictures import draw_pictures
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.predictor import Predictor
from lightning_automl.results.report import report
from lightning_automl.results.run import Predictions, Run
from lightning_automl.results.study import StudyRecord

__all__ = [
    "PolicySearchRecord",
    "Predictions",
    "Predictor",
    "Run",
    "StudyRecord",
    "classify",
    "draw_pictures",
    "export",
    "report",
]
