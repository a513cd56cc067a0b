"""To whom the time of a run is charged, by wrapping the functions of its parts."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


class Ledger:
    """Seconds of each part in each turn; a part that is called from another is charged for itself alone.

    Attributes:
        turns: seconds by part, of every turn that has been closed.
    """

    def __init__(self) -> None:
        self.turns: list[dict[str, float]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def charge(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it takes, less what charged functions in it take, goes to ``part``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                self._seconds[part] += taken - self._inner.pop()
                self._inner[-1] += taken

        return timed

    def close_turn(self) -> None:
        """What has been charged so far was one turn."""
        self.turns.append(dict(self._seconds))
        self._seconds.clear()


def charge_trainer(trainer: pl.Trainer, ledger: Ledger) -> None:
    """Charges every callback for its hooks and every logger for what it writes."""
    hooks = [name for name in vars(pl.Callback) if name.startswith("on_")]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in hooks:
            if getattr(type(callback), hook) is not getattr(pl.Callback, hook):
                setattr(callback, hook, ledger.charge(type(callback).__name__, getattr(callback, hook)))
    for logger in trainer.loggers:
        logger.log_metrics = ledger.charge(type(logger).__name__, logger.log_metrics)  # type: ignore[method-assign]


# The work that a bare loop does as well, by the module's method that does it under Lightning.
WORK = {
    "forward and loss": "training_step",
    "backward": "backward",
    "clipping": "configure_gradient_clipping",
    "optimizer": "optimizer_step",
}


def charge_module(module: pl.LightningModule, ledger: Ledger) -> None:
    """Charges the module for its work, and for its hooks around the step, which a bare loop does not have."""
    for part, method in WORK.items():
        setattr(module, method, ledger.charge(part, getattr(module, method)))
    for hook in ("on_train_batch_end", "on_before_optimizer_step"):
        setattr(module, hook, ledger.charge(f"module.{hook}", getattr(module, hook)))
