"""Jobs in processes of the trial server: what becomes of those that fail."""

import errno
import logging

import pytest

from lightning_automl.mistakes import one_sentence
from lightning_automl.process import messages
from lightning_automl.rundir import DiskFullError, UserError
from lightning_automl.search.devices import Slice
from lightning_automl.search.study import StudyFailed
from lightning_automl.search.trials import Ending
from lightning_automl.studies.workers import Workers


class Server:
    """Ends each job in one way."""

    def __init__(self, ending):
        self.ending = ending

    def run(self, payload, **keys):
        return self.ending


@pytest.mark.parametrize(
    ("exception", "reason", "error", "sentence"),
    [
        ("UserError", "width is 0", UserError, "a job failed: width is 0 (see "),
        ("RuntimeError", "it broke", StudyFailed, "a job failed: it broke (see "),
        ("DiskFullError", "no space left for x", DiskFullError, "no space left for x"),
        ("OSError", "[Errno 28] No space left on device: 'a' -> 'b'", DiskFullError, "no space left for "),
    ],
)
def test_a_failure_is_what_its_reason_says(tmp_path, exception, reason, error, sentence):
    workers = Workers(Server(Ending("failed", reason=reason, exception=exception)), [Slice((), 1)], 1)
    with pytest.raises(error) as told:
        workers.do("a job", {}, tmp_path / "output.txt")
    assert one_sentence(told.value).startswith(sentence)
    assert getattr(told.value, "errno", errno.ENOSPC) == errno.ENOSPC


def test_a_log_on_a_full_disk_says_nothing(capfd):
    with messages() as log_to:
        log_to("/dev/full")
        logging.getLogger("lightning_automl").info("it goes on")
    assert "Traceback" not in capfd.readouterr().err
