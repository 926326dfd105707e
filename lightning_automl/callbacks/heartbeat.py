"""Tell a watchdog that a run makes progress."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

from lightning_automl.rundir import UserError


class Heartbeat(Callback):
    """Calls ``send`` while the training, evaluating or predicting thread comes from one hook to the next.

    A rank that waits for another in a collective is silent, and so is one whose loader hangs: a watchdog sees that, and
    a thread that beats by itself would hide it. One batch has to take less than the watchdog's patience.

    Args:
        send: Called without arguments in the thread that trains; what it raises ends the run.
        every: At most one call in so many seconds; 0 for one at each hook.

    Raises:
        UserError: If ``every`` is negative.
    """

    def __init__(self, send: Callable[[], None], every: float = 1.0) -> None:
        if every < 0:
            raise UserError(f"every is {every}; it is a number of seconds, 0 or more")
        self.send = send
        self.every = every
        self._sent = -float("inf")

    def _beat(self, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self._sent >= self.every:
            self._sent = now
            self.send()

    setup = teardown = on_save_checkpoint = on_exception = _beat
    on_fit_start = on_fit_end = on_sanity_check_start = on_sanity_check_end = _beat
    on_train_start = on_train_epoch_start = on_train_epoch_end = on_train_end = _beat
    on_train_batch_start = on_train_batch_end = _beat
    on_validation_start = on_validation_epoch_end = on_validation_end = _beat
    on_validation_batch_start = on_validation_batch_end = _beat
    on_test_start = on_test_epoch_end = on_test_end = on_test_batch_start = on_test_batch_end = _beat
    on_predict_start = on_predict_end = on_predict_batch_start = on_predict_batch_end = _beat
